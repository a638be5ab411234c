"""Embeddings for many tasks: a thread that packs their texts into the same decodes.

Texts go through in the order in which they came, whoever asked. The thread starts with the first
of them, which also opens the embedder: who never asks pays nothing.
"""

from __future__ import annotations

import threading
from collections import abc
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from mtpbatch._loops import ThreadEvent
from mtpbatch.backend import Embedder
from mtpbatch.exceptions import (
    InternalError,
    InvalidParameterError,
    MtpBatchError,
    NativeDiedError,
)
from mtpbatch.types import Embeddings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Text: TypeAlias = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


class EmbeddingThread:
    """Runs an embedder. ``embed`` may be called on any event loop.

    ``open_embedder`` and ``tokenize`` are called on the thread. What either raises ends the
    request that needed it; a decode that fails ends all that are under way, and the embedder,
    which the next request opens again.
    """

    def __init__(
        self, open_embedder: Callable[[], Embedder], tokenize: Callable[[Text], abc.Sequence[int]]
    ) -> None:
        self._open = open_embedder
        self._tokenize = tokenize
        self._changed = threading.Condition()  # guards what follows, down to the thread
        self._waiting: set[_Request] = set()  # somebody waits for these
        self._incoming: list[_Request] = []
        self._end: MtpBatchError | None = None  # of all requests since
        self._thread: threading.Thread | None = None
        self._embedder: Embedder | None = None  # from here on the thread's own
        self._requests: list[_Request] = []  # begun and not ended
        self._owners: dict[int, _Request] = {}  # of the texts they wait for

    async def embed(self, texts: abc.Sequence[Text], *, normalize: bool) -> Embeddings:
        """Wait for the embeddings of texts. Who is cancelled costs no decode that has not begun."""
        request = _Request(texts)
        with self._changed:
            if self._end is not None:
                raise self._end
            if self._thread is None:
                # A daemon for the reason of the engine's thread, which closes it.
                thread = threading.Thread(target=self._run, name="mtpbatch-embedder", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.add(request)
            self._incoming.append(request)
            self._changed.notify()
        try:
            await request.ended.wait()
        finally:
            request.cancelled = True
            with self._changed:
                self._waiting.discard(request)
        return request.result(normalize)

    def stop(self, end: MtpBatchError) -> None:
        """End all requests with an error, and the thread after the decode under way."""
        with self._changed:
            self._end = end
            for request in self._waiting:
                request.end(end)
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread, which closes the embedder."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._take_in():
            try:
                self._step()
            except Exception as error:
                self._fail(error)
        self._drop_embedder()

    def _take_in(self) -> bool:
        """Wait for something to do, and begin what has come; ``False``: it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._incoming or self._requests or self._end)
            incoming, self._incoming = self._incoming, []
        for request in incoming:
            try:
                self._begin(request)
            except Exception as error:
                request.end(error)
        return self._end is None

    def _begin(self, request: _Request) -> None:
        if self._embedder is None:
            self._embedder = self._open()
        n_ctx = self._embedder.n_ctx
        texts = []
        for index, text in enumerate(request.texts):
            if self._end is not None:
                raise self._end
            if request.cancelled:
                return
            tokens = self._tokenize(text)
            if not tokens:
                raise InvalidParameterError(
                    "texts", f"the text at index {index} is empty; leave it out"
                )
            if len(tokens) > n_ctx:
                raise InvalidParameterError(
                    "texts",
                    f"the text at index {index} has {len(tokens)} tokens, but a sequence holds "
                    f"n_ctx={n_ctx}; shorten it or open the engine with a larger n_ctx",
                )
            texts.append(tokens)
        with ExitStack() as undo:  # no text stays in the embedder without an owner
            tickets = self._add(texts, undo)
            request.begin(tickets, self._embedder.n_embd, sum(map(len, texts)))
            undo.pop_all()
        if tickets:
            self._requests.append(request)
            self._owners.update(dict.fromkeys(tickets, request))

    def _add(self, texts: list[abc.Sequence[int]], undo: ExitStack) -> list[int]:
        """Their numbers. An embedder that died while it had nothing to do is nobody's loss."""
        try:
            return self._numbers(texts, undo)
        except NativeDiedError:
            if self._requests:
                raise
        undo.pop_all()
        self._drop_embedder()
        self._embedder = self._open()
        return self._numbers(texts, undo)

    def _numbers(self, texts: list[abc.Sequence[int]], undo: ExitStack) -> list[int]:
        embedder = self._embedder
        assert embedder is not None
        tickets = []
        for tokens in texts:
            tickets.append(embedder.add(tokens))
            undo.callback(embedder.drop, tickets[-1])
        return tickets

    def _step(self) -> None:
        embedder = self._embedder
        if embedder is None:
            return
        for request in [request for request in self._requests if request.cancelled]:
            for ticket in request.waits_for:
                embedder.drop(ticket)
                del self._owners[ticket]
            self._requests.remove(request)
        for ticket, vector in embedder.step():
            request = self._owners.pop(ticket)
            request.take_in(ticket, vector)
            if not request.waits_for:
                self._requests.remove(request)

    def _fail(self, error: BaseException) -> None:
        for request in self._requests:
            request.end(error)
        self._requests.clear()
        self._owners.clear()
        self._drop_embedder()

    def _drop_embedder(self) -> None:
        embedder, self._embedder = self._embedder, None
        if embedder is not None:
            embedder.close()


class _Request:
    """One call, and what has come of it."""

    def __init__(self, texts: abc.Sequence[Text]) -> None:
        self.texts = texts
        self.cancelled = False
        self.ended = ThreadEvent()
        self._error: BaseException | None = None
        self.waits_for: dict[int, int] = {}  # texts' indices, by the embedder's numbers
        self._n_tokens = 0
        self._vectors: npt.NDArray[np.float32]

    def begin(self, tickets: list[int], n_embd: int, n_tokens: int) -> None:
        import numpy as np  # with the first request: importing the library does not need it

        self._vectors = np.empty((len(self.texts), n_embd), np.float32)
        self._n_tokens = n_tokens
        self.waits_for = {ticket: index for index, ticket in enumerate(tickets)}
        if not tickets:
            self.ended.set()

    def take_in(self, ticket: int, vector: npt.NDArray[np.float32]) -> None:
        self._vectors[self.waits_for.pop(ticket)] = vector
        if not self.waits_for:
            self.ended.set()

    def end(self, error: BaseException) -> None:
        if self.ended.is_set():
            return
        if not isinstance(error, MtpBatchError):
            failure = InternalError(f"embedding failed: {error!r}")
            failure.__cause__ = error
            error = failure
        self._error = error
        self.ended.set()

    def result(self, normalize: bool) -> Embeddings:
        if self._error is not None:
            raise self._error
        vectors = self._vectors
        if normalize:
            import numpy as np

            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors /= np.where(lengths > 0, lengths, 1)
        return Embeddings(vectors=vectors, prompt_tokens=self._n_tokens)
