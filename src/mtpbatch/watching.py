"""Who watches an engine: its steps and its requests, told as they go.

:class:`Watcher` is what an app implements, :class:`Watchers` what an engine has. Only whoever has
the engine's turn calls watchers, so calls never overlap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from contextvars import Context
from typing import Protocol

from msgspec import Struct

from mtpbatch._log import log
from mtpbatch.exceptions import InvalidParameterError, MtpBatchError
from mtpbatch.sequence import Sequence
from mtpbatch.types import Completion, SamplingParams, SequenceStep, StepReport, StepResult


class RequestAdmitted(Struct, frozen=True, gc=False):
    """A request that has a sequence id. Nothing in it tells what its texts are.

    ::

        class Queue(mtpbatch.Watcher):
            def admitted(self, request):
                print(request.request_id, "has waited for", request.queued, "s")

        with engine.watch(Queue()):
            await engine.generate("In the beginning", max_tokens=8)
    """

    request_id: str
    """Whose sequence it is."""
    seq_id: int
    """Where it stands in the model's memory, from 0 to n_seq - 1."""
    queued: float
    """Seconds from its submission until it had its first one."""
    prompt_tokens: int
    """Of its prompt."""
    cached_tokens: int
    """Of those, how many did not have to be computed."""


class RequestEnded(Struct, frozen=True):
    """A request that has had its last event.

    ::

        class Failures(mtpbatch.Watcher):
            def ended(self, request):
                if request.error is not None:
                    print(request.request_id, request.error)

        with engine.watch(Failures()):
            await engine.generate("In the beginning", max_tokens=8)
    """

    request_id: str
    """Names it within its engine, and in the log."""
    params: SamplingParams
    """What it asked for."""
    completion: Completion | None
    """What there was by then; None if it failed before it could start."""
    error: MtpBatchError | None
    """What its caller gets instead of the completion."""


class Watcher(Protocol):
    """Learns what an engine does, by :meth:`Engine.watch <mtpbatch.Engine.watch>`.

    Calls come on the engine's thread, or in its place on one that ends requests, and never overlap.
    The next step's plan waits for them: be quick, wait for nothing, and leave the engine alone but
    for its :meth:`~mtpbatch.Engine.stats`. A watcher that raises is logged, as ``watcher.failed``,
    and hears no more. What a subclass does not define, it does not want to hear.

    ::

        class Print(mtpbatch.Watcher):
            def ended(self, request):
                print(request.request_id, request.error or request.completion.finish_reason)

        with engine.watch(Print()):
            await engine.generate("In the beginning", max_tokens=8)
    """

    def admitted(self, request: RequestAdmitted) -> None:
        """A request has a sequence id now: its first, one after a pause, or another than before.

        Those that run when the watcher comes are told first.
        """
        return

    def paused(self, request_id: str) -> None:
        """A request has given up its sequence id, and goes on later.

        Steps that were under way may still be reported.
        """
        return

    def stepped(self, report: StepReport) -> None:
        """The results of a step were taken in. Where nobody follows a request as it is generated,
        those of some steps come together."""
        return

    def ended(self, request: RequestEnded) -> None:
        """A request has ended, wherever it was: exactly once for each that was taken in.

        Called in the context of whoever submitted it (see :mod:`contextvars`).
        """
        return


class _Watched:
    """One watcher, and what it was told of who runs."""

    __slots__ = ("seq_ids", "watcher")

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.seq_ids: dict[str, int | None] = {}


class Watchers:
    """An engine's watchers; false if there are none. Its methods are for who has the turn.

    State: ``_watched``, a tuple that is replaced as a whole, under ``_lock``, as anybody may take a
    watcher off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: tuple[_Watched, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._watched)

    def add(self, watcher: Watcher, running: Iterable[Sequence]) -> ExitStack:
        """Tell a watcher from now on, and of those that run already; closing takes it off.

        Raises :class:`InvalidParameterError` if it is none.
        """
        for name in ("admitted", "paused", "stepped", "ended"):
            if not callable(getattr(watcher, name, None)):
                raise InvalidParameterError(
                    "watcher",
                    f"must have the methods of mtpbatch.Watcher, but {type(watcher).__name__} has "
                    f"no {name}()",
                )
        watched = _Watched(watcher)
        with self._lock:
            self._watched += (watched,)
        self._see(watched, running)
        stack = ExitStack()
        stack.callback(self._remove, watched)
        return stack

    def see(self, running: Iterable[Sequence]) -> None:
        """Tell who has got a sequence id since the last look, and who has given up his."""
        for watched in self._watched:
            self._see(watched, running)

    def stepped(self, result: StepResult, sequences: Iterable[SequenceStep], now: float) -> None:
        """Tell what a step did. Plans without entries have results, but no steps."""
        if not result.entries and result.error is None:
            return
        report = StepReport(
            at=now,
            sequences=tuple(sequences),
            gap_time=result.gap_time,
            draft_time=result.draft_time,
            target_time=result.target_time,
            sample_time=result.sample_time,
            n_target_tokens=result.n_target_tokens,
            error=None if result.error is None else str(result.error),
        )
        for watched in self._watched:
            self._tell(watched, watched.watcher.stepped, report)

    def ended(self, request: RequestEnded, context: Context) -> None:
        """Tell that a request has ended. ``context``: of whoever submitted it."""
        for watched in self._watched:
            watched.seq_ids.pop(request.request_id, None)
            self._tell(watched, context.run, watched.watcher.ended, request)

    def _see(self, watched: _Watched, running: Iterable[Sequence]) -> None:
        before, now = watched.seq_ids, {s.request_id: s.seq_id for s in running}
        if now == before:
            return
        watched.seq_ids = now
        for request_id in before.keys() - now.keys():
            self._tell(watched, watched.watcher.paused, request_id)
        for s in running:
            if s.seq_id is not None and before.get(s.request_id) != s.seq_id:
                queued = 0.0 if s.admitted is None else s.admitted - s.submitted
                request = RequestAdmitted(
                    s.request_id, s.seq_id, queued, len(s.prompt), s.cached_tokens
                )
                self._tell(watched, watched.watcher.admitted, request)

    def _tell(self, watched: _Watched, told: Callable[..., object], *values: object) -> None:
        if watched not in self._watched:  # taken off, or it has raised
            return
        try:
            told(*values)
        except Exception as error:  # the app's
            self._remove(watched)
            log.error("watcher.failed", watcher=watched.watcher, exc_info=error)

    def _remove(self, watched: _Watched) -> None:
        with self._lock:
            self._watched = tuple(other for other in self._watched if other is not watched)
