"""What an engine would do under a load: the real scheduler, on a virtual clock.

Discrete events: requests come, and steps end. In between nothing happens, so the clock jumps from
one to the next. Python is taken to cost no time; else all is as between
:class:`~mtpbatch.Engine` and its executor: a step begins as the one before it ends, with the plan
that was there by then, and results are taken in while it runs.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from array import array
from collections import abc
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

from msgspec import Struct

from mtpbatch.exceptions import InternalError, InvalidParameterError, PromptTooLongError
from mtpbatch.scheduler import Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import draft_wish
from mtpbatch.testing.simulated import CostModel, SimulatedExecutor
from mtpbatch.testing.workload import (
    N_LUCK,
    ClosedLoop,
    Luck,
    OpenLoop,
    RequestKind,
    luck_of,
)
from mtpbatch.text import TextAssembler
from mtpbatch.types import (
    Completion,
    EngineConfig,
    EngineStats,
    ModelFacts,
    SamplingParams,
    Speculation,
    parse,
)

MakeScheduler: TypeAlias = Callable[[ModelFacts], Scheduler]

_CHECK_EVERY: Final = 10_000  # instants, of which one is checked from end to end
_NO_TEXT: Final = (b"",)  # what its tokens say; there is but one


class Summary(Struct, frozen=True):
    """How a figure is distributed over requests.

    ::

        kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
        cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
        report = simulate(OpenLoop(steady(2.0)), [kind], engine.model, cost, n_requests=100)
        waited = report.first_token
        assert waited.p50 <= waited.p90 <= waited.p99 <= waited.most
    """

    mean: float
    """In the unit of the figure, as all of these."""
    p50: float
    """The median."""
    p90: float
    """What nine of ten do not exceed."""
    p99: float
    """What 99 of 100 do not exceed."""
    most: float
    """The greatest."""


class Sample(Struct, frozen=True):
    """A moment, over all engines.

    ::

        kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
        cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
        report = simulate(OpenLoop(steady(2.0)), [kind], engine.model, cost, n_requests=100)
        print(max(sample.waiting for sample in report.samples), "requests waited at most")
    """

    time: float
    """Seconds of the virtual clock."""
    running: int
    """Requests that have a sequence id."""
    waiting: int
    """Requests in the queues."""
    tokens: int
    """Generated since the sample before."""


class SimulationReport(Struct, frozen=True, kw_only=True):
    """What came of a simulation. Durations are seconds of the virtual clock.

    ::

        kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
        cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
        report = simulate(OpenLoop(steady(2.0)), [kind], engine.model, cost, n_requests=100)
        assert report.generated_tokens == 100 * 100
        print(report.throughput, report.utilisation, report.first_token.p99)
    """

    requests: int
    """How many have ended: all."""
    prompt_tokens: int
    """Fed as prompts: without those of snapshots, once more after a pause."""
    generated_tokens: int
    """Of all requests, accepted drafts included."""
    drafted: int
    """Tokens drafted by the MTP head."""
    accepted: int
    """Of those, how many the model agreed with."""
    steps: int
    """Decodes of the model, over all engines."""
    seconds: float
    """Until the last step ended."""
    busy: tuple[float, ...]
    """In which steps ran, of each engine."""
    queued: Summary
    """From submission until a sequence id took the request."""
    first_token: Summary
    """From submission."""
    per_token: Summary
    """From the first token on, for each further one. Of requests that have any."""
    total: Summary
    """From submission to the last token."""
    samples: tuple[Sample, ...]
    """Every ``sample_every`` seconds."""
    stats: tuple[EngineStats, ...]
    """Of each engine, at the end."""

    @property
    def throughput(self) -> float:
        """Generated tokens per second; 0 if no time has passed."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def utilisation(self) -> float:
        """The share of the time in which steps ran, the mean over all engines; 0 if none passed."""
        return sum(self.busy) / len(self.busy) / self.seconds if self.seconds else 0.0


def simulate(
    arrivals: OpenLoop | ClosedLoop,
    kinds: abc.Sequence[RequestKind],
    facts: ModelFacts,
    cost: CostModel,
    *,
    n_requests: int | None = None,
    until: float | None = None,
    speculation: Speculation = "auto",
    make_scheduler: MakeScheduler = Scheduler,
    n_engines: int = 1,
    seed: int = 0,
    sample_every: float = 1.0,
) -> SimulationReport:
    """Play requests until all have ended.

    They stop coming after ``n_requests``, or ``until`` a time; one of both must be given.
    ``facts`` are those of the engine that is played (:attr:`mtpbatch.Engine.model`), ``cost`` says
    how long its steps take, and ``speculation`` is what ``EngineConfig`` has. Of several engines,
    each with a scheduler of its own, a request goes to the one that has the fewest.

    The same arguments give the same report. The state of the schedulers is checked now and then;
    whatever is wrong raises :class:`~mtpbatch.InternalError`.

    ::

        kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
        cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
        load = OpenLoop(steady(2.0))
        for n in (1, 2):
            report = simulate(load, [kind], engine.model, cost, n_requests=100, n_engines=n)
            print(n, "engines:", report.first_token.p99)
    """
    if n_requests is None and until is None:
        raise InvalidParameterError("n_requests", "or until must be given: when do requests stop?")
    if n_requests is not None and n_requests < 1:
        raise InvalidParameterError("n_requests", f"must be at least 1, got {n_requests}")
    if until is not None and not until > 0:
        raise InvalidParameterError("until", f"must be a time after 0, got {until}")
    if not kinds:
        raise InvalidParameterError("kinds", "must have at least one kind of requests")
    if n_engines < 1:
        raise InvalidParameterError("n_engines", f"must be at least 1, got {n_engines}")
    if not sample_every > 0:
        raise InvalidParameterError("sample_every", f"must be a time, got {sample_every}")
    left = sys.maxsize if n_requests is None else n_requests
    requests = _Requests(kinds, facts, speculation, seed, left)
    source: _Source
    if isinstance(arrivals, OpenLoop):
        source = _OpenSource(arrivals, random.Random(f"arrivals {seed}"))
    else:
        source = _ClosedSource(arrivals)
    engines = [_Engine(facts, cost, make_scheduler) for _ in range(n_engines)]
    end = math.inf if until is None else until
    return _Simulation(engines, requests, source, end, sample_every).run()


class _Simulation:
    """One run.

    State: who is played, ``_steps``, which says when their steps end, ``_n_held``, which says how
    many requests each engine has, and the figures of the report.
    """

    def __init__(
        self,
        engines: list[_Engine],
        requests: _Requests,
        source: _Source,
        until: float,
        sample_every: float,
    ) -> None:
        self._engines = engines
        self._requests = requests
        self._source = source
        self._until = until
        self._steps: list[tuple[float, int]] = []  # a heap
        self._n_held = [0] * len(engines)
        self._n_followed = [0] * len(
            engines
        )  # steps of each engine that are in ``_steps`` or ended
        self._sample_every = sample_every
        self._samples: list[Sample] = []
        self._n_sampled = 0  # tokens
        self._queued = array("d")
        self._first_token = array("d")
        self._per_token = array("d")
        self._total = array("d")

    def run(self) -> SimulationReport:
        """Play from the first request to the end of the last step."""
        now = 0.0
        for instant in itertools.count(1):
            then = min(self._next_request(), self._steps[0][0] if self._steps else math.inf)
            if then == math.inf:
                break
            while then >= (moment := self._sample_every * (len(self._samples) + 1)):
                self._sample(moment)
            now = then
            self._play(now)
            if instant % _CHECK_EVERY == 0:
                self._check()
        self._check()
        return self._report(now)

    def _next_request(self) -> float:
        time = self._source.next
        return time if self._requests.left and time < self._until else math.inf

    def _play(self, now: float) -> None:
        """Everything that happens now."""
        touched: list[int] = []
        while self._steps and self._steps[0][0] == now:
            index = heapq.heappop(self._steps)[1]
            if self._engines[index].executor.end_step() and index not in touched:
                touched.append(index)
            self._follow(index)
        for index in touched:
            self._take_in(index, now)
        while self._next_request() == now:
            for _ in range(min(self._source.take(), self._requests.left)):
                index = self._n_held.index(min(self._n_held))
                if index not in touched:  # who is woken by a request takes in results as well
                    touched.append(index)
                    self._take_in(index, now)
                self._n_held[index] += 1
                self._engines[index].add(*self._requests.make(now))
        for index in touched:
            self._engines[index].plan(now)
            self._follow(index)

    def _follow(self, index: int) -> None:
        """Wait for the end of an engine's step if one has begun since the last call."""
        executor = self._engines[index].executor
        if executor.n_steps > self._n_followed[index]:
            self._n_followed[index] = executor.n_steps
            heapq.heappush(self._steps, (executor.step_end, index))

    def _take_in(self, index: int, now: float) -> None:
        for completion in self._engines[index].take_in(now):
            self._n_held[index] -= 1
            self._source.ended(now)
            times, n_tokens = completion.timings, completion.usage.completion_tokens
            self._queued.append(times.queued)
            self._first_token.append(times.first_token)
            self._total.append(times.total)
            if n_tokens > 1:
                self._per_token.append(times.decode / (n_tokens - 1))

    # ----------------------------------------------------------------------- figures

    def _sample(self, moment: float) -> None:
        stats = [engine.scheduler.stats for engine in self._engines]
        n_tokens = sum(engine.executor.n_tokens for engine in self._engines)
        self._samples.append(
            Sample(
                moment,
                sum(s.running for s in stats),
                sum(s.waiting for s in stats),
                n_tokens - self._n_sampled,
            )
        )
        self._n_sampled = n_tokens

    def _check(self) -> None:
        for engine in self._engines:
            engine.scheduler.check_integrity()

    def _report(self, now: float) -> SimulationReport:
        stats = tuple(engine.scheduler.stats for engine in self._engines)
        report = SimulationReport(
            requests=len(self._total),
            prompt_tokens=sum(s.prompt_tokens for s in stats),
            generated_tokens=sum(s.generated_tokens for s in stats),
            drafted=sum(s.drafted for s in stats),
            accepted=sum(s.accepted for s in stats),
            steps=sum(s.steps for s in stats),
            seconds=now,
            busy=tuple(engine.executor.busy for engine in self._engines),
            queued=_summary(self._queued),
            first_token=_summary(self._first_token),
            per_token=_summary(self._per_token),
            total=_summary(self._total),
            samples=tuple(self._samples),
            stats=stats,
        )
        made = self._requests
        counts = [
            ("requests", made.n_requests, report.requests),
            ("answers' tokens", made.n_answer_tokens, report.generated_tokens),
        ]
        if not any(s.preemptions for s in stats):  # else some are fed again
            counts.append(("prompt tokens", made.n_prompt_tokens, report.prompt_tokens))
        for name, asked, given in counts:
            if asked != given:
                raise InternalError(f"{asked} {name} were asked for, and {given} came out")
        return report


class _Engine:
    """One engine: its thread's loop, with the clock passed in."""

    def __init__(self, facts: ModelFacts, cost: CostModel, make_scheduler: MakeScheduler) -> None:
        self.scheduler = make_scheduler(facts)
        self.executor = SimulatedExecutor(facts, cost)

    def add(self, sequence: Sequence, luck: Luck, place: int) -> None:
        """A request has come."""
        self.executor.expect(sequence.ticket, luck, place)
        self.scheduler.add(sequence)

    def take_in(self, now: float) -> list[Completion]:
        """Take in the results that there are; the requests that ended."""
        return [
            event.completion
            for result in self.executor.take_results(now)
            for event in self.scheduler.update(result, now)
            if event.completion is not None
        ]

    def plan(self, now: float) -> None:
        """Make plans while there are any to make."""
        while True:
            plan = self.scheduler.schedule(now)
            if plan is not None:
                self.executor.hand_over(plan, now)
            elif self.executor.reports:
                self.take_in(now)  # of snapshots; no request ends
            else:
                return


class _Requests:
    """Makes requests of several kinds, ``left`` more of them, and counts what they ask for."""

    def __init__(
        self,
        kinds: abc.Sequence[RequestKind],
        facts: ModelFacts,
        speculation: Speculation,
        seed: int,
        left: int,
    ) -> None:
        config = parse(EngineConfig, {"speculation": speculation})
        self._wish = draft_wish(None, config, facts)
        self._facts = facts
        self._chance = random.Random(f"requests {seed}")
        self._kinds = kinds
        self._weights = list(itertools.accumulate(kind.weight for kind in kinds))
        self._luck = {kind.drafts: luck_of(kind.drafts) for kind in kinds}
        self.left = left
        self.n_requests = 0
        self.n_prompt_tokens = 0
        self.n_answer_tokens = 0

    def make(self, now: float) -> tuple[Sequence, Luck, int]:
        """The next request: with which luck it drafts, and from which place of that on."""
        chance, facts = self._chance, self._facts
        [kind] = chance.choices(self._kinds, cum_weights=self._weights)
        n_prompt = kind.prompt(chance)
        if n_prompt >= facts.n_ctx:
            raise PromptTooLongError(n_prompt, facts.n_ctx)
        n_answer = min(kind.answer(chance), facts.n_ctx - n_prompt)
        self.left -= 1
        self.n_requests += 1
        self.n_prompt_tokens += n_prompt
        self.n_answer_tokens += n_answer
        ticket = self.n_requests
        sequence = Sequence(
            f"req-{ticket}",
            ticket,
            (ticket, *(0,) * (n_prompt - 1)),  # no prompt begins like another
            SamplingParams(
                max_tokens=n_answer,
                temperature=kind.temperature,
                ignore_eos=True,
                priority=kind.priority,
                deadline=kind.deadline,
            ),
            seed=0,
            max_tokens=n_answer,
            wish=self._wish,
            n_draft_max=facts.n_draft_max,
            followed=kind.streaming,
            assembler=TextAssembler(_NO_TEXT),
            submitted=now,
        )
        return sequence, self._luck[kind.drafts], chance.randrange(N_LUCK)


class _Source(Protocol):
    """When requests come."""

    next: float
    """When to call :meth:`take`; not before a request has ended, if ``inf``."""

    def take(self) -> int:
        """How many come now."""
        ...

    def ended(self, now: float) -> None:
        """A request has ended."""
        ...


class _OpenSource:
    def __init__(self, arrivals: OpenLoop, chance: random.Random) -> None:
        self._times = arrivals.times(chance)
        self.next = next(self._times)

    def take(self) -> int:
        self.next = next(self._times)
        return 1

    def ended(self, now: float) -> None:
        """It makes no difference."""


class _ClosedSource:
    """State: there are ``_n_clients``, and are to be ``_n_wanted`` until ``_until``.

    ``_n_ready`` of them send a request now.
    """

    def __init__(self, arrivals: ClosedLoop) -> None:
        self._spans = arrivals.clients.spans()
        self._n_clients = 0
        self._n_ready = 0
        self._until = self.next = 0.0

    def take(self) -> int:
        if not self._n_ready:
            _, self._until, level = next(self._spans)
            self._n_wanted = int(level)
            self._n_ready = max(0, self._n_wanted - self._n_clients)
            self._n_clients += self._n_ready
        n_ready, self._n_ready = self._n_ready, 0
        self.next = self._until
        return n_ready

    def ended(self, now: float) -> None:
        if self._n_clients > self._n_wanted:
            self._n_clients -= 1
        else:
            self._n_ready += 1
            self.next = now


def _summary(figures: array[float]) -> Summary:
    if not figures:
        return Summary(0.0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(figures)
    n = len(ordered)
    p50, p90, p99 = (ordered[min(n - 1, int(share * n))] for share in (0.5, 0.9, 0.99))
    return Summary(math.fsum(ordered) / n, p50, p90, p99, ordered[-1])
