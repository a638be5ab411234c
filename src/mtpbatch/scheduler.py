"""Which sequence does what in the next step.

Four verbs, called by one owner, one after another:

- :meth:`Scheduler.add` and :meth:`Scheduler.abort` let requests in and out;
- :meth:`Scheduler.schedule` says what the next step does, as a :class:`~mtpbatch.types.Plan`;
- :meth:`Scheduler.update` (or :meth:`Scheduler.fail`) takes in how that went, and returns the
  :class:`Event` of every request that got something.

Pure: no native code, clock, thread or event loop. Time is a number that callers hand in.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict

from msgspec import Struct

from mtpbatch.exceptions import DecodeError, InternalError, MtpBatchError
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import step_depth
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


class Scheduler:
    """Shares one model's steps among requests, first come, first served.

    State: a request is in ``_waiting`` or in ``_running`` until its last event; each sequence id
    is free, held by a running request, or in ``_released`` until the next plan tells the
    executor. ``_in_flight`` is the plan whose result is awaited, with its sequences; those that
    are aborted meanwhile leave at once, and their part of the result is dropped. Totals only
    grow. Every method but the properties changes it, so all calls belong to one thread.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()  # pops its first in O(1)
        self._running: dict[str, Sequence] = {}
        self._free = list(range(facts.n_seq))  # a heap: low ids close together decode fastest
        self._released: list[int] = []
        self._in_flight: tuple[Plan, list[Sequence]] | None = None

        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._drafted_by_depth = [0] * facts.n_draft_max
        self._accepted_by_depth = [0] * facts.n_draft_max
        self._steps = 0
        self._draft_time = 0.0
        self._target_time = 0.0
        self._sample_time = 0.0

    # ------------------------------------------------------------- requests in and out

    def add(self, sequence: Sequence) -> None:
        """Let a request wait for a sequence id. Its id must not be in use."""
        if sequence.request_id in self._waiting or sequence.request_id in self._running:
            raise InternalError(f"request {sequence.request_id} was added twice")
        self._waiting[sequence.request_id] = sequence

    def abort(self, request_id: str, now: float) -> Event | None:
        """End a request, waiting or running; ``None`` if there is none of that id (any more)."""
        sequence = self._waiting.pop(request_id, None) or self._running.get(request_id)
        if sequence is None:
            return None
        delta = sequence.end("abort", now)
        return Event(request_id, delta, self._retire(sequence))

    # ---------------------------------------------------------------------- the step

    def schedule(self, now: float) -> Plan | None:
        """The next step; ``None`` when there is nothing to do.

        Every running sequence takes part. Those that generate come first, with one token and
        their drafts, so that no prompt makes them wait; what is left of ``n_batch`` goes to
        prompts, oldest first, and as long as some is left, waiting requests are admitted.
        """
        if self._in_flight is not None:
            raise InternalError("schedule() before the last plan was settled")
        release = self._take_released()
        admit: list[Admission] = []
        entries: list[PlanEntry] = []
        taking_part: list[Sequence] = []

        def feed_prompt(sequence: Sequence, budget: int) -> int:
            chunk = sequence.chunk(budget)
            last = sequence.n_computed + len(chunk) == len(sequence.prompt)
            entries.append(PlanEntry(_id(sequence), chunk, last, 0))
            taking_part.append(sequence)
            return len(chunk)

        generating = [s for s in self._running.values() if s.generating]
        prompting = [s for s in self._running.values() if not s.generating]

        # There is a token for everyone: who runs was admitted to a step that had one to spare.
        # What is short if n_batch is small are drafts.
        budget = self._facts.n_batch - len(generating)
        spare = budget - len(prompting)
        for sequence in generating:
            n_draft = min(step_depth(sequence.draft_limit, sequence.remaining), spare)
            entries.append(PlanEntry(_id(sequence), (), True, n_draft))
            taking_part.append(sequence)
            spare -= n_draft
            budget -= n_draft

        # At most one: the next request is admitted only when this one's prompt leaves room.
        for sequence in prompting:
            budget -= feed_prompt(sequence, budget)

        while budget and self._waiting and self._free:
            sequence = self._admit_next(now)
            admit.append(self._admission(sequence))
            budget -= feed_prompt(sequence, budget)

        if not release and not entries:
            return None
        plan = Plan(release, tuple(admit), tuple(entries))
        self._in_flight = plan, taking_part
        return plan

    def update(self, plan: Plan, result: StepResult, now: float) -> list[Event]:
        """Take in the result of ``plan``: an event for each request that generated."""
        taking_part = self._settle(plan)
        if len(result.entries) != len(plan.entries):
            raise InternalError(f"{len(plan.entries)} entries gave {len(result.entries)} results")
        self._steps += bool(plan.entries)
        self._draft_time += result.draft_time
        self._target_time += result.target_time
        self._sample_time += result.sample_time

        events = []
        for sequence, entry, outcome in zip(taking_part, plan.entries, result.entries, strict=True):
            if sequence.finished:  # aborted while the step ran
                continue
            delta = sequence.absorb(entry, outcome, now)
            self._prompt_tokens += len(entry.tokens)
            if delta is None:
                continue
            self._generated_tokens += len(delta.token_ids)
            for depth in range(outcome.n_drafted):
                self._drafted_by_depth[depth] += 1
            for depth in range(delta.n_accepted):
                self._accepted_by_depth[depth] += 1
            completion = self._retire(sequence) if sequence.finished else None
            events.append(Event(sequence.request_id, delta, completion))
        return events

    def fail(self, plan: Plan, error: Exception, now: float) -> list[Event]:
        """``plan`` failed with ``error``: the sequences in it end, and only those."""
        events = []
        for sequence in self._settle(plan):
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

    # ----------------------------------------------------------------------- figures

    @property
    def has_work(self) -> bool:
        """Whether :meth:`schedule` has a plan to give, now or once the current one is settled."""
        return bool(self._waiting or self._running or self._released)

    @property
    def stats(self) -> EngineStats:
        """The figures as they are now. A sequence id counts as free once its request ended."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            free_sequences=self._facts.n_seq - len(self._running),
            n_seq=self._facts.n_seq,
            mtp=self._facts.n_draft_max > 0,
            finished=self._finished.copy(),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            drafted=sum(self._drafted_by_depth),
            accepted=sum(self._accepted_by_depth),
            drafted_by_depth=tuple(self._drafted_by_depth),
            accepted_by_depth=tuple(self._accepted_by_depth),
            steps=self._steps,
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
        _hold(not self._waiting.keys() & self._running.keys(), "no request waits and runs")
        for sequence in self._waiting.values():
            _hold(sequence.seq_id is None and not sequence.finished, f"{sequence!r} only waits")
            _hold(sequence.n_computed == 0, f"{sequence!r} has not begun")
        for sequence in self._running.values():
            trail = sequence.n_tokens - sequence.n_computed
            _hold(not sequence.finished, f"{sequence!r} is not finished")
            _hold(trail == 1 or (trail > 0 and not sequence.token_ids), f"{sequence!r} trails by 1")
            _hold(sequence.remaining > 0, f"{sequence!r} may generate")
            _hold(
                len(sequence.prompt) + sequence.max_tokens <= self._facts.n_ctx,
                f"{sequence!r} fits into its context",
            )
            _hold(
                sequence.accepted == sum(sequence.accepted_by_depth) <= sequence.drafted,
                f"the counts of {sequence!r} add up",
            )
        if self._in_flight is not None:
            plan, taking_part = self._in_flight
            tokens = sum((len(e.tokens) or 1) + e.n_draft for e in plan.entries)
            _hold(tokens <= self._facts.n_batch, "a plan fits into n_batch")
            _hold(len(taking_part) == len(plan.entries), "each entry has its sequence")
            idle = [s for s in self._running.values() if s not in taking_part]
            _hold(not idle, f"every running sequence takes part in the step, {idle} do not")

    # ----------------------------------------------------------------------- details

    def _take_released(self) -> tuple[int, ...]:
        """Ids for the plan to release, from here on free to be taken again in the same plan."""
        release = tuple(self._released)
        self._released.clear()
        for seq_id in release:
            heapq.heappush(self._free, seq_id)
        return release

    def _admit_next(self, now: float) -> Sequence:
        request_id, sequence = self._waiting.popitem(last=False)
        self._running[request_id] = sequence
        sequence.admit(heapq.heappop(self._free), now)
        return sequence

    def _admission(self, sequence: Sequence) -> Admission:
        params = sequence.params
        stop = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop |= self._facts.eog_token_ids
        return Admission(
            _id(sequence), params, sequence.seed, tuple(sorted(stop)), sequence.max_tokens
        )

    def _settle(self, plan: Plan) -> list[Sequence]:
        """The sequences of the plan whose outcome has come."""
        if self._in_flight is None or self._in_flight[0] is not plan:
            raise InternalError("this plan is not the one whose outcome is awaited")
        taking_part = self._in_flight[1]
        self._in_flight = None
        return taking_part

    def _retire(self, sequence: Sequence) -> Completion:
        """Forget a sequence that has ended; its id goes into the next plan's releases."""
        completion = sequence.completion()
        self._finished[completion.finish_reason] += 1
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
