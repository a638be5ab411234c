"""The embedder's thread: who shares decodes, and every way for a request to end.

Decodes are held at a gate, so that nothing here depends on time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import anyio
import numpy as np
import numpy.typing as npt
import pytest

from mtpbatch import (
    ContextError,
    DecodeError,
    EngineClosedError,
    InternalError,
    InvalidParameterError,
    NativeDiedError,
)
from mtpbatch._loops import ThreadEvent
from mtpbatch.embedding import EmbeddingThread
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.types import Embeddings
from patience import until

pytestmark = pytest.mark.anyio

END = EngineClosedError("the engine was closed")


class HeldEmbedder:
    """Embeds two texts in each decode: how many tokens a text has, and its first one."""

    n_ctx = 8
    n_embd = 2

    def __init__(self) -> None:
        self.texts: dict[int, Sequence[int]] = {}
        self.decodes: list[list[Sequence[int]]] = []
        self.begun = ThreadEvent()
        self.gate = threading.Event()
        self.error: Exception | None = None
        self.closed = False
        self.dead = False
        self._next = 0

    def add(self, tokens: Sequence[int]) -> int:
        if self.dead:
            raise NativeDiedError(-9)
        self._next += 1
        self.texts[self._next] = tokens
        return self._next

    def drop(self, ticket: int) -> None:
        del self.texts[ticket]

    def step(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        tickets = list(self.texts)[:2]
        if not tickets:
            return []
        self.begun.set()
        assert self.gate.wait(30)
        if self.error:
            raise self.error
        texts = [(ticket, self.texts.pop(ticket)) for ticket in tickets]
        self.decodes.append([text for _, text in texts])
        return [(ticket, np.array([len(text), text[0]], np.float32)) for ticket, text in texts]

    def close(self) -> None:
        self.closed = True


class Embedders:
    """Opens embedders, and is told what became of them."""

    def __init__(self) -> None:
        self.ready = HeldEmbedder()
        self.opened: list[HeldEmbedder] = []
        self.errors: list[Exception] = []

    def open(self) -> HeldEmbedder:
        if self.errors:
            raise self.errors.pop()
        embedder, self.ready = self.ready, HeldEmbedder()
        self.opened.append(embedder)
        return embedder


@pytest.fixture
def embedders() -> Embedders:
    return Embedders()


@pytest.fixture
def thread(embedders: Embedders) -> Iterator[EmbeddingThread]:
    thread = EmbeddingThread(
        embedders.open, lambda text: list(text.encode()) if isinstance(text, str) else text
    )
    yield thread
    for embedder in embedders.opened:
        embedder.gate.set()
    thread.stop(END)
    thread.join()
    assert all(embedder.closed for embedder in embedders.opened)
    assert "mtpbatch-embedder" not in [t.name for t in threading.enumerate()]


def rows(embeddings: Embeddings) -> list[list[float]]:
    return embeddings.vectors.tolist()  # type: ignore[no-any-return]


async def test_texts_and_token_ids_come_back_in_order(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedders.ready.gate.set()
    done = await thread.embed(["abc", (7, 8), "d"], normalize=False)
    assert rows(done) == [[3, 97], [2, 7], [1, 100]]
    assert done.vectors.dtype == np.float32
    assert done.prompt_tokens == 6
    assert [len(decode) for decode in embedders.opened[0].decodes] == [2, 1]


async def test_normalised_vectors_have_the_length_one(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedders.ready.gate.set()
    done = await thread.embed([(4, 0, 0), (0,)], normalize=True)
    np.testing.assert_allclose(done.vectors, np.array([[0.6, 0.8], [1, 0]]), rtol=1e-6)


async def test_a_vector_of_zeros_stays_one(thread: EmbeddingThread, embedders: Embedders) -> None:
    embedder = embedders.ready
    embedder.gate.set()
    embedder.step = lambda: [(t, np.zeros(2, np.float32)) for t in [*embedder.texts]]  # type: ignore[method-assign]
    assert rows(await thread.embed([(1,)], normalize=True)) == [[0, 0]]


async def test_no_texts_have_no_vectors(thread: EmbeddingThread) -> None:
    done = await thread.embed([], normalize=True)
    assert done.vectors.shape == (0, 2)
    assert done.prompt_tokens == 0


async def test_callers_share_decodes(thread: EmbeddingThread, embedders: Embedders) -> None:
    embedder = embedders.ready
    async with anyio.create_task_group() as group:
        found: dict[int, Embeddings] = {}

        async def embed(*tokens: int) -> None:
            found[tokens[0]] = await thread.embed([(t,) for t in tokens], normalize=False)

        group.start_soon(embed, 1)
        await embedder.begun.wait()
        # All of these come while the first decode is under way.
        for n_before, tokens in enumerate(((2,), (3, 4), (5,))):
            group.start_soon(embed, *tokens)
            while len(thread._incoming) == n_before:
                await anyio.lowlevel.checkpoint()
        embedder.gate.set()
    assert embedder.decodes == [[(1,)], [(2,), (3,)], [(4,), (5,)]]
    assert rows(found[3]) == [[1, 3], [1, 4]]


async def test_who_is_cancelled_leaves_before_the_next_decode(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedder = embedders.ready
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                await embedder.begun.wait()
                scope.cancel()

            group.start_soon(cancel)
            await thread.embed([(i,) for i in range(1, 7)], normalize=True)
    assert scope.cancelled_caught
    embedder.gate.set()
    assert rows(await thread.embed([(9,)], normalize=False)) == [[1, 9]]
    assert embedder.decodes == [[(1,), (2,)], [(9,)]]


async def test_texts_that_cannot_be_embedded(thread: EmbeddingThread, embedders: Embedders) -> None:
    embedders.ready.gate.set()
    with pytest.raises(InvalidParameterError, match="texts: the text at index 1 is empty"):
        await thread.embed(["a", ""], normalize=True)
    with pytest.raises(InvalidParameterError, match=r"index 0 has 9 tokens, .* n_ctx=8"):
        await thread.embed(["123456789"], normalize=True)
    assert not embedders.opened[0].decodes
    assert rows(await thread.embed(["12345678"], normalize=False)) == [[8, 49]]


async def test_an_embedder_that_cannot_be_opened_is_tried_again(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedders.ready.gate.set()
    embedders.errors = [RuntimeError("odd"), ContextError("no memory")]
    with pytest.raises(ContextError, match="no memory"):
        await thread.embed(["a"], normalize=True)
    with pytest.raises(InternalError, match="odd"):
        await thread.embed(["a"], normalize=True)
    assert rows(await thread.embed(["a"], normalize=False)) == [[1, 97]]


async def test_a_failed_decode_ends_all_that_are_under_way(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedder = embedders.ready
    embedder.gate.set()
    embedder.error = DecodeError("scripted")
    with pytest.raises(DecodeError, match="scripted"):
        await thread.embed(["a", "b", "c"], normalize=True)
    embedders.ready.gate.set()
    assert rows(await thread.embed(["a"], normalize=False)) == [[1, 97]]
    assert embedder.closed


async def test_an_embedder_that_died_without_work_is_opened_again(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedder = embedders.ready
    embedder.gate.set()
    await thread.embed(["a"], normalize=True)
    embedder.dead = True
    embedders.ready.gate.set()
    assert rows(await thread.embed(["b"], normalize=False)) == [[1, 98]]
    assert embedder.closed


async def test_a_death_ends_those_who_are_under_way_alone(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedder = embedders.ready
    embedder.error = NativeDiedError(-9)

    async def embed(text: str) -> None:
        with pytest.raises(NativeDiedError):
            await thread.embed([text], normalize=True)

    async with anyio.create_task_group() as group:
        group.start_soon(embed, "a")
        await embedder.begun.wait()
        embedder.dead = True
        embedder.gate.set()
    embedders.ready.gate.set()
    assert rows(await thread.embed(["b"], normalize=False)) == [[1, 98]]
    assert len(embedders.opened) == 2


@pytest.mark.parametrize("short", ["texts", "vectors"])
async def test_who_finds_no_memory_to_begin_leaves_nothing_to_embed(
    thread: EmbeddingThread,
    embedders: Embedders,
    monkeypatch: pytest.MonkeyPatch,
    short: str,
) -> None:
    embedder = embedders.ready
    add, empty = embedder.add, np.empty

    def add_text(tokens: Sequence[int]) -> int:
        if tokens == (8,):
            raise MemoryError
        return add(tokens)

    def empty_vectors(shape: tuple[int, int], dtype: type[np.float32]) -> object:
        if shape[0] == 2:
            raise MemoryError
        return empty(shape, dtype)

    async def fail() -> None:
        with pytest.raises(InternalError, match="MemoryError"):
            await thread.embed([(7,), (8,)], normalize=False)

    async def go_on(first: int) -> None:
        texts = [(first + i,) for i in range(3)]
        assert len(rows(await thread.embed(texts, normalize=False))) == 3

    async with anyio.create_task_group() as group:
        group.start_soon(go_on, 1)
        await embedder.begun.wait()
        if short == "texts":
            monkeypatch.setattr(embedder, "add", add_text)
        else:
            monkeypatch.setattr(np, "empty", empty_vectors)
        group.start_soon(fail)
        await until(lambda: len(thread._incoming) == 1)
        group.start_soon(go_on, 4)
        await until(lambda: len(thread._incoming) == 2)
        embedder.gate.set()
    assert embedder.decodes == [[(1,), (2,)], [(3,), (4,)], [(5,), (6,)]]


async def test_stopping_ends_who_waits_and_the_thread_after_its_decode(
    thread: EmbeddingThread, embedders: Embedders
) -> None:
    embedder = embedders.ready

    async def stop() -> None:
        await embedder.begun.wait()
        thread.stop(END)

    async with anyio.create_task_group() as group:
        group.start_soon(stop)
        with pytest.raises(EngineClosedError):  # although the decode does not end
            await thread.embed([(i,) for i in range(1, 7)], normalize=True)
    embedder.gate.set()
    thread.join()
    assert len(embedder.decodes) == 1
    assert embedder.closed
    with pytest.raises(EngineClosedError):
        await thread.embed(["a"], normalize=True)


# --------------------------------------------------------------------------- the engine


async def test_the_engine_embeds() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        done = await engine.embed(
            ["the old tower", await engine.tokenize("the old")], normalize=False
        )
        again = await engine.embed(["the old"], normalize=False)
    assert done.vectors.shape == (2, 8)
    assert done.vectors.sum() == done.prompt_tokens
    np.testing.assert_array_equal(done.vectors[1:], again.vectors)
    with pytest.raises(EngineClosedError):
        await engine.embed(["the old"])


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ("one text", "must be a list of texts, got one str"),
        (5, "must be a list of texts, got one int"),
        ([None], "must be a text or a sequence of token ids, such as a list; got NoneType"),
        ([[10**6]], "is out of range"),
        (["\ud800"], "not valid Unicode"),
        (["a" * 1000], "has 1000 tokens, but a sequence holds n_ctx=256"),
    ],
)
async def test_the_engine_refuses_by_name(texts: object, reason: str) -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParameterError, match=f"^texts: .*{reason}"):
            await engine.embed(texts)  # type: ignore[arg-type]
