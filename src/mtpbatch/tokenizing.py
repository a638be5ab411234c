"""Texts to tokens and back, and grammars, for an engine, without holding up event loops.

What is short is done where it is asked for. What is long goes to one thread, in order: llama.cpp
works without the GIL there, and what Python has to do goes in slices. Grammars, which take longer,
have a thread of their own, and so has what is short where another process has to be asked for it.
"""

from __future__ import annotations

import concurrent.futures
import threading
from array import array
from collections import abc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeAlias, TypeVar

from mtpbatch._loops import ThreadEvent
from mtpbatch._slices import encoded, slices
from mtpbatch.backend import Backend
from mtpbatch.exceptions import (
    InternalError,
    InvalidParameterError,
    NativeDiedError,
    PromptTooLongError,
)
from mtpbatch.types import GrammarSource, SamplingParams, has_dry

Prompt: TypeAlias = str | abc.Sequence[int]
"""A text, or the ids of its tokens."""

LONG: Final = 1000  # characters or token ids: to convert more takes too long on an event loop
_NO_IDS: Final = (str, bytes, bytearray, memoryview)  # sequences, but not of token ids

_Result = TypeVar("_Result")


class Tokenizer:
    """A backend's vocabulary at work.

    ``check_open`` raises if the engine serves nobody any more, as it must from before :meth:`close`
    is called. From then on nobody new uses the backend.
    """

    def __init__(self, backend: Backend, check_open: Callable[[], None]) -> None:
        self._backend = backend
        self._check_open = check_open
        self._n_vocab = backend.facts.n_vocab
        self._n_ctx = backend.facts.n_ctx
        # Characters that an event loop has tokenised: none where it would wait for another process.
        self._at_once = LONG if backend.tokenizes_at_once else -1
        self._gate = threading.Condition()
        self._n_users = 0  # of the backend, under the gate
        # Each starts its one thread when the first long text comes, or the first grammar.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mtpbatch-tokenizer")
        self._short = ThreadPoolExecutor(1, thread_name_prefix="mtpbatch-short-texts")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="mtpbatch-grammars")

    # --------------------------------------------------------------- from an event loop

    async def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """The tokens of a text."""
        if not isinstance(text, str):
            kind = type(text).__name__
            raise InvalidParameterError("text", f"must be a str, got {kind}; decode bytes first")
        work = partial(self._tokenize, "text", text, add_special=add_special)
        return work() if len(text) <= self._at_once else await self._on_thread(work, len(text))

    async def detokenize(self, token_ids: abc.Sequence[int]) -> str:
        """The text of tokens."""
        work = partial(self._detokenize, snapshot("token_ids", token_ids))
        n_ids = len(token_ids)
        return work() if n_ids <= self._at_once else await self._on_thread(work, n_ids)

    async def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt, checked."""
        given = prompt if isinstance(prompt, str) else snapshot("prompt", prompt)
        work = partial(self.prompt_ids, given, add_special=True)
        return work() if not self.takes_long(given) else await self._on_thread(work, len(given))

    def takes_long(
        self, prompt: str | tuple[int, ...], params: SamplingParams | None = None
    ) -> bool:
        """Whether it would hold up the event loop to prepare a request."""
        texts = params.bad_words if params else ()
        if isinstance(prompt, str):
            texts = (*texts, prompt)
        if texts and sum(map(len, texts)) > self._at_once:
            return True
        return len(prompt) > LONG or (params is not None and has_dry(params))

    async def _on_thread(self, work: Callable[[], _Result], size: int) -> _Result:
        done = ThreadEvent()
        future = self.submit(work, size)
        future.add_done_callback(lambda _: done.set())
        try:
            await done.wait()
            return future.result()
        except concurrent.futures.CancelledError:  # closing emptied the thread's queue
            self._check_open()
            raise
        finally:
            future.cancel()

    # --------------------------------------------------------------- from any thread

    def submit(
        self, work: Callable[[], _Result], size: int, *, compiles: bool = False
    ) -> Future[_Result]:
        """Have it done on the thread for texts of that size, or on the one for grammars if it
        ``compiles``.

        It is cancelled if the engine closes first.
        """
        with self._gate:
            self._check_open()
            texts = self._thread if size > LONG else self._short
            return (self._compiler if compiles else texts).submit(work)

    def compile_grammar(self, source: GrammarSource) -> object:
        """What the backend makes of it."""
        encoded(source.parameter, source.text)  # else it would be refused in words of its own
        with self._using_backend() as backend:
            return backend.compile_grammar(source)

    def prompt_ids(self, prompt: str | tuple[int, ...], *, add_special: bool) -> tuple[int, ...]:
        """The tokens of a prompt, checked: at least one, and fewer than a sequence holds."""
        token_ids = self.ids("prompt", prompt, add_special=add_special)
        if not token_ids:
            raise InvalidParameterError("prompt", "is empty; it needs at least one token")
        if len(token_ids) >= self._n_ctx:
            raise PromptTooLongError(len(token_ids), self._n_ctx)
        return token_ids

    def ids(
        self, parameter: str, text: str | tuple[int, ...], *, add_special: bool
    ) -> tuple[int, ...]:
        """The tokens of a text, or its ids, checked."""
        if isinstance(text, str):
            return tuple(self._tokenize(parameter, text, add_special=add_special))
        return self.check_ids(parameter, text)

    def check_ids(self, parameter: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids as ints, if all are in the vocabulary."""
        checked: list[int] = []
        for part in slices(len(token_ids)):
            try:
                ids = array("q", token_ids[part])
                if min(ids) >= 0 and max(ids) < self._n_vocab:
                    checked += ids
                    continue
            except (TypeError, OverflowError):
                pass
            self._refuse(parameter, token_ids[part], part.start)
        return tuple(checked)

    def prepare(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Have the backend ready to sample so: :attr:`Admission.bad_words`."""
        if not (params.bad_words or has_dry(params)):
            return ()  # the usual case: there is nothing to prepare
        with self._using_backend() as backend:
            return backend.prepare(params)

    def close(self) -> None:
        """Wait until nobody uses the backend. What waits for the thread is dropped."""
        threads = (self._thread, self._short, self._compiler)
        with self._gate:
            for thread in threads:
                thread.shutdown(wait=False, cancel_futures=True)
            self._gate.wait_for(lambda: not self._n_users)
        for thread in threads:
            thread.shutdown()

    # ------------------------------------------------------------------------ details

    def _tokenize(self, parameter: str, text: str, *, add_special: bool) -> list[int]:
        encoded(parameter, text)  # else the backend would refuse it, by a name of its own
        with self._using_backend() as backend:
            return backend.tokenize(text, add_special=add_special, check=self._check_open)

    def _detokenize(self, token_ids: tuple[int, ...]) -> str:
        token_ids = self.check_ids("token_ids", token_ids)
        with self._using_backend() as backend:
            return backend.detokenize(token_ids)

    @contextmanager
    def _using_backend(self) -> Iterator[Backend]:
        """The backend, which is not closed meanwhile."""
        with self._gate:
            self._check_open()
            self._n_users += 1
        try:
            yield self._backend
        except NativeDiedError:
            self._check_open()  # if the engine has ended meanwhile, that says more
            raise
        finally:
            with self._gate:
                self._n_users -= 1
                self._gate.notify_all()

    def _refuse(self, parameter: str, token_ids: tuple[int, ...], first: int) -> None:
        """Say which of these is wrong."""
        for index, token_id in enumerate(token_ids, first):
            if not hasattr(token_id, "__index__"):
                raise InvalidParameterError(
                    parameter,
                    f"must hold token ids, which are whole numbers; got {token_id!r} at index "
                    f"{index}",
                )
            if not 0 <= token_id < self._n_vocab:
                raise InvalidParameterError(
                    parameter,
                    f"token {token_id} at index {index} is out of range: n_vocab={self._n_vocab}, "
                    f"so that ids go from 0 to {self._n_vocab - 1}; tokenise with this model",
                )
        raise InternalError(f"{parameter}: the checks of its tokens contradict each other")


def snapshot(parameter: str, token_ids: abc.Sequence[int]) -> tuple[int, ...]:
    """The ids as they are now; the caller's sequence may change later on."""
    if not isinstance(token_ids, abc.Sequence) or isinstance(token_ids, _NO_IDS):
        kind = type(token_ids).__name__
        what = "a sequence" if parameter.endswith("_ids") else "a text or a sequence"
        raise InvalidParameterError(
            parameter, f"must be {what} of token ids, such as a list; got {kind}"
        )
    return tuple(token_ids)
