"""Which sequence does what in the next steps.

Four verbs, called by one owner, one after another:

- :meth:`Scheduler.add` and :meth:`Scheduler.abort` let requests in and out;
- :meth:`Scheduler.schedule` says what is to be done, as a :class:`~mtpbatch.types.Plan`;
- :meth:`Scheduler.update` takes in how a step of it went, and returns the :class:`Event` of every
  request that got something.

Pure: no native code, clock, thread or event loop. Time is a number that callers hand in.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final

from msgspec import Struct

from mtpbatch.exceptions import DecodeError, InternalError, MtpBatchError, NativeError
from mtpbatch.sequence import Sequence, at_least
from mtpbatch.speculation import Speculator
from mtpbatch.types import (
    Admission,
    Completion,
    Delta,
    EngineStats,
    FinishReason,
    ModelFacts,
    Plan,
    PlanEntry,
    StepResult,
)
from mtpbatch.waiting import WaitingQueue

_MAX_AHEAD: Final = 2  # plans of which no result has come: the one that runs, and the next
# Steps: some seconds of a small model, in which an app may keep the GIL in one call of C code.
_RUN_AHEAD: Final = 4096


class Event(Struct, frozen=True):
    """What a step, an abort or a failure did to one request.

    ``completion`` or ``error`` makes it the request's last event, of which each request gets
    exactly one. The texts of a request's deltas, joined, are the text of its completion.
    """

    request_id: str
    delta: Delta | None = None
    completion: Completion | None = None
    error: MtpBatchError | None = None

    @property
    def last(self) -> bool:
        """Whether it ends its request."""
        return self.completion is not None or self.error is not None


class _InFlight(Struct, gc=False):
    """A plan whose results come."""

    plan: Plan
    sequences: list[Sequence]
    """Those of its entries."""
    stepped: bool = False
    """Whether its first result has come: further ones are of repetitions."""


class Scheduler:
    """Shares one model's steps among requests, in the order of :mod:`mtpbatch.waiting`.

    The executor runs ahead, so plans are made before the results of earlier ones are known, and
    only when something changes: a plan stands until the next one.

    State: a request is in ``_waiting`` or in ``_running`` until its last event; each sequence id
    is free, held by a running request, or in ``_released`` until the next plan tells the
    executor. ``_in_flight`` are the plans of which results can come, oldest first; a sequence
    that ends meanwhile leaves at once, and what still comes for it is dropped. ``_prompting`` is
    the running one of whose prompt a part has not been planned: the next is admitted only when
    that leaves room. ``_speculator`` learns from results, and says how deep to draft. Totals only
    grow. Every method but the properties changes it, so all calls
    belong to one thread.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self._waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}
        self._prompting: Sequence | None = None
        self._free = list(range(facts.n_seq))  # a heap: low ids close together decode fastest
        self._released: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._n_plans = 0
        self._speculator = Speculator(facts)

        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._prompt_tokens = 0
        self._generated_tokens = 0
        # Drafts by their length, and by how much of them was accepted.
        self._n_drafting = [0] * (facts.n_draft_max + 1)
        self._n_accepting = [0] * (facts.n_draft_max + 1)
        self._steps = 0
        self._gap_time = 0.0
        self._draft_time = 0.0
        self._target_time = 0.0
        self._sample_time = 0.0

    # ------------------------------------------------------------- requests in and out

    def add(self, sequence: Sequence) -> None:
        """Let a request wait for a sequence id. Its id must not be in use."""
        if sequence.request_id in self._waiting or sequence.request_id in self._running:
            raise InternalError(f"request {sequence.request_id} was added twice")
        self._waiting.push(sequence)

    def abort(self, request_id: str, now: float) -> Event | None:
        """End a request, waiting or running; ``None`` if there is none of that id (any more)."""
        sequence = self._waiting.remove(request_id) or self._running.get(request_id)
        if sequence is None:
            return None
        delta = sequence.end("abort", now)
        return Event(request_id, delta, self._retire(sequence))

    # ---------------------------------------------------------------------- the step

    def schedule(self, now: float) -> Plan | None:
        """What is to be done from now on; ``None`` while that is what was planned already.

        Every running sequence takes part. Those that generate come first, with one token and
        their drafts, so that no prompt makes them wait; what is left of ``n_batch`` goes to
        prompts, oldest first, and as long as some is left, waiting requests are admitted.

        One plan is made ahead of the one whose results are awaited, not more: later ones would
        know too little, and a request that comes meanwhile would wait behind them.
        """
        release = self._take_released()
        something_new = self._n_ahead < _MAX_AHEAD and (
            self._speculator.review(self._running.values())
            or self._prompting is not None
            or (self._waiting and self._free)
            or self._followed_in_vain
        )
        if not something_new:
            return Plan(release, (), ()) if release else None

        admit: list[Admission] = []
        entries: list[PlanEntry] = []
        sequences: list[Sequence] = []
        # There is a row for everyone: who runs was admitted when there was. What can be short are
        # drafts.
        budget = self._facts.n_batch - len(self._running)
        for sequence in self._running.values():
            if sequence is not self._prompting:
                entries.append(self._entry(sequence, (), budget))
                sequences.append(sequence)
                budget -= entries[-1].n_draft

        chunks: list[tuple[Sequence, tuple[int, ...]]] = []
        spare = budget  # rows for the drafts of these when the plan is repeated
        if entries and (most := self._speculator.costs.chunk) is not None:
            budget = min(budget, most)
        if self._prompting is not None:
            chunks.append((self._prompting, self._prompting.take_chunk(budget + 1)))
            budget -= len(chunks[0][1]) - 1
        while budget and self._waiting and self._free:
            sequence = self._admit_next(now)
            admit.append(self._admission(sequence))
            chunks.append((sequence, sequence.take_chunk(budget)))
            budget -= len(chunks[-1][1])
            spare -= 1
        for sequence, chunk in chunks:
            entries.append(self._entry(sequence, chunk, spare))
            sequences.append(sequence)
            spare -= entries[-1].n_draft
        # The others had room for their whole prompt, or nobody would have come after them.
        self._prompting = None
        if chunks and not chunks[-1][0].prompt_planned:
            self._prompting = chunks[-1][0]

        self._n_plans += 1
        adaptive = any(sequence.wish.adaptive for sequence in self._running.values())
        terms = self._speculator.choice.terms if adaptive else None
        plan = Plan(
            release,
            tuple(admit),
            tuple(entries),
            terms,
            number=self._n_plans,
            run_ahead=_RUN_AHEAD,
            followed=any(sequence.followed for sequence in self._running.values()),
        )
        self._in_flight.append(_InFlight(plan, sequences))
        return plan

    def update(self, result: StepResult, now: float) -> list[Event]:
        """Take in a result: an event for each request that ended, or is followed and generated."""
        flight = self._flight_of(result)
        plan, repeated = flight.plan, flight.stepped
        flight.stepped = True
        if result.error is not None:
            return self._fail(flight.sequences, result.error, now)
        if len(result.entries) != len(plan.entries):
            raise InternalError(f"{len(plan.entries)} entries gave {len(result.entries)} results")
        self._steps += result.n_target_tokens > 0  # not if all its sequences had ended by then
        self._gap_time += result.gap_time
        self._draft_time += result.draft_time
        self._target_time += result.target_time
        self._sample_time += result.sample_time

        events = []
        n_prompt = 0
        verifying = [0] * (self._facts.n_draft_max + 1)  # sequences by the length of their drafts
        for sequence, entry, outcome in zip(
            flight.sequences, plan.entries, result.entries, strict=True
        ):
            if sequence.finish_reason is not None:  # since the step began
                continue
            n_before = len(sequence.token_ids)
            delta = sequence.absorb(entry, outcome, now, repeated=repeated)
            if entry.tokens and not repeated:
                n_prompt += len(entry.tokens)
            elif outcome.token_ids:
                verifying[outcome.n_drafted] += 1
            n_tokens = len(sequence.token_ids) - n_before
            if n_tokens:
                self._generated_tokens += n_tokens
                self._n_drafting[outcome.n_drafted] += 1
                self._n_accepting[min(outcome.n_accepted, n_tokens)] += 1
            if delta is not None:
                completion = self._retire(sequence) if sequence.finished else None
                events.append(Event(sequence.request_id, delta, completion))
        self._prompt_tokens += n_prompt
        self._speculator.observe(result, verifying, n_prompt)
        return events

    # ----------------------------------------------------------------------- figures

    @property
    def stats(self) -> EngineStats:
        """The figures as they are now. A sequence id counts as free once its request ended."""
        drafted = at_least(self._n_drafting)
        accepted = at_least(self._n_accepting)
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_sequences=self._facts.n_seq - len(self._running),
            n_seq=self._facts.n_seq,
            mtp=self._facts.n_draft_max > 0,
            finished=self._finished.copy(),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            drafted=sum(drafted),
            accepted=sum(accepted),
            drafted_by_depth=drafted,
            accepted_by_depth=accepted,
            steps=self._steps,
            gap_time=self._gap_time,
            draft_time=self._draft_time,
            target_time=self._target_time,
            sample_time=self._sample_time,
        )

    def __repr__(self) -> str:
        return (
            f"<Scheduler: {len(self._running)} running, {len(self._waiting)} waiting, "
            f"{len(self._free)} of {self._facts.n_seq} ids free>"
        )

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks one of the rules it lives by.

        For tests and debugging: it looks at everything.
        """
        held = [_id(sequence) for sequence in self._running.values()]
        _hold(
            sorted(held + self._free + self._released) == list(range(self._facts.n_seq)),
            "each id is free, held or released, once",
        )
        _hold(not self._free or self._free[0] == min(self._free), "the lowest free id is first")
        self._waiting.check_integrity()
        _hold(not any(r in self._waiting for r in self._running), "no request waits and runs")
        for sequence in self._waiting:
            _hold(sequence.seq_id is None and not sequence.finished, f"{sequence!r} only waits")
            _hold(sequence.n_computed == 0, f"{sequence!r} has not begun")
        for sequence in self._running.values():
            trail = sequence.n_tokens - sequence.n_computed
            _hold(not sequence.finished, f"{sequence!r} is not finished")
            _hold(trail == 1 or (trail > 0 and not sequence.token_ids), f"{sequence!r} trails by 1")
            _hold(
                sequence.prompt_planned == (sequence is not self._prompting),
                f"{sequence!r} is known to have more of its prompt to come",
            )
            _hold(sequence.remaining > 0, f"{sequence!r} may generate")
            _hold(
                len(sequence.prompt) + sequence.max_tokens <= self._facts.n_ctx,
                f"{sequence!r} fits into its context",
            )
            _hold(
                sequence.accepted == sum(sequence.accepted_by_depth) <= sequence.drafted,
                f"the counts of {sequence!r} add up",
            )
        _hold(
            self._prompting is None or self._prompting.request_id in self._running,
            "who has more of its prompt to come is running",
        )
        for flight in self._in_flight:
            entries = flight.plan.entries
            _hold(len(flight.sequences) == len(entries), "each entry has its sequence")
            for rows in (
                sum(len(e.tokens) or 1 + e.n_draft for e in entries),
                sum(1 + e.n_draft for e in entries if e.sample),
            ):
                _hold(rows <= self._facts.n_batch, "each step of a plan fits into n_batch")
        _hold(self._n_ahead <= _MAX_AHEAD, "no plan is made too far ahead")
        newest = self._in_flight[-1].sequences if self._in_flight else []
        idle = [s for s in self._running.values() if s not in newest]
        _hold(not idle, f"every running sequence takes part in the newest plan, {idle} do not")

    # ----------------------------------------------------------------------- details

    @property
    def _n_ahead(self) -> int:
        """Plans of which no result has come."""
        return sum(not flight.stepped for flight in self._in_flight)

    @property
    def _followed_in_vain(self) -> bool:
        """Whether the plan that stands reports every step though nobody is left to follow."""
        return bool(
            self._running
            and self._in_flight
            and self._in_flight[-1].plan.followed
            and not any(sequence.followed for sequence in self._running.values())
        )

    def _take_released(self) -> tuple[int, ...]:
        """Ids for the plan to release, from here on free to be taken again in the same plan."""
        release = tuple(self._released)
        self._released.clear()
        for seq_id in release:
            heapq.heappush(self._free, seq_id)
        return release

    def _admit_next(self, now: float) -> Sequence:
        sequence = self._waiting.pop()
        self._running[sequence.request_id] = sequence
        habit = self._speculator.new_habit(len(sequence.prompt))
        sequence.admit(heapq.heappop(self._free), habit, now)
        return sequence

    def _entry(self, sequence: Sequence, chunk: tuple[int, ...], most_drafts: int) -> PlanEntry:
        """A sequence's part in a plan. It drafts from the step on in which it generates."""
        if not sequence.prompt_planned:
            return PlanEntry(_id(sequence), chunk, False, 0)
        wish = self._speculator.wish_for(sequence)
        n_draft = min(wish.limit, most_drafts)
        expected = round(sequence.habit.acceptance, 1)
        return PlanEntry(_id(sequence), chunk, True, n_draft, wish.adaptive, expected)

    def _admission(self, sequence: Sequence) -> Admission:
        params = sequence.params
        stop = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop |= self._facts.eog_token_ids
        return Admission(
            _id(sequence),
            params,
            sequence.seed,
            tuple(sorted(stop)),
            sequence.max_tokens,
            drafts=sequence.wish.limit > 0,
            ticket=sequence.ticket,
        )

    def _flight_of(self, result: StepResult) -> _InFlight:
        """The plan of a result; those before it are done with."""
        flights = self._in_flight
        while flights and flights[0].stepped and flights[0].plan.number != result.plan:
            flights.popleft()
        if not flights or flights[0].plan.number != result.plan:
            raise InternalError(f"a result came of plan {result.plan}, which is not its turn")
        return flights[0]

    def _fail(self, sequences: list[Sequence], error: NativeError, now: float) -> list[Event]:
        """A step failed: the sequences of its plan end."""
        events = []
        for sequence in sequences:
            if sequence.finished:
                continue
            delta = sequence.end("error", now)
            # Each request gets an error of its own, since it carries that request's completion.
            failure = DecodeError(f"the step this request took part in failed: {error}")
            # Without its traceback, whose frames would keep native objects alive after closing.
            failure.__cause__ = error.with_traceback(None)
            failure.completion = self._retire(sequence)
            events.append(Event(sequence.request_id, delta, error=failure))
        return events

    def _retire(self, sequence: Sequence) -> Completion:
        """Forget a sequence that has ended; its id goes into the next plan's releases."""
        completion = sequence.completion()
        self._finished[completion.finish_reason] += 1
        if sequence is self._prompting:
            self._prompting = None
        if self._running.pop(sequence.request_id, None) is not None:
            self._released.append(_id(sequence))
        return completion


def _id(sequence: Sequence) -> int:
    if sequence.seq_id is None:
        raise InternalError(f"{sequence!r} holds no sequence id")
    return sequence.seq_id


def _hold(rule: bool, words: str) -> None:
    if not rule:
        raise InternalError(f"scheduler: it does not hold that {words}")
