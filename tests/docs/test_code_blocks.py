"""Every code block of the README and of docs/ is run as its readers would, or says why not."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

import random_adapter
from docs_pages import NOT_TESTED, PAGES, ROOT, Block, Reader, blocks
from mtpbatch import Engine

RUN = {"python", "sh"}  # languages of blocks that are run
DATA = {"dockerfile", "ini", "json", "text", "toml", "yaml"}
EXAMPLES = "examples/"  # where a block is quoted from, if its title says so

# How many blocks of a page are not tested. A page that wants more has to be let in here.
UNTESTED = {
    "docs/guides/models.md": 2,  # published models
    "docs/load-testing.md": 4,  # servers of the reader's, measurements
    "docs/migrating.md": 1,  # servers of the reader's
    "docs/performance.md": 1,  # measurements
    "docs/reliability.md": 4,  # an hour's run, fuzzing, builds with sanitizers, the suite itself
    "docs/scaling.md": 5,  # GPUs, a Ray cluster, a build with RPC
    "docs/scheduling.md": 15,  # measurements
}


def runs(block: Block) -> bool:
    return block.language in RUN and not block.title.startswith((EXAMPLES, NOT_TESTED))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # the pages import it


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader works: with a model, and an adapter for it."""
    monkeypatch.chdir(tmp_path)
    os.symlink(demo_path, "model.gguf")
    random_adapter.write_random_adapter(tmp_path / "adapter.gguf", demo_path)
    return tmp_path


@asynccontextmanager
async def reading(folder: Path, steps: Iterable[Block]) -> AsyncIterator[Reader]:
    async with Engine.open("model.gguf", n_seq=4, n_threads=1) as engine:
        reader = Reader(folder, engine)
        try:
            for block in steps:
                await reader.read(block)
            yield reader
        finally:
            await anyio.to_thread.run_sync(reader.stop_servers)


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(runs, blocks(p)))], ids=name_of)
@pytest.mark.anyio
async def test_the_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    async with reading(folder, filter(runs, blocks(page))):
        pass


@pytest.mark.anyio
async def test_the_service_of_the_ten_minutes_survives_a_client_that_leaves(folder: Path) -> None:
    steps = blocks(ROOT / "docs" / "start" / "ten-minutes.md")
    wanted = [b for b in steps if b.title == "app.py" or re.search("^uvicorn|head -c", b.code)]
    async with reading(folder, wanted) as reader, httpx.AsyncClient(timeout=60) as client:
        url = f"http://127.0.0.1:{reader.port}/stats"

        async def ended() -> bool:
            said = (await client.get(url)).json()
            return bool(said["finished"]["abort"] == 1 and said["running"] == 0)

        while not await ended():
            pass  # each look takes the server's time, in which it notices


def test_blocks_that_are_not_tested_say_why_and_are_few() -> None:
    counted = {name_of(p): [b for b in blocks(p) if b.title.startswith(NOT_TESTED)] for p in PAGES}
    assert {page: len(found) for page, found in counted.items() if found} == UNTESTED
    for block in [block for found in counted.values() for block in found]:
        for script in re.findall(r"-m (benchmarks\.\w+)|(tools/\w+\.py)", block.code):
            path = script[1] or script[0].replace(".", "/") + ".py"
            assert (ROOT / path).exists(), f"{block.place}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_escapes(page: Path) -> None:
    """Each is fenced, with a language, at the left; and what is indented is no command."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= RUN | DATA
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    commands = r"\n\n    (?:\$ |pip |python|mtpbatch |curl |await |async |import |from \w+ import)"
    assert not re.search(commands, outside)


def test_quotes_are_those_of_the_examples() -> None:
    """Word for word, but for the indentation, and line breaks that depend on that."""
    quotes = [b for p in PAGES for b in blocks(p) if b.title.startswith(EXAMPLES)]
    assert quotes
    for quote in quotes:
        program = (ROOT / quote.title).read_text(encoding="utf-8")
        assert "".join(quote.code.split()) in "".join(program.split()), quote.place
