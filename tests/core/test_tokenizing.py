"""Long texts and prompts of many token ids: off the event loop, and in slices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from mtpbatch import EngineClosedError, InvalidParameterError, PromptTooLongError, _slices
from mtpbatch._slices import SLICE, slices
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.tokenizing import LONG
from patience import until

pytestmark = pytest.mark.anyio

TOKENIZER = "mtpbatch-tokenizer_0"


class Recording(ScriptedBackend):
    """Remembers on which threads texts are turned to tokens and back, and can make them wait."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.threads: list[str] = []
        self.begun = threading.Event()
        self.proceed = threading.Event()
        self.proceed.set()

    def tokenize(self, text: str, **options: Any) -> list[int]:
        self._note(text)
        return super().tokenize(text, **options)

    def detokenize(self, token_ids: Any) -> str:
        self._note(token_ids)
        return super().detokenize(token_ids)

    def _note(self, what: Any) -> None:
        self.threads.append(threading.current_thread().name)
        if len(what) > LONG:
            self.begun.set()
            assert self.proceed.wait(30)


class Id:
    """A token id that tells where it is looked at."""

    looks: list[str]

    def __index__(self) -> int:
        self.looks.append(threading.current_thread().name)
        return 65


@pytest.fixture
def looks() -> list[str]:
    Id.looks = []
    return Id.looks


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch, looks: list[str]) -> list[int]:
    """How much had been looked at whenever the GIL was given up."""
    taken: list[int] = []

    class Time:
        @staticmethod
        def sleep(seconds: float) -> None:
            taken.append(len(looks))
            time.sleep(seconds)

    monkeypatch.setattr(_slices, "time", Time)
    return taken


@pytest.mark.parametrize("n", [0, 1, SLICE, SLICE + 1, 3 * SLICE, 10 * SLICE + 7])
def test_slices_join_and_are_short(n: int) -> None:
    items = range(n)
    parts = [items[part] for part in slices(n)]
    assert [item for part in parts for item in part] == list(items)
    assert all(0 < len(part) <= SLICE for part in parts)


async def test_short_texts_are_done_at_once_and_long_ones_on_a_thread() -> None:
    backend = Recording(n_ctx=LONG)
    here = threading.current_thread().name
    async with open_scripted_engine(backend) as engine:
        for size, thread in [(LONG, here), (LONG + 1, TOKENIZER)]:
            text = "x" * size
            token_ids = await engine.tokenize(text)
            assert await engine.detokenize(token_ids) == text
            assert backend.threads == [thread, thread]
            backend.threads.clear()


async def test_many_token_ids_are_looked_at_on_the_thread_in_slices(
    looks: list[str], naps: list[int]
) -> None:
    backend = Recording(n_ctx=100_000)
    prompt: list[Any] = [Id() for _ in range(3 * SLICE + 5)]
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit(prompt, max_tokens=1)
        prompt.clear()  # what counts is how it was
        completion = await generation
    assert completion.prompt_token_ids == (65,) * (3 * SLICE + 5)
    assert set(map(type, completion.prompt_token_ids)) == {int}
    assert set(looks) == {TOKENIZER}
    assert naps == [SLICE, 2 * SLICE, 3 * SLICE]


async def test_a_few_token_ids_are_looked_at_at_once(looks: list[str]) -> None:
    few: list[Any] = [Id()] * LONG
    async with open_scripted_engine(Recording(n_ctx=2 * LONG)) as engine:
        await engine.generate(few, max_tokens=1)
    assert set(looks) == {threading.current_thread().name}


@pytest.mark.parametrize(
    ("last", "words"),
    [(270, "token 270 at index 9000"), ("x", "'x' at index 9000"), (-1, "token -1 at index 9000")],
)
async def test_a_bad_id_among_many_is_named(last: Any, words: str) -> None:
    async with open_scripted_engine(ScriptedBackend(n_ctx=10**5)) as engine:
        generation = engine.submit([*[65] * 9000, last])
        with pytest.raises(InvalidParameterError, match=words):
            await generation
        with pytest.raises(InvalidParameterError, match=f"^token_ids: .*{words}"):
            await engine.detokenize([*[65] * 9000, last])


async def test_a_surrogate_far_into_a_text_is_named() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParameterError, match=r"^text: .*'\\ud800' at index 9000"):
            await engine.tokenize("x" * 9000 + "\ud800")


async def test_a_prompt_of_too_many_ids_is_refused() -> None:
    async with open_scripted_engine(ScriptedBackend(n_ctx=256)) as engine:
        with pytest.raises(PromptTooLongError, match="2000 tokens"):
            await engine.generate([65] * 2000)


@pytest.mark.parametrize("work", ["tokenize", "detokenize"])
async def test_who_waits_for_a_long_text_can_be_cancelled(work: str) -> None:
    backend = Recording()
    backend.proceed.clear()
    async with open_scripted_engine(backend) as engine:
        async with anyio.create_task_group() as group:
            if work == "tokenize":
                group.start_soon(engine.tokenize, "x" * 2000)
            else:
                group.start_soon(engine.detokenize, [65] * 2000)
            await until(backend.begun.is_set)
            group.cancel_scope.cancel()
        backend.proceed.set()
        assert await engine.tokenize("x" * 2000) == [ord("x")] * 2000


async def test_closing_ends_the_wait_for_a_long_text() -> None:
    backend = Recording()
    backend.proceed.clear()
    async with open_scripted_engine(backend) as engine:
        refused = 0

        async def tokenize() -> None:
            nonlocal refused
            try:
                await engine.tokenize("y" * 2000)
            except EngineClosedError:
                refused += 1

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(tokenize)
            await until(backend.begun.is_set)
            group.start_soon(engine.aclose)
            await until(lambda: refused == 2)  # those that had not begun
            assert not backend.closed
            backend.proceed.set()
        assert refused == 2
    assert backend.closed


async def test_closing_ends_the_work_on_a_text_between_its_pieces() -> None:
    class InPieces(Recording):
        def tokenize(self, text: str, **options: Any) -> list[int]:
            tokens = super().tokenize(text, **options)
            options["check"]()
            return tokens

    backend = InPieces()
    backend.proceed.clear()
    async with open_scripted_engine(backend) as engine:
        refused: list[bool] = []

        async def tokenize() -> None:
            with pytest.raises(EngineClosedError):
                await engine.tokenize("y" * 2000)
            refused.append(backend.closed)

        async with anyio.create_task_group() as group:
            group.start_soon(tokenize)
            await until(backend.begun.is_set)
            group.start_soon(engine.aclose)
            await until(lambda: engine.closed)
            backend.proceed.set()
        assert len(refused) == 1


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("mtpbatch")]
