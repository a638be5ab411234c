"""Which sequence does what in the next steps.

Four verbs, called by one owner, one after another:

- :meth:`Scheduler.add` and :meth:`Scheduler.abort` let requests in and out;
- :meth:`Scheduler.schedule` says what is to be done, as a :class:`~mtpbatch.types.Plan`, before
  each exchange with the executor;
- :meth:`Scheduler.update` takes in how a step of it went, and returns the :class:`Event` of every
  request that got something.

Pure: no native code, clock, thread or event loop. Time is a number that callers hand in.
"""

from __future__ import annotations

import heapq
from collections import abc, deque
from typing import Final, Literal, get_args

from msgspec import Struct

from mtpbatch.exceptions import (
    DecodeError,
    GrammarError,
    InternalError,
    MtpBatchError,
    NativeDiedError,
    NativeError,
)
from mtpbatch.memory import Cells, Snapshots
from mtpbatch.prefix import NO_HIT, Hit, PrefixIndex
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import Speculator, at_least
from mtpbatch.types import (
    Admission,
    Completion,
    Delta,
    EngineStats,
    FinishReason,
    ModelFacts,
    Park,
    Plan,
    PlanEntry,
    Resume,
    Save,
    SequenceStep,
    StepResult,
    looks_at_prompt,
)
from mtpbatch.waiting import WaitingQueue, due

_MAX_AHEAD: Final = 2  # plans of which no result has come: the one that runs, and the next
# Steps: some seconds of a small model, in which an app may keep the GIL in one call of C code.
_RUN_AHEAD: Final = 4096
_LOOKS: Final = 16  # requests that one look for the next sets aside: thousands may share a prompt
_SETTLED: Final = 4  # steps with the same sequences, after which gaps between their ids may close


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
    sequences: list[Sequence | None]
    """Those of its entries; ``None`` for one that has started again since."""
    stepped: bool = False
    """Whether its first result has come: further ones are of repetitions."""


class _Parked(Struct, frozen=True, gc=False):
    """What is known of a request that gave up its sequence id after it had generated."""

    plan: int
    """Once a result of this plan or a later one has come, all its tokens are known."""
    snapshot: int
    """Its state; 0: it was not saved."""


class Scheduler:
    """Shares one model's steps among requests, in the order of :mod:`mtpbatch.waiting`.

    The executor runs ahead, so plans are made before the results of earlier ones are known, and
    only when something changes: a plan stands until the next one.

    State: a request is in ``_waiting`` or in ``_running`` until its last event; each sequence id
    is free, held by a running request, or in ``_released`` until the next plan tells the
    executor; one that is to be parked first is in ``_parks`` instead. ``_in_flight`` are the plans
    of which results can come, oldest first; a sequence that ends meanwhile leaves at once, and
    what still comes for it is dropped. ``_bare`` are the numbers of plans without entries that are
    reported, and ``_n_reported`` is the last plan of which something has come. ``_prompting`` are
    the running ones of whose prompts a part has not been planned: another is admitted only when
    these leave room. ``_n_followed`` of those that run are followed. ``_speculator`` learns from
    results, and says how deep to draft.

    Memory has rooms of its own: ``_cells``, ``_snapshots`` and ``_prefix``. A request that is
    parked is in ``_waiting`` again, where it has its old place, and in ``_parked``. ``_saves`` and
    ``_forgotten`` are for the next plan.

    ``_settled_time`` is what steps have taken since a sequence id was taken or given up, and
    ``_n_settled`` how many of them have been taken in since then, or since gaps between ids could
    not be closed.

    Totals only grow. Every method but the properties changes the state, so all calls belong to one
    thread.
    """

    def __init__(self, facts: ModelFacts, snapshot_bytes: int = 0) -> None:
        """``snapshot_bytes``: host memory for states of sequences; 0 keeps none."""
        self._facts = facts
        self._snapshot_bytes = snapshot_bytes
        self._n_plans = 0
        self._n_reported = 0
        self._speculator = Speculator(facts)
        self._begin_with_nothing()

        self._finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._preemptions = 0
        # Drafts by their length, and by how much of them was accepted.
        self._n_drafting = [0] * (facts.n_draft_max + 1)
        self._n_accepting = [0] * (facts.n_draft_max + 1)
        self._steps = 0
        self._gap_time = 0.0
        self._draft_time = 0.0
        self._target_time = 0.0
        self._sample_time = 0.0
        self._restarts = 0

    def _begin_with_nothing(self) -> None:
        """No request, and an executor that knows of none."""
        facts = self._facts
        self._waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}
        self._n_followed = 0
        self._prompting: list[Sequence] = []
        self._free = list(range(facts.n_seq))  # a heap: low ids close together decode fastest
        self._released: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._bare: deque[int] = deque()

        self._cells = Cells(facts)
        self._snapshots = Snapshots(self._snapshot_bytes)
        self._prefix = PrefixIndex(truncates=facts.truncates)
        self._parked: dict[str, _Parked] = {}
        self._saves: list[Save] = []
        self._parks: list[Park] = []
        self._forgotten: list[int] = []
        self._n_settled = 0
        self._settled_time = 0.0

    # ------------------------------------------------------------- requests in and out

    def add(self, sequence: Sequence) -> None:
        """Let a request wait for a sequence id. Its id must not be in use."""
        if sequence.request_id in self._waiting or sequence.request_id in self._running:
            raise InternalError(f"request {sequence.request_id} was added twice")
        self._waiting.push(sequence)
        if self._reuses(sequence):
            drafts = sequence.wish.limit > 0
            self._prefix.enter(
                sequence.request_id, sequence.prompt, drafts=drafts, shared=sequence.shares_prompt
            )

    def abort(
        self, request_id: str, now: float, reason: Literal["abort", "timeout"] = "abort"
    ) -> Event | None:
        """End a request, waiting or running; ``None`` if there is none of that id (any more)."""
        sequence = self._waiting.remove(request_id) or self._running.get(request_id)
        if sequence is None:
            return None
        delta = sequence.end(reason, now)
        return Event(request_id, delta, self._retire(sequence))

    def let_go(self, request_id: str) -> Sequence | None:
        """A request's sequence, if there is one of that id. Nothing can go on after that."""
        return self._waiting.remove(request_id) or self._running.get(request_id)

    def start_over(self, death: NativeDiedError, now: float) -> list[Event]:
        """Go on with an executor that knows nothing, as the last one died.

        Who ran, or was parked, ends with an error: what the executor knew of it is gone. Who only
        waited has lost nothing, and goes on waiting.
        """
        parked = [sequence for sequence in self._waiting if sequence.request_id in self._parked]
        advice = "; the engine starts another one: send the request again"
        events = [
            self._end_by_error(
                sequence, NativeDiedError(death.returncode, advice, why=death.why), now
            )
            for sequence in (*self._running.values(), *parked)
        ]
        waiting = list(self._waiting)
        self._begin_with_nothing()
        for sequence in waiting:
            self.add(sequence)
        self._restarts += 1
        return events

    # ---------------------------------------------------------------------- the step

    def schedule(self, now: float) -> Plan | None:
        """What is to be done from now on; ``None`` while that is what was planned already.

        Every running sequence takes part. Those that generate come first, with one token and
        their drafts, so that no prompt makes them wait; what is left of ``n_batch`` goes to
        prompts, oldest first, and as long as some is left, waiting requests are admitted.

        One plan is made ahead of the one whose results are awaited, not more: later ones would
        know too little, and a request that comes meanwhile would wait behind them.
        """
        # In this order: the review chooses depths, the look at who is next sets some aside, and
        # the cells note what the plan that stands may take. None need be asked after a yes.
        if self._n_ahead == _MAX_AHEAD or not (
            self._speculator.review(self._running.values())
            or self._prompting
            or self._next_to_begin() is not None
            or self._followed_in_vain
            or not self._cells.stand(self._running.values())
            or self._gaps_cost
        ):
            return self._bare_plan()

        self._n_plans += 1
        self._save_at_points()
        self._pause_until_cells_suffice()
        release, save, park = self._take_vacated()
        move, resume = self._close_gaps() if self._gaps_cost else ([], [])
        drop = self._take_dropped()  # before the next look for a snapshot

        admit: list[Admission] = []
        entries: list[PlanEntry] = []
        sequences: list[Sequence | None] = []
        # There is a row for everyone: who runs was admitted when there was. What can be short are
        # drafts. Of the rows that are looked at each id has one; the others go to drafts, and what
        # these leave to prompts that are scored.
        budget = self._facts.n_batch - len(self._running)
        n_outputs = self._facts.n_outputs
        outputs = budget if n_outputs is None else n_outputs - self._facts.n_seq
        for sequence in self._running.values():
            if sequence.prompt_planned:
                entry = self._entry(sequence, (), budget)
                entries.append(entry)
                sequences.append(sequence)
                budget -= entry.n_draft
                outputs -= entry.n_draft

        chunks: list[tuple[Sequence, tuple[int, ...]]] = []
        spare = budget  # rows for the drafts of these when the plan is repeated
        if entries:
            budget = min(budget, self._chunk_beside(len(entries)))
        for sequence in self._prompting:
            most = min(budget, outputs) if sequence.scores_prompt else budget
            chunks.append((sequence, sequence.take_chunk(most + 1)))
            n_more = len(chunks[-1][1]) - 1
            budget -= n_more
            outputs -= n_more if sequence.scores_prompt else 0
        while budget and (next_ := self._next_to_begin()) is not None:
            newcomer, hit = next_
            self._begin(newcomer, hit, now, admit, resume)
            if newcomer.prompt_planned:
                entries.append(self._entry(newcomer, (), min(budget - 1, outputs)))
                sequences.append(newcomer)
                n_rows = 1 + entries[-1].n_draft
                outputs -= entries[-1].n_draft
                spare -= n_rows
            else:
                most = min(budget, outputs + 1) if newcomer.scores_prompt else budget
                chunks.append((newcomer, newcomer.take_chunk(most)))
                n_rows = len(chunks[-1][1])
                outputs -= n_rows - 1 if newcomer.scores_prompt else 0
                spare -= 1
            budget -= n_rows
        for sequence, chunk in chunks:
            entries.append(self._entry(sequence, chunk, spare))
            sequences.append(sequence)
            spare -= entries[-1].n_draft
        self._prompting = [sequence for sequence, _ in chunks if not sequence.prompt_planned]

        running = self._running.values()
        adaptive = any(sequence.wish.adaptive for sequence in running)
        terms = self._speculator.choice.terms if adaptive else None
        plan = Plan(
            release,
            tuple(admit),
            tuple(entries),
            terms,
            number=self._n_plans,
            run_ahead=self._cells.plan(running, _RUN_AHEAD),
            followed=self._results_come_singly,
            keep_prompts=self._speculator.choice.keep_prompts
            or any(s.save_points or s.wish.always for s, _ in chunks),
            save=save,
            park=(*park, *move),
            drop=drop,
            forget=self._take_forgotten(),
            resume=tuple(resume),
        )
        self._in_flight.append(_InFlight(plan, sequences))
        return plan

    def update(
        self, result: StepResult, now: float, parts: list[SequenceStep] | None = None
    ) -> list[Event]:
        """Take in a result: an event for each request that ended, or is followed and generated.

        ``parts`` takes each sequence's part in the step, if somebody wants to know.
        """
        self._n_reported = max(self._n_reported, result.plan)
        if self._bare and self._bare[0] == result.plan:
            self._bare.popleft()
            self._take_in_copies(result, None)
            return []
        flight = self._flight_of(result)
        plan, repeated = flight.plan, flight.stepped
        flight.stepped = True
        self._cells.take_in(first=not repeated)
        self._take_in_copies(result, None if repeated else flight)
        if result.error is not None:
            return self._fail(flight.sequences, result.error, now)
        if len(result.entries) != len(plan.entries):
            gave = f"{len(plan.entries)} entries gave {len(result.entries)} results"
            return self._fail(flight.sequences, DecodeError(gave), now)
        self._steps += result.n_target_tokens > 0  # not if all its sequences had ended by then
        self._gap_time += result.gap_time
        self._draft_time += result.draft_time
        self._target_time += result.target_time
        self._sample_time += result.sample_time
        self._n_settled += 1
        self._settled_time += result.draft_time + result.target_time + result.sample_time

        events = []
        stuck = dict(result.stuck)
        n_prompt = n_generated = 0
        verifying = [0] * (self._facts.n_draft_max + 1)  # sequences by the length of their drafts
        n_accepting = self._n_accepting
        for sequence, entry, outcome in zip(
            flight.sequences, plan.entries, result.entries, strict=True
        ):
            if sequence is None or sequence.finish_reason is not None:  # since the step began
                continue
            stuck_by = stuck.get(entry.seq_id) if stuck else None
            delta = None
            try:
                if stuck_by is None or outcome.token_ids:  # else it was stuck before any draft
                    delta = sequence.absorb(entry, outcome, now, repeated=repeated)
            except DecodeError as garbled:  # nothing is known of it any more
                events.append(self._end_by_error(sequence, garbled, now))
                continue
            if not repeated and entry.tokens:
                n_prompt += len(entry.tokens)
            elif delta is not None:
                verifying[outcome.n_drafted] += 1
            if parts is not None:
                n_fed = 0 if repeated else len(entry.tokens)
                if n_fed or delta is not None:
                    parts.append(_part(sequence, entry, n_fed, outcome.n_drafted, delta))
            if delta is not None:
                n_generated += len(delta.token_ids)
                n_accepting[delta.n_accepted] += 1
                if sequence.finish_reason is not None:
                    events.append(Event(sequence.request_id, delta, self._retire(sequence)))
                    continue
                if sequence.followed:
                    events.append(Event(sequence.request_id, delta))
            if stuck_by is not None:
                failure = GrammarError(f"the answer cannot go on by its grammar: {stuck_by}")
                events.append(self._end_by_error(sequence, failure, now))
        self._prompt_tokens += n_prompt
        self._generated_tokens += n_generated
        for n_drafted, count in enumerate(verifying):
            self._n_drafting[n_drafted] += count
        self._speculator.observe(result, verifying, n_prompt)
        return events

    # ----------------------------------------------------------------------- figures

    @property
    def awaits_step(self) -> bool:
        """Whether a plan has yet to have its first step."""
        return self._n_ahead > 0

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
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            kv_cells_used=sum([sequence.n_computed for sequence in self._running.values()]),
            n_cells=self._facts.n_cells,
            snapshot_bytes=self._snapshots.n_bytes,
            drafted=sum(drafted),
            accepted=sum(accepted),
            drafted_by_depth=drafted,
            accepted_by_depth=accepted,
            draft_depth=self._speculator.choice.depth,
            steps=self._steps,
            gap_time=self._gap_time,
            draft_time=self._draft_time,
            target_time=self._target_time,
            sample_time=self._sample_time,
            restarts=self._restarts,
        )

    @property
    def running(self) -> abc.ValuesView[Sequence]:
        """Those that have a sequence id."""
        return self._running.values()

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
            sorted(held + self._free + self._released + [park.seq_id for park in self._parks])
            == list(range(self._facts.n_seq)),
            "each id is free, held or released, once",
        )
        _hold(not self._free or self._free[0] == min(self._free), "the lowest free id is first")
        self._waiting.check_integrity()
        _hold(not any(r in self._waiting for r in self._running), "no request waits and runs")
        for sequence in self._waiting:
            _hold(sequence.seq_id is None and not sequence.finished, f"{sequence!r} only waits")
            parked = sequence.request_id in self._parked
            _hold(
                parked or sequence.n_computed == sequence.n_planned == 0,
                f"{sequence!r} has not begun, or is parked",
            )
            _hold(
                parked or not sequence.token_ids, f"{sequence!r} is parked, since it has generated"
            )
        _hold(
            all(request_id in self._waiting for request_id in self._parked),
            "who is parked waits",
        )
        for sequence in self._running.values():
            trail = sequence.n_tokens - sequence.n_computed
            _hold(not sequence.finished, f"{sequence!r} is not finished")
            _hold(
                trail == 1 or sequence.n_computed <= sequence.n_feed == sequence.n_tokens,
                f"{sequence!r} trails by 1 when it generates",
            )
            _hold(
                sequence.prompt_planned != (sequence in self._prompting),
                f"{sequence!r} is known to have more of its prompt to come",
            )
            _hold(sequence.remaining > 0, f"{sequence!r} may generate")
            _hold(
                len(sequence.prompt) + sequence.max_tokens <= self._facts.n_ctx,
                f"{sequence!r} fits into its context",
            )
            _hold(
                sequence.accepted <= sequence.drafted,
                f"{sequence!r} accepts no more than was drafted",
            )
        n_followed = sum(sequence.followed for sequence in self._running.values())
        _hold(self._n_followed == n_followed, "it is known how many are followed")
        _hold(
            all(sequence.request_id in self._running for sequence in self._prompting),
            "who has more of its prompt to come is running",
        )
        self._cells.check_integrity(self._running.values())
        self._snapshots.check_integrity()
        self._prefix.check_integrity()
        _hold(
            all(self._prefix.is_awaited(key) for key in self._waiting.reasons),
            "who is set aside waits for a prompt that is under way",
        )
        _hold(
            self._parked.keys() | self._prefix.entered
            <= {s.request_id for s in self._waiting} | self._running.keys(),
            "nothing is kept of requests that have ended",
        )
        for flight in self._in_flight:
            entries = flight.plan.entries
            _hold(len(flight.sequences) == len(entries), "each entry has its sequence")
            for rows in (
                sum(len(e.tokens) or 1 + e.n_draft for e in entries),
                sum(1 + e.n_draft for e in entries if e.sample),
            ):
                _hold(rows <= self._facts.n_batch, "each step of a plan fits into n_batch")
            looked_at = sum(
                len(e.scored) + e.sample if e.tokens else 1 + e.n_draft for e in entries
            )
            _hold(
                looked_at <= (self._facts.n_outputs or self._facts.n_batch),
                "the rows that a step looks at fit into n_outputs",
            )
        _hold(self._n_ahead <= _MAX_AHEAD, "no plan is made too far ahead")
        parts: list[tuple[Sequence | None, int]] = []
        if self._in_flight:
            newest = self._in_flight[-1]
            seq_ids = [entry.seq_id for entry in newest.plan.entries]
            parts = list(zip(newest.sequences, seq_ids, strict=True))
        idle = [s for s in self._running.values() if (s, s.seq_id) not in parts]
        _hold(not idle, f"every running sequence takes part in the newest plan, {idle} do not")

    # ----------------------------------------------------------------------- details

    @property
    def _n_ahead(self) -> int:
        """Plans of which no step's result has come."""
        return sum(not flight.stepped for flight in self._in_flight)

    @property
    def _results_come_singly(self) -> bool:
        """Whether each is told at once: somebody follows, or a trial is on, which ends by them."""
        return self._n_followed > 0 or self._speculator.choice.trial is not None

    @property
    def _followed_in_vain(self) -> bool:
        """Whether the plan that stands reports every step though nobody is left to follow."""
        return bool(
            self._running
            and self._in_flight
            and self._in_flight[-1].plan.followed
            and not self._results_come_singly
        )

    @property
    def _gaps_cost(self) -> bool:
        """Whether gaps between the ids of those who run are there to stay, and cost passes.

        Each plan that was made has had a step, so that whoever moved before has arrived.
        """
        running = self._running.values()
        if (
            not self._facts.consecutive_ids
            or not self._snapshots.enabled
            or not running
            or self._waiting
            or self._n_settled < _SETTLED
            or self._n_ahead
        ):
            return False
        seq_ids = [_id(sequence) for sequence in running]
        return max(seq_ids) - min(seq_ids) >= len(running) and all(
            sequence.n_tokens > sequence.n_feed for sequence in running
        )

    def _chunk_beside(self, n_generating: int) -> int:
        """Most rows of prompts in a step in which so many sequences generate.

        If somebody follows, they are not to wait long; but the more prompts there are to one that
        generates, the longer. Otherwise a full pass, with which no time is lost.
        """
        if not self._n_followed:
            return self._facts.n_ubatch
        n_ids = len(self._free) + len(self._prompting)
        n_prompts = min(len(self._waiting) + len(self._prompting), n_ids)
        return self._speculator.costs.chunk(self._facts.n_ubatch, n_prompts / n_generating)

    def _take_vacated(self) -> tuple[tuple[int, ...], tuple[Save, ...], tuple[Park, ...]]:
        """Ids for the plan to release, what it saves of them before, and whom it parks.

        Their ids are free from here on, to be taken again in the same plan.
        """
        release, save, park = tuple(self._released), tuple(self._saves), tuple(self._parks)
        for seq_id in (*release, *(parked.seq_id for parked in park)):
            heapq.heappush(self._free, seq_id)
        self._released.clear()
        self._saves.clear()
        self._parks.clear()
        return release, save, park

    def _bare_plan(self) -> Plan | None:
        """What cannot wait for the next step that is planned; ``None`` if there is nothing."""
        release, save, park = self._take_vacated()
        drop, forget = self._take_dropped(), self._take_forgotten()
        if not (release or save or park or drop or forget):
            return None
        number = 0
        if save:  # it is reported
            self._n_plans += 1
            number = self._n_plans
            self._bare.append(number)
        return Plan(release, (), (), number=number, save=save, park=park, drop=drop, forget=forget)

    # ------------------------------------------------------------------ beginning, pausing

    def _next_to_begin(self) -> tuple[Sequence, Hit] | None:
        """Who takes a sequence id next, if there is one, and whoever is first need not wait; and
        what that starts from.

        Who waits for a prompt under way to be saved is set aside: others need not wait for that. Of
        many who do, the rest is looked at with the plans that follow.
        """
        for _ in range(_LOOKS):
            sequence = self._waiting.first
            if sequence is None or not (self._free or self._released or self._parks):
                return None
            parked = self._parked.get(sequence.request_id)
            if parked is not None and parked.plan > self._n_reported:
                return None  # there may be tokens of it that are not known yet
            hit = self._hit(sequence) if parked is None else NO_HIT
            running = self._running.values()
            if running and not self._cells.have_room(running, sequence, hit.n_held):
                return None
            if parked is None and not sequence.scores_prompt:
                key = self._prefix.awaited(sequence.request_id, hit.n_tokens)
                if key is not None:
                    self._waiting.set_aside(key)
                    continue
            return sequence, hit
        return None  # the prompt that these wait for is under way, so that there are more plans

    def _begin(
        self,
        sequence: Sequence,
        hit: Hit,
        now: float,
        admit: list[Admission],
        resume: list[Resume],
    ) -> None:
        """Give the first of the waiting a sequence id."""
        self._waiting.pop()
        self._unsettle()
        request_id, seq_id = sequence.request_id, heapq.heappop(self._free)
        self._running[request_id] = sequence
        self._n_followed += sequence.followed
        parked = self._parked.pop(request_id, None)
        if parked is not None:
            sequence.resume(seq_id, from_snapshot=parked.snapshot > 0)
            resume.append(Resume(seq_id, sequence.ticket, parked.snapshot))
            return
        stored = self._prefix.longest(request_id) if sequence.scores_prompt else hit
        points = self._save_points(request_id, stored.n_tokens)
        self._expect(request_id, points)
        habit = self._speculator.new_habit(sequence.wish, len(sequence.prompt) - hit.n_tokens)
        sequence.admit(seq_id, habit, now, cached_tokens=hit.n_tokens, save_points=points)
        if hit.snapshot:
            self._snapshots.use(hit.snapshot)
        admit.append(self._admission(sequence, hit.snapshot))

    def _pause_until_cells_suffice(self) -> None:
        """Park whoever would be the last to be admitted, until the others can go on."""
        while self._cells.short(self._running.values()):
            sequence = max(self._running.values(), key=lambda s: (due(s), s.ticket))
            self._preemptions += 1
            if sequence.token_ids:
                snapshot = 0
                if sequence.n_tokens > sequence.n_feed:  # it generates: its state is whole
                    again = sequence.n_tokens * self._speculator.costs.prompt_row
                    snapshot = self._snapshots.keep(sequence.n_tokens, again)
                self._park(sequence, snapshot, plan=self._n_plans)
            else:
                self._start_again(sequence)

    def _close_gaps(self) -> tuple[list[Park], list[Resume]]:
        """Move who has a high id to the lowest free ones.

        It may take as long as the steps did since there are gaps: if the others end soon, little
        is lost, and if they go on, not much more than by moving them at once.
        """
        park: list[Park] = []
        resume: list[Resume] = []
        high = [s for s in self._running.values() if _id(s) >= len(self._running)]
        seconds = self._settled_time / len(high)
        for sequence in high:
            snapshot = self._snapshots.keep(sequence.n_tokens, seconds)
            if snapshot:
                park.append(Park(_id(sequence), snapshot))
                sequence.resume(heapq.heappop(self._free), from_snapshot=True)
                resume.append(Resume(_id(sequence), sequence.ticket, snapshot))
        for parked in park:
            heapq.heappush(self._free, parked.seq_id)
        if park:
            self._unsettle()
        else:
            self._n_settled = 0  # it is tried again when more time has been lost
        return park, resume

    def _park(self, sequence: Sequence, snapshot: int, *, plan: int) -> None:
        self._parks.append(Park(_id(sequence), snapshot))
        self._parked[sequence.request_id] = _Parked(plan, snapshot)
        self._stop_running(sequence)
        sequence.pause()
        self._waiting.push(sequence)

    def _start_again(self, sequence: Sequence) -> None:
        """Admit it another time: nothing is known to have come of it. What comes is void."""
        self._released.append(_id(sequence))
        self._stop_running(sequence)
        self._void(sequence)
        sequence.start_again()
        self._waiting.push(sequence)

    def _unsettle(self) -> None:
        self._n_settled = 0
        self._settled_time = 0.0

    def _stop_running(self, sequence: Sequence) -> None:
        self._unsettle()
        del self._running[sequence.request_id]
        self._n_followed -= sequence.followed
        self._expect(sequence.request_id, ())
        self._prompting = [other for other in self._prompting if other is not sequence]

    def _void(self, sequence: Sequence) -> None:
        """Nothing that still comes for it counts."""
        for flight in self._in_flight:
            flight.sequences = [None if s is sequence else s for s in flight.sequences]

    # ------------------------------------------------------------------------- snapshots

    def _reuses(self, sequence: Sequence) -> bool:
        return self._snapshots.enabled and sequence.params.reuse_prefix

    def _hit(self, sequence: Sequence) -> Hit:
        """What a request starts from: whose prompt is scored needs every row of it."""
        return NO_HIT if sequence.scores_prompt else self._prefix.longest(sequence.request_id)

    def _save_points(self, request_id: str, n_stored: int) -> tuple[int, ...]:
        """Where a prompt that begins is saved on its way: others wait for what is saved there, so
        not where that would be refused."""
        points = self._prefix.points(request_id, n_stored)
        prompt_row = self._speculator.costs.prompt_row
        return tuple(p for p in points if self._snapshots.would_take(p, prompt_row))

    def _save_at_points(self) -> None:
        """Save the prompts that have come to a point from which others begin.

        Until the next chunk, which this plan feeds, their state does not change.
        """
        for sequence in self._prompting:
            if sequence.n_planned in sequence.save_points:
                self._save(sequence, sequence.prompt[: sequence.n_planned])
                points = (p for p in sequence.save_points if p > sequence.n_planned)
                self._expect(sequence.request_id, tuple(points))

    def _save_at_end(self, sequence: Sequence) -> None:
        """Save a sequence that has ended by itself: what comes next may begin with all of it."""
        held = sequence.state_token_ids
        drafts = sequence.wish.limit > 0
        if self._reuses(sequence) and self._prefix.is_new(
            held, drafts=drafts, of=sequence.request_id
        ):
            self._save(sequence, held)

    def _save(self, sequence: Sequence, token_ids: tuple[int, ...]) -> None:
        number = self._snapshots.take(len(token_ids), self._speculator.costs.prompt_row)
        if number:
            self._saves.append(Save(_id(sequence), number))
            drafts = sequence.wish.limit > 0
            self._prefix.add(number, token_ids, drafts=drafts, of=sequence.request_id)

    def _expect(self, request_id: str, points: tuple[int, ...]) -> None:
        """Take note where a prompt under way is still to be saved; who waited for more goes on."""
        for key in self._prefix.expect(request_id, points):
            self._waiting.bring_back(key)

    def _take_dropped(self) -> tuple[int, ...]:
        """Snapshots for the plan to drop; nobody can begin with them any more."""
        dropped = self._snapshots.take_dropped()
        for number in dropped:
            self._prefix.remove(number)
        return dropped

    def _take_forgotten(self) -> tuple[int, ...]:
        forgotten = tuple(self._forgotten)
        self._forgotten.clear()
        return forgotten

    def _take_in_copies(self, result: StepResult, opened: _InFlight | None) -> None:
        """What became of snapshots. ``opened``: the plan that the result is the first of."""
        n_bytes = 0
        for number, size in result.saved:
            self._snapshots.report(number, size)
            n_bytes += size
            if not size:
                for request_id, parked in self._parked.items():
                    if parked.snapshot == number:
                        self._parked[request_id] = _Parked(parked.plan, 0)
        if opened is not None:
            plan = opened.plan
            begun: tuple[Admission | Resume, ...] = (*plan.admit, *plan.resume)
            snapshots = {one.seq_id: one.snapshot for one in begun if one.snapshot}
            entries = zip(opened.sequences, plan.entries, strict=True) if snapshots else ()
            for sequence, entry in entries:
                snapshot = snapshots.get(entry.seq_id)
                if not snapshot or sequence is None or sequence.finished:
                    continue
                if entry.seq_id in result.lost:
                    self._lose(sequence, snapshot)
                else:
                    n_bytes += self._snapshots.size(sequence.n_computed)
            for resume in plan.resume:
                self._snapshots.drop(resume.snapshot)  # it has served
        if n_bytes:
            self._snapshots.copied(n_bytes, result.save_time)

    def _lose(self, sequence: Sequence, snapshot: int) -> None:
        """What it was to start from could not be restored: it is computed."""
        self._snapshots.drop(snapshot)
        if sequence.request_id not in self._running:
            return  # parked once more; that could not be saved either
        if sequence.token_ids:
            # The executor keeps how it samples. Nothing has come of it that is not known.
            self._park(sequence, 0, plan=0)
        else:
            self._start_again(sequence)

    # --------------------------------------------------------------------------- others

    def _entry(self, sequence: Sequence, chunk: tuple[int, ...], most_drafts: int) -> PlanEntry:
        """A sequence's part in a plan. It drafts from the step on in which it generates."""
        seq_id = _id(sequence)
        scored = sequence.scored_by(chunk) if chunk else ()
        if chunk and not sequence.prompt_planned:
            return PlanEntry(seq_id, chunk, False, 0, scored=scored)
        wish = self._speculator.wish_for(sequence)
        n_draft = wish.limit if wish.limit < most_drafts else most_drafts
        if not wish.adaptive:
            return PlanEntry(seq_id, chunk, True, n_draft, scored=scored)
        expected = round(10 * sequence.habit.acceptance) / 10  # half of what round(…, 1) takes
        return PlanEntry(seq_id, chunk, True, n_draft, True, expected, scored)

    def _admission(self, sequence: Sequence, snapshot: int) -> Admission:
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
            snapshot=snapshot,
            n_reused=sequence.cached_tokens,
            grammar=sequence.grammar,
            bad_words=sequence.bad_words,
            history=sequence.prompt if looks_at_prompt(params) else (),
        )

    def _flight_of(self, result: StepResult) -> _InFlight:
        """The plan of a result; those before it are done with."""
        flights = self._in_flight
        while flights and flights[0].stepped and flights[0].plan.number != result.plan:
            flights.popleft()
        if not flights or flights[0].plan.number != result.plan:
            raise InternalError(f"a result came of plan {result.plan}, which is not its turn")
        return flights[0]

    def _fail(
        self, sequences: list[Sequence | None], error: NativeError, now: float
    ) -> list[Event]:
        """A step failed: the sequences of its plan end."""
        events = []
        for sequence in sequences:
            if sequence is None or sequence.finished:
                continue
            # Each request gets an error of its own, since it carries that request's completion.
            failure = DecodeError(f"the step this request took part in failed: {error}")
            # Without its traceback, whose frames would keep native objects alive after closing.
            failure.__cause__ = error.with_traceback(None)
            events.append(self._end_by_error(sequence, failure, now))
        return events

    def _end_by_error(self, sequence: Sequence, error: NativeError, now: float) -> Event:
        delta = sequence.end("error", now)
        error.completion = self._retire(sequence)
        return Event(sequence.request_id, delta, error=error)

    def _retire(self, sequence: Sequence) -> Completion:
        """Forget a sequence that has ended; its id goes into the next plan's releases."""
        completion = sequence.completion()
        self._finished[completion.finish_reason] += 1
        request_id = sequence.request_id
        parked = self._parked.pop(request_id, None)
        begun = parked is not None or request_id in self._running
        if begun and self._reuses(sequence) and not sequence.scores_prompt:
            # Not when it began: it may have begun in vain, and totals only grow.
            self._prefix_queries += len(sequence.prompt)
            self._prefix_hits += sequence.cached_tokens
        if parked is not None:
            self._waiting.remove(request_id)
            self._forgotten.append(sequence.ticket)
            self._snapshots.drop(parked.snapshot)
        elif request_id in self._running:
            self._speculator.learn(sequence)
            self._save_at_end(sequence)
            self._released.append(_id(sequence))
            self._stop_running(sequence)
        self._prefix.leave(request_id)
        return completion


def _part(
    sequence: Sequence, entry: PlanEntry, n_prompt: int, n_drafted: int, delta: Delta | None
) -> SequenceStep:
    return SequenceStep(
        entry.seq_id,
        sequence.request_id,
        n_prompt,
        n_drafted,
        0 if delta is None else delta.n_accepted,
        0 if delta is None else len(delta.token_ids),
        0 if sequence.seq_id is None else sequence.n_computed,
    )


def _id(sequence: Sequence) -> int:
    if sequence.seq_id is None:
        raise InternalError(f"{sequence!r} holds no sequence id")
    return sequence.seq_id


def _hold(rule: bool, words: str) -> None:
    if not rule:
        raise InternalError(f"scheduler: it does not hold that {words}")
