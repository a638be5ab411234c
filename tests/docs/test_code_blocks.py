"""Every code block of the README and of docs/ is run as its readers would, or says why not."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import anyio
import pytest

from docs_pages import NOT_RUN, PAGES, ROOT, Block, Reader, blocks
from mtpbatch import Engine

LANGUAGES = {"python", "sh"}  # of blocks that are run; others are data, or drawings
EXAMPLES = "examples/"

# How many blocks of a page are not run: each says why, and each new one has to be let in here.
EXCEPTIONS = {
    "docs/live-page.md": 0,
}


def runs(block: Block) -> bool:
    quoted = block.title.startswith(EXAMPLES)
    return block.language in LANGUAGES and not quoted and not block.title.startswith(NOT_RUN)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(runs, blocks(p)))], ids=name_of)
def test_the_blocks_of_a_page_run(
    page: Path, demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(demo_path, "model.gguf")

    async def read() -> None:
        async with Engine.open("model.gguf", n_seq=4, n_threads=1) as engine:
            reader = Reader(tmp_path, engine)
            try:
                for block in filter(runs, blocks(page)):
                    await reader.read(block)
            finally:
                reader.stop_servers()

    anyio.run(read)
