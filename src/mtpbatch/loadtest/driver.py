"""Makes a load on a target, and writes down what comes of each request.

Open-loop requests are sent when they are due, however many are under way. Nothing is summed up
here, and nothing is thrown away.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Final

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from mtpbatch.loadtest.answer import Answer, RequestFailed, Tally
from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop, OpenLoop, Replay
from mtpbatch.loadtest.datasets import Work
from mtpbatch.loadtest.overhead import Overhead
from mtpbatch.loadtest.records import ClientOverhead, Outcome, RequestRecord
from mtpbatch.loadtest.steady import steady_window, whole_run
from mtpbatch.loadtest.targets import Target

_DIGITS: Final = 6  # microseconds
_SAMPLE_PERIOD: Final = 0.5  # seconds
_GIVEN_UP: Final = ("abort", "timeout", "error")
"""Reasons to finish that are no answers."""


class Load(Struct, frozen=True, kw_only=True):
    """What is asked of a target. At least one of the two limits is given."""

    arrivals: Arrivals
    n_requests: int | None
    """How many are sent. None: as many as come within ``seconds``."""
    seconds: float | None
    """How long requests are sent; those under way are waited for. None: until all are sent."""
    timeout: float
    """Seconds after which a request is given up, as an error."""
    warmup: float = 0.0
    """Seconds that are part of the ramp-up in any case."""
    seed: int | str = 0


class Observed(Struct, frozen=True, kw_only=True):
    """What came of it. Times are seconds since the run began."""

    requests: tuple[RequestRecord, ...]
    """In the order in which they were sent."""
    steady: bool
    """Whether there was a steady state to speak of."""
    window: tuple[float, float]
    """That state, or the whole run."""
    samples: tuple[tuple[float, int, int], ...]
    """Time, and how many had had their first chunk, and how many waited for it."""
    overhead: ClientOverhead
    interrupted: bool


class Run:
    """One load on one target, made once. ``tally`` says how it stands while it runs.

    State, on one event loop: ``tally`` is counted by this and by the answers; ``_records`` and
    ``_samples`` only grow; ``stopped`` is for good.
    """

    def __init__(
        self,
        target: Target,
        load: Load,
        work: Iterator[Work],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally()
        self.stopped = False
        self._target = target
        self._load = load
        self._work = work
        self._clock = clock
        self._began = math.nan  # not yet
        self._scope = anyio.CancelScope()
        self._records: list[RequestRecord] = []
        self._samples: list[tuple[float, int, int]] = []

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    def stop(self) -> None:
        """Give up what is under way. What there is by then is what was observed."""
        self.stopped = True
        self._scope.cancel()

    async def __call__(self) -> Observed:
        """Make the load, and wait for all answers."""
        self._began = self._clock()
        overhead = Overhead(self._clock)
        async with anyio.create_task_group() as watchers:
            watchers.start_soon(overhead.watch)
            watchers.start_soon(self._sample)
            with self._scope:
                async with anyio.create_task_group() as group:
                    match self._load.arrivals:
                        case ClosedLoop() as arrivals:
                            await self._closed(group, arrivals)
                        case OpenLoop() | Replay() as arrivals:
                            await self._open(group, arrivals)
            watchers.cancel_scope.cancel()
        requests = tuple(sorted(self._records, key=lambda record: record.index))
        steady = steady_window(requests, self._load.arrivals, self._load.warmup)
        return Observed(
            requests=requests,
            steady=steady is not None,
            window=steady or whole_run(requests),
            samples=tuple(self._samples),
            overhead=overhead.measured(each.sent - each.scheduled for each in requests),
            interrupted=self.stopped,
        )

    # -------------------------------------------------------------------- sending

    async def _open(self, group: TaskGroup, arrivals: OpenLoop | Replay) -> None:
        for moment in arrivals.times(random.Random(f"{self._load.seed} arrivals")):
            if self._over(moment):
                return
            # The prompt is made half-way there: the last request is on its way by then.
            await anyio.sleep(max(0.0, moment - self.elapsed) / 2)
            work = next(self._work, None)
            if work is None:
                return
            await anyio.sleep(max(0.0, moment - self.elapsed))
            group.start_soon(self._request, self.tally.sent, work, moment)
            self.tally.sent += 1

    async def _closed(self, group: TaskGroup, arrivals: ClosedLoop) -> None:
        for client in range(arrivals.most):
            group.start_soon(self._client, arrivals, client)

    async def _client(self, arrivals: ClosedLoop, client: int) -> None:
        await anyio.sleep(max(0.0, arrivals.joins(client) - self.elapsed))
        while not (self._over(due := self.elapsed) or arrivals.leaves(client, due)):
            work = next(self._work, None)
            if work is None:
                return
            index = self.tally.sent
            self.tally.sent += 1
            await self._request(index, work, due)

    def _over(self, moment: float) -> bool:
        """Whether nothing is sent any more at a moment."""
        load = self._load
        if load.n_requests is not None and self.tally.sent >= load.n_requests:
            return True
        return load.seconds is not None and moment >= load.seconds

    async def _request(self, index: int, work: Work, scheduled: float) -> None:
        scope = anyio.move_on_after(self._load.timeout)
        answer = Answer(self._clock, self.tally, work.cancel_after, scope.cancel)
        outcome: Outcome = "cancelled"
        error: str | None = "interrupted"  # unless it gets to an end of its own
        try:
            with scope:
                outcome, error = await self._ask(index, work, answer)
            if answer.enough:
                outcome, error = "cancelled", None
            elif scope.cancelled_caught:
                outcome, error = "error", "timeout"
                self.tally.fail("timeout", f"no end within {self._load.timeout:g} s")
        finally:
            self.tally.begun += not answer.times
            self.tally.ended += 1
            self.tally.cancelled += outcome == "cancelled"
            self._records.append(self._record(index, work, scheduled, answer, outcome, error))

    async def _ask(self, index: int, work: Work, answer: Answer) -> tuple[Outcome, str | None]:
        try:
            await self._target.ask(index, work, answer)
        except RequestFailed as failure:
            self.tally.fail(failure.kind, failure.detail)
            return "error", failure.kind
        if answer.finish_reason in _GIVEN_UP:
            self.tally.fail(answer.finish_reason, "the server gave the request up")
            return "error", answer.finish_reason
        return "ok", None

    def _record(
        self,
        index: int,
        work: Work,
        scheduled: float,
        answer: Answer,
        outcome: Outcome,
        error: str | None,
    ) -> RequestRecord:
        began = self._began
        # Of an answer that was given up, those count that were received.
        told = answer.output_tokens if outcome == "ok" else None
        times = (round(time - began, _DIGITS) for time in answer.times)
        return RequestRecord(
            index=index,
            scheduled=round(scheduled, _DIGITS),
            sent=round(answer.sent - began, _DIGITS),
            prompt_tokens=_known(answer.prompt_tokens, work.prompt_tokens),
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.received if told is None else told,
            chunks=tuple(zip(times, answer.tokens, strict=True)),
            ended=round(self.elapsed, _DIGITS),
            outcome=outcome,
            finish_reason=answer.finish_reason,
            error=error,
            drafted=answer.drafted,
            accepted=answer.accepted,
            steps=answer.steps,
        )

    # ------------------------------------------------------------------- watching

    async def _sample(self) -> None:
        while True:
            self._samples.append(
                (round(self.elapsed, _DIGITS), self.tally.running, self.tally.waiting)
            )
            await anyio.sleep(_SAMPLE_PERIOD)


def _known(told: int | None, expected: int | None) -> int | None:
    return expected if told is None else told
