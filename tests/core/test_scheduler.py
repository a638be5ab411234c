"""The scheduler against the scripted model, which refuses plans that no executor could run."""

from __future__ import annotations

import gc
import itertools
import operator
import random
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from mtpbatch import memory, prefix, scheduler, waiting
from mtpbatch.exceptions import DecodeError, GrammarError, InternalError, NativeDiedError
from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.testing import ScriptedBackend
from mtpbatch.timeouts import Timeouts
from mtpbatch.types import (
    NO_RESULT,
    Completion,
    EntryResult,
    Plan,
    StepResult,
    TokenLogprobs,
)
from scheduling import (
    completions,
    hand_over,
    make_sequence,
    moves,
    run_step,
    run_to_end,
    step,
    undrafted,
)

TOTALS = (
    *("prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions"),
    *("steps", "drafted", "accepted"),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are aborted or time out at any time, and steps succeed or fail."""

    @initialize(
        n_seq=st.integers(1, 5),
        n_batch=st.integers(1, 24),
        n_draft_max=st.integers(0, 4),
        acceptance=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        lag=st.sampled_from([0, 1, 3, 20]),
        n_cells=st.sampled_from([None, 24, 30, 60]),
        snapshot_bytes=st.sampled_from([0, 40_000, 10**6]),
        truncates=st.booleans(),
        consecutive_ids=st.booleans(),
        failing=st.sets(st.integers(0, 6)),
    )
    def open(
        self,
        n_seq: int,
        n_cells: int | None,
        snapshot_bytes: int,
        consecutive_ids: bool,
        failing: set[int],
        **model: Any,
    ) -> None:
        self.backend = ScriptedBackend(
            n_seq=n_seq,
            n_ctx=24,
            n_cells=None if n_cells is None else min(n_cells, 24 * n_seq),
            **model,
        )
        for index in failing:
            self.backend.fail_save(index)
            self.backend.fail_restore(index)
        self.facts = replace(self.backend.facts, consecutive_ids=consecutive_ids)
        self.scheduler = Scheduler(self.facts, snapshot_bytes)
        self.sequences: dict[str, Sequence] = {}
        self.last_events: dict[str, Event] = {}
        self.texts: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.totals = [0] * len(TOTALS)
        self.harmed = False  # whether a step is to fail, or has failed
        self.timeouts = Timeouts()

    @rule(
        n_prompt=st.integers(1, 23),
        first=st.sampled_from([0, 65, 66, 255]),
        max_tokens=st.integers(1, 40),
        depth=st.none() | st.integers(0, 4),
        stop=st.lists(st.sampled_from(["e", "th", "d t", "日本", "ing the", "öß"]), max_size=2),
        stop_token_ids=st.lists(st.sampled_from([32, 101, 257]), max_size=1),
        ignore_eos=st.booleans(),
        followed=st.booleans(),
        reuse_prefix=st.booleans(),
        shares_prompt=st.booleans(),
        timeout=st.sampled_from([None, None, None, 0.015, 0.055, 0.2]),
        queue_timeout=st.sampled_from([None, None, None, 0.005, 0.035]),
        priority=st.sampled_from([0, 0, 0, -100, 1, 2, 100]),
        deadline=st.sampled_from([None, None, 0.02, 5.0]),
        logprobs=st.sampled_from([None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 0, 2]),
    )
    def add(self, n_prompt: int, first: int, depth: int | None, **params: Any) -> None:
        params["stop"] = tuple(params["stop"])
        params["stop_token_ids"] = tuple(params["stop_token_ids"])
        depth = None if depth is None else min(depth, self.backend.facts.n_draft_max)
        self.submit([first, *range(97, 96 + n_prompt)], depth=depth, **params)

    @rule(first=st.sampled_from([65, 66]), n_turns=st.integers(2, 4))
    def converse(self, first: int, n_turns: int) -> None:
        """Each turn begins with all that was said before, of which something may be kept."""
        said = [first, *range(97, 103)]
        for _ in range(n_turns):
            request_id = self.submit(said, max_tokens=3, ignore_eos=True)
            self.go_on(5)
            end = self.last_events.get(request_id)
            if end is None or end.completion is None:
                return
            said += [*end.completion.token_ids, 110]

    def submit(self, prompt: list[int], **params: Any) -> str:
        request_id = f"r{len(self.sequences)}"
        sequence = make_sequence(self.backend, request_id, prompt, **params)
        self.sequences[request_id] = sequence
        self.scheduler.add(sequence)
        self.timeouts.add(request_id, sequence.params, sequence.submitted)
        return request_id

    @rule(n_steps=st.integers(2, 6))
    def crowd_and_leave_a_gap(self, n_steps: int) -> None:
        """Long requests take all ids that nobody waits for, and one of low id leaves."""
        for first in range(65, 65 + self.backend.facts.n_seq - len(self.live())):
            self.add(2, first, 0, max_tokens=22, ignore_eos=True, stop=[], stop_token_ids=[])
        self.go_on(2)
        running = self.scheduler._running.values()
        if len(running) > 1:
            lowest = min(running, key=lambda sequence: sequence.seq_id or 0)
            event = self.scheduler.abort(lowest.request_id, self.backend.clock())
            self.take([event] if event else [])
        self.go_on(n_steps)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if not self.sequences:
            return
        request_id = data.draw(st.sampled_from(sorted(self.sequences)))
        event = self.scheduler.abort(request_id, self.backend.clock())
        assert (event is None) == (request_id in self.last_events)
        if event is not None:
            assert event.completion is not None
            assert event.completion.finish_reason == "abort"
            self.take([event])

    @rule()
    def expire(self) -> None:
        now = self.backend.clock()
        overdue = {request_id for request_id in self.live() if self.is_overdue(request_id, now)}
        for request_id in self.timeouts.expired(now):
            overdue.remove(request_id)
            event = self.scheduler.abort(request_id, now, "timeout")
            assert event is not None
            assert event.completion is not None
            assert event.completion.finish_reason == "timeout"
            self.take([event])
        assert not overdue

    def is_overdue(self, request_id: str, now: float) -> bool:
        sequence = self.sequences[request_id]
        params = sequence.params
        waited = now - sequence.submitted
        if sequence.admitted is None and params.queue_timeout and waited >= params.queue_timeout:
            return True
        return params.timeout is not None and waited >= params.timeout

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """The backend hears of it first, and the scheduler at some time after that."""
        live = self.live()
        if live:
            request_id = data.draw(st.sampled_from(live))
            self.backend.cancel(self.sequences[request_id].ticket)
            self.cancelled.append(request_id)

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        """So much that who has little priority is older than others who come after that."""
        self.backend.clock.advance(seconds)

    @rule()
    def schedule(self) -> None:
        waiting = self.waiting()
        running = [*self.scheduler._running]
        plan = self.scheduler.schedule(self.backend.clock())
        if plan is not None:
            moved = moves(plan)
            kept = [name for name in running if name in self.scheduler._running]
            paused = [name for name in running if name not in kept]
            assert sorted(running, key=self.due) == [
                *sorted(kept, key=self.due),
                *sorted(paused, key=self.due),
            ], "who is due last pauses"
            assert not moved or self.facts.consecutive_ids
            assert not (moved and waiting), "who waits comes between"
            assert all(new < len(plan.entries) <= old for old, new in moved.items())
            n_begun = len(plan.admit) + len(plan.resume) - len(moved)
            # Who waits for a prompt that others compute lets those behind go first.
            aside = self.scheduler._waiting._aside
            parked = [request_id for request_id in self.waiting() if request_id not in waiting]
            order = sorted({*waiting, *parked} - aside.keys(), key=self.due)
            left = [request_id for request_id in self.waiting() if request_id not in aside]
            assert order[n_begun:] == left, "who is due first begins"
            names = {sequence.ticket: name for name, sequence in self.sequences.items()}
            for admission in plan.admit:
                self.timeouts.begin(names[admission.ticket])
            assert self.backend.exchange(plan, wait=False) == []

    @rule()
    def step(self) -> None:
        if self.backend.facts.n_cells < self.backend.facts.n_seq * self.backend.facts.n_ctx:
            self.schedule()  # what is taken in lets more steps begin
        events = step(self.scheduler, self.backend)
        for event in events:
            given_up = event.completion and event.completion.finish_reason not in ("stop", "length")
            assert not given_up, "nobody gave it up"
        self.take(events)

    @rule(n_steps=st.integers(1, 6))
    def go_on(self, n_steps: int) -> None:
        """As the engine does it. Nothing waits without a reason: there is a result each time, but
        for who is cancelled, which the scheduler does not know."""
        for _ in range(n_steps):
            self.expire()
            self.schedule()
            live = self.live()
            self.step()
            if live and not {*live} & {*self.cancelled}:
                assert self.backend._n_shown, f"nothing goes on: {self.scheduler!r}"

    @rule()
    def step_that_fails(self) -> None:
        """Who only waited waits on."""
        self.schedule()
        self.harmed = True
        self.backend.fail_step(self.backend.n_steps)
        waiting = {*self.waiting()}
        self.step()
        assert not waiting & self.last_events.keys()

    @rule()
    def executor_dies(self) -> None:
        """Who ran or was parked ends; who only waited waits on, and the ids are free again."""
        self.harmed = True
        self.backend.die_in_step(self.backend.n_steps)
        try:
            self.step()
        except NativeDiedError as death:
            only_waited = [r for r in self.waiting() if r not in self.scheduler._parked]
            n_others = len(self.live()) - len(only_waited)
            events = self.scheduler.start_over(death, self.backend.clock())
            assert len(events) == n_others
            assert all(isinstance(event.error, NativeDiedError) for event in events)
            self.take(events)
            assert self.waiting() == only_waited
            assert self.live() == sorted(only_waited)
            self.backend.restart(lambda share: True)
        else:
            self.backend._errors.clear()  # there was nothing to run

    def live(self) -> list[str]:
        return sorted(self.sequences.keys() - self.last_events.keys())

    def waiting(self) -> list[str]:
        """Who waits, in the order in which they are due."""
        return sorted((r for r in self.sequences if r in self.scheduler._waiting), key=self.due)

    def due(self, request_id: str) -> tuple[float, int]:
        sequence = self.sequences[request_id]
        patience = 60.0 + 10.0 * sequence.params.priority
        deadline = sequence.params.deadline
        patience = patience if deadline is None else min(patience, deadline)
        return sequence.submitted + patience, sequence.ticket

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request_id not in self.last_events, "nothing comes after the last event"
            if event.delta is not None:
                text = self.texts.get(event.request_id, "") + event.delta.text
                self.texts[event.request_id] = text
            if event.error is not None:
                assert self.harmed, "nothing was done to it"
                if not isinstance(event.error, NativeDiedError):
                    assert isinstance(event.error, DecodeError)
                    assert isinstance(event.error.__cause__, DecodeError)
                assert event.error.completion is not None
                assert event.error.completion.finish_reason == "error"
            if event.last:
                self.last_events[event.request_id] = event
                self.timeouts.remove(event.request_id)
                self.check_end(event)

    def check_end(self, event: Event) -> None:
        completion = event.completion or (event.error and event.error.completion)
        assert completion
        sequence = self.sequences[event.request_id]
        token_ids, text, reason = undrafted(self.backend, sequence)
        n_tokens = len(completion.token_ids)
        if sequence.followed:
            assert self.texts[event.request_id] == completion.text
        assert list(completion.token_ids) == token_ids[:n_tokens]
        if completion.finish_reason in ("stop", "length"):
            assert n_tokens == len(token_ids)
            assert (completion.text, completion.finish_reason) == (text, reason)
        assert completion.prompt_token_ids == sequence.prompt
        assert completion.usage.completion_tokens == n_tokens
        assert completion.usage.prompt_tokens == len(sequence.prompt)
        assert completion.usage.cached_tokens < len(sequence.prompt)
        self.check_logprobs(completion, sequence)
        assert completion.accepted == sum(completion.accepted_by_depth) <= completion.drafted
        assert completion.accepted <= n_tokens
        # Each step samples one token, but for the last, which may end with a draft.
        assert n_tokens - completion.accepted in (completion.steps, completion.steps - 1)
        assert len(sequence.prompt) + n_tokens <= self.backend.facts.n_ctx

    def check_logprobs(self, completion: Completion, sequence: Sequence) -> None:
        """Each token has its own, once; no prompt is answered before all of it has."""
        told, of_prompt = completion.logprobs, completion.prompt_logprobs
        assert (told is None) == (sequence.params.logprobs is None)
        assert (of_prompt is None) == (sequence.params.prompt_logprobs is None)
        if told is not None:
            assert [t.token_id for t in told] == list(completion.token_ids)
        if of_prompt is not None:
            assert completion.usage.cached_tokens == 0
            n_known = len(sequence.prompt) - 1 if completion.token_ids else len(of_prompt)
            token_ids = [t.token_id for t in of_prompt]
            assert token_ids == list(sequence.prompt[1 : 1 + n_known])

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            self.timeouts.check_integrity()
            stats = self.scheduler.stats
            n_live = len(self.sequences) - len(self.last_events)
            assert stats.running + stats.waiting == n_live
            assert stats.running + stats.free_sequences == stats.n_seq
            assert sum(stats.finished.values()) == len(self.last_events)
            assert 0 <= stats.kv_cells_used <= stats.n_cells
            totals = [getattr(stats, name) for name in TOTALS]
            assert all(map(operator.le, self.totals, totals)), "totals only grow"
            self.totals = totals

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for request_id in self.cancelled:
            event = self.scheduler.abort(request_id, self.backend.clock())
            self.take([event] if event else [])
        self.take(run_to_end(self.scheduler, self.backend))
        assert self.last_events.keys() == self.sequences.keys(), "no request is lost"
        assert not self.backend.active, "the executor was told of every release"
        assert not self.backend.parked, "and of every parked request that ended"
        known = {*self.scheduler._snapshots._cached}
        assert self.backend.snapshots == known, "and of every snapshot that is not needed"
        ends = [e.completion or (e.error and e.error.completion) for e in self.last_events.values()]
        stats = self.scheduler.stats
        assert stats.kv_cells_used == 0
        assert stats.generated_tokens == sum(len(end.token_ids) for end in ends if end)
        assert stats.drafted == sum(end.drafted for end in ends if end)
        assert stats.accepted == sum(end.accepted for end in ends if end)
        assert stats.accepted == sum(stats.accepted_by_depth)
        assert stats.prefix_hits == sum(end.usage.cached_tokens for end in ends if end)


@pytest.fixture
def _short_prompts_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can share something, too."""
    monkeypatch.setattr(prefix, "BLOCK", 2)
    monkeypatch.setattr(prefix, "LEAST", 4)
    monkeypatch.setattr(memory, "_ROOM", 3)
    monkeypatch.setattr(scheduler, "_LOOKS", 2)
    monkeypatch.setattr(scheduler, "_SETTLED", 1)


@pytest.mark.usefixtures("_short_prompts_matter")
def test_any_order_of_calls_keeps_every_promise() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.usefixtures("_short_prompts_matter")
def test_who_was_parked_needs_cells_for_all_its_tokens() -> None:
    """An order of calls after which two that went on were a cell short of what they may hold."""
    machine = SchedulerMachine()
    machine.open(
        n_seq=4,
        n_batch=12,
        n_draft_max=0,
        acceptance=0.0,
        lag=1,
        n_cells=24,
        snapshot_bytes=0,
        truncates=False,
        consecutive_ids=False,
        failing=set(),
    )
    for n_steps in (6, 6, 2, 3, 5, 2, 6, 3, 5):
        machine.crowd_and_leave_a_gap(n_steps)
        machine.integrity()
    machine.schedule()
    machine.integrity()
    machine.teardown()


def test_requests_are_admitted_in_order_to_the_lowest_free_ids() -> None:
    backend = ScriptedBackend(lambda prompt: "x" * len(prompt), n_seq=3, n_draft_max=0)
    scheduler = Scheduler(backend.facts)
    for i, n_prompt in enumerate([9, 1, 9, 1, 1]):
        scheduler.add(make_sequence(backend, f"r{i}", [65] * n_prompt))
    plan = hand_over(scheduler, backend)
    assert [a.seq_id for a in plan.admit] == [0, 1, 2]
    assert [len(e.tokens) for e in plan.entries] == [9, 1, 9]
    step(scheduler, backend)
    assert step(scheduler, backend)[1].completion is not None
    plan = hand_over(scheduler, backend)
    assert plan.release == (1,)
    assert [a.seq_id for a in plan.admit] == [1], "a freed id is taken again in the same plan"


def test_a_request_of_low_priority_finishes_though_urgent_ones_keep_coming() -> None:
    backend = ScriptedBackend(lambda _: "xy", n_seq=1, n_draft_max=0, step_time=1.0)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "low", [65], priority=3))
    ended: list[str] = []
    for i in range(12):
        scheduler.add(make_sequence(backend, f"urgent {i}", [65]))
        while len(ended) == i:
            ended += completions(run_step(scheduler, backend))
    # Three steps each, so ten of them come before 30 seconds make up for three levels.
    assert ended[:12] == [*(f"urgent {i}" for i in range(10)), "low", "urgent 10"]


class Crowd:
    """Clients who ask again as soon as they are answered, and one request that is least urgent.

    There are more clients than ids, and fewer cells than those who run may need, so that requests
    pause. Each six in turn begin alike, so that some are set aside. A step takes a second.
    """

    N_CLIENTS = 8
    N_CTX = 48

    def __init__(
        self, priorities: list[int], low: int, *, seed: int, snapshot_bytes: int, **model: Any
    ) -> None:
        """``priorities``: of who asks, in turn; none is greater than ``low``."""
        self.backend = ScriptedBackend(
            lambda _: "x" * 64,
            n_ctx=self.N_CTX,
            n_batch=16,
            n_draft_max=1,
            acceptance=0.5,
            step_time=1.0,
            **model,
        )
        self.scheduler = Scheduler(self.backend.facts, snapshot_bytes)
        self.n_set_aside = 0
        self._set_aside = self.scheduler._waiting.set_aside
        self.scheduler._waiting.set_aside = self._count  # type: ignore[method-assign]
        self._chance = random.Random(seed)
        self._priorities = itertools.cycle(priorities)
        self._n_asked = 0
        for _ in range(self.N_CLIENTS):
            self.ask()
        self.ask("low", low)
        # Whoever asks 10 seconds for each level later is due later. From then on each of the
        # clients has one request that is due before it, at most. These end one after another at
        # the worst, and each waits for one that had begun beside it: for its id, or its prompt.
        n_steps = self.N_CTX + model["lag"]  # of one request, at least a token in each
        self.most_seconds = 10 * low + 2 * n_steps * (self.N_CLIENTS + 1)

    def _count(self, reason: int) -> None:
        self.n_set_aside += 1
        self._set_aside(reason)

    def ask(self, name: str | None = None, priority: int | None = None) -> None:
        common = random.Random(self._n_asked // 6)
        own = self._chance
        prompt = [common.randrange(97, 123) for _ in range(12)]
        prompt += [own.randrange(97, 123) for _ in range(own.randrange(1, 5))]
        sequence = make_sequence(
            self.backend,
            name or f"r{self._n_asked}",
            prompt,
            priority=next(self._priorities) if priority is None else priority,
            max_tokens=own.randrange(1, self.N_CTX - len(prompt) + 1),
            ignore_eos=True,
        )
        self._n_asked += 1
        self.scheduler.add(sequence)

    def low_ends(self) -> bool:
        """Whether it ends in time."""
        while self.backend.clock() < self.most_seconds:
            ended = completions(run_step(self.scheduler, self.backend))
            if "low" in ended:
                return True
            for _ in ended:
                self.ask()
        return False


@pytest.mark.usefixtures("_short_prompts_matter")
@settings(max_examples=60, deadline=None)
@given(
    low=st.integers(0, 4),
    data=st.data(),
    seed=st.integers(0, 10**6),
    snapshot_bytes=st.sampled_from([0, 40_000, 10**6]),
    n_seq=st.integers(1, 5),
    n_cells=st.integers(48, 100),
    lag=st.sampled_from([0, 1, 3]),
    truncates=st.booleans(),
)
def test_nobody_waits_for_ever_though_others_keep_coming(
    low: int, data: st.DataObject, n_seq: int, n_cells: int, **setting: Any
) -> None:
    """Whoever is as urgent or more so, and whatever makes requests pause or stand aside."""
    priorities = data.draw(st.lists(st.integers(0, low), min_size=1, max_size=6))
    n_cells = min(n_cells, n_seq * Crowd.N_CTX)
    assert Crowd(priorities, low, n_seq=n_seq, n_cells=n_cells, **setting).low_ends()


@pytest.mark.usefixtures("_short_prompts_matter")
@pytest.mark.parametrize("truncates", [True, False])
def test_it_is_ageing_for_which_nobody_waits_for_ever(
    truncates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting: dict[str, Any] = {"n_seq": 4, "n_cells": 64, "lag": 1, "truncates": truncates}
    for ageing, ends in ((waiting.AGEING, True), (1e9, False)):
        monkeypatch.setattr(waiting, "AGEING", ageing)
        crowd = Crowd([0, 2, 1], 3, seed=1, snapshot_bytes=60_000, **setting)
        assert crowd.low_ends() == ends
        assert crowd.n_set_aside > 0
        assert crowd.scheduler.stats.preemptions > 0


def test_generating_sequences_do_not_wait_for_a_long_prompt() -> None:
    backend = ScriptedBackend(lambda _: "x" * 50, n_seq=2, n_batch=16, acceptance=0.0)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "short", [65]))
    run_step(scheduler, backend)
    scheduler.add(make_sequence(backend, "long", [66] * 40))
    for n_tokens in (12, 12, 12, 4):
        plan = hand_over(scheduler, backend)
        short, long = plan.entries
        assert (short.tokens, short.n_draft, short.sample) == ((), 3, True)
        assert len(long.tokens) == n_tokens
        assert long.sample == (n_tokens == 4), "sampling begins with the prompt's last chunk"
        assert len(step(scheduler, backend)) == 1 + long.sample


def test_the_next_chunk_of_a_prompt_is_planned_while_this_one_runs() -> None:
    backend = ScriptedBackend(lambda _: "x" * 50, n_seq=2, n_batch=16, n_draft_max=0)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "long", [66] * 40))
    plans = [hand_over(scheduler, backend), hand_over(scheduler, backend)]
    assert scheduler.schedule(0.0) is None, "one ahead is enough"
    for _ in range(2):
        assert step(scheduler, backend) == []
        if plan := scheduler.schedule(0.0):
            backend.exchange(plan, wait=False)
            plans.append(plan)
    assert [(len(p.entries[0].tokens), p.entries[0].sample) for p in plans] == [
        (16, False),
        (16, False),
        (8, True),
    ]


def test_a_plan_is_made_only_when_something_is_new() -> None:
    backend = ScriptedBackend(lambda _: "x" * 50, n_seq=2, acceptance=0.0)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r0", [65], depth=3))
    first = hand_over(scheduler, backend)
    for _ in range(5):
        assert len(step(scheduler, backend)) == 1
        assert scheduler.schedule(0.0) is None, "the plan stands"
    scheduler.add(make_sequence(backend, "r1", [65]))
    second = hand_over(scheduler, backend)
    assert (first.number, second.number) == (1, 2)
    assert [(e.seq_id, e.tokens) for e in second.entries] == [(0, ()), (1, (65,))]


def test_results_are_waited_for_step_by_step_only_if_somebody_follows() -> None:
    backend = ScriptedBackend(lambda _: "x" * 50, n_seq=2)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r0", [65], followed=False))
    assert not hand_over(scheduler, backend).followed
    scheduler.add(make_sequence(backend, "r1", [65], followed=True))
    assert hand_over(scheduler, backend).followed


def test_where_the_last_who_is_followed_leaves_results_come_together_from_then_on() -> None:
    backend = ScriptedBackend(n_seq=2, n_draft_max=0)
    scheduler = Scheduler(backend.facts)
    for name, followed in (("quiet", False), ("loud", True)):
        params: dict[str, Any] = {"followed": followed, "max_tokens": 50, "ignore_eos": True}
        scheduler.add(make_sequence(backend, name, [65], **params))
    assert hand_over(scheduler, backend).followed
    step(scheduler, backend)
    assert scheduler.schedule(backend.clock()) is None
    assert scheduler.abort("loud", backend.clock())
    plan = hand_over(scheduler, backend)
    assert (len(plan.entries), plan.followed) == (1, False)


def test_a_plan_says_who_never_drafts() -> None:
    """Nothing need be kept for the MTP head of those."""
    backend = ScriptedBackend(n_seq=3, n_draft_max=2)
    scheduler = Scheduler(backend.facts)
    for depth in (0, 1, None):
        scheduler.add(make_sequence(backend, f"depth {depth}", [5], depth=depth))
    plan = hand_over(scheduler, backend)
    assert [admission.drafts for admission in plan.admit] == [False, True, True]


@pytest.mark.parametrize(("depth", "kept"), [(None, False), (0, False), (1, True)])
def test_prompts_are_kept_for_who_drafts_in_any_case(depth: int | None, *, kept: bool) -> None:
    """Where drafts are not expected to pay."""
    backend = ScriptedBackend(n_seq=2, n_draft_max=2)
    scheduler = Scheduler(backend.facts)
    speculator = scheduler._speculator
    speculator.choice = replace(speculator.choice, keep_prompts=False)
    scheduler.add(make_sequence(backend, "r", [5], depth=depth))
    assert hand_over(scheduler, backend).keep_prompts == kept


def test_a_prompt_that_others_begin_with_is_kept_for_the_head() -> None:
    """Where drafts are not expected to pay: who begins with it later may draft."""
    backend = ScriptedBackend(n_seq=2, n_batch=40)
    scheduler = Scheduler(backend.facts, snapshot_bytes=1 << 20)
    speculator = scheduler._speculator
    speculator.choice = replace(speculator.choice, keep_prompts=False)
    for name in ("first", "second"):
        scheduler.add(make_sequence(backend, name, [60] * 70 + [len(name)]))
    assert hand_over(scheduler, backend).keep_prompts


def test_a_small_batch_cuts_drafts_before_it_leaves_anyone_out() -> None:
    backend = ScriptedBackend(lambda _: "x" * 50, n_seq=3, n_batch=5, acceptance=0.0)
    scheduler = Scheduler(backend.facts)
    for i in range(3):
        scheduler.add(make_sequence(backend, f"r{i}", [65]))
    plan = hand_over(scheduler, backend)
    assert [e.n_draft for e in plan.entries] == [2, 0, 0]


def test_a_sequence_generates_until_its_context_is_full() -> None:
    backend = ScriptedBackend(n_ctx=16, acceptance=1.0)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65] * 10, max_tokens=100, ignore_eos=True))
    completion = completions(run_to_end(scheduler, backend))["r"]
    assert completion.usage.total_tokens == 16
    assert completion.finish_reason == "length"


def test_a_stop_text_inside_a_step_drops_the_tokens_behind_it() -> None:
    backend = ScriptedBackend(lambda _: "abXcdefgh", acceptance=1.0, n_draft_max=8)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65], stop=("c",)))
    completion = completions(run_to_end(scheduler, backend))["r"]
    assert completion.text == "abX"
    assert backend.detokenize(completion.token_ids) == "abXc"
    assert completion.finish_reason == "stop"
    assert completion.drafted == 8
    assert completion.accepted == 2, "X and c; what came behind them is not counted"


def test_stop_tokens_end_a_request_and_are_not_shown() -> None:
    backend = ScriptedBackend(lambda _: "hi!there")
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65], stop_token_ids=(33,)))
    plan = hand_over(scheduler, backend)
    assert set(plan.admit[0].stop_token_ids) == {33, *backend.facts.eog_token_ids}
    completion = completions(run_to_end(scheduler, backend))["r"]
    assert (completion.text, completion.token_ids[-1]) == ("hi", 33)


def test_an_abort_while_a_step_runs_drops_its_result() -> None:
    backend = ScriptedBackend(n_seq=1, lag=1)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65], max_tokens=50, ignore_eos=True))
    run_step(scheduler, backend)
    event = scheduler.abort("r", 0.0)
    assert event is not None
    assert event.completion is not None
    assert len(event.completion.token_ids) == 1, "what had come before is kept"
    assert hand_over(scheduler, backend) == Plan(release=(0,), admit=(), entries=())
    assert step(scheduler, backend) == [], "the result of the step that ran meanwhile"
    assert backend.n_steps == 2
    assert not backend.active
    assert scheduler.abort("r", 0.0) is None


def test_times_are_those_of_the_callers_clock() -> None:
    backend = ScriptedBackend(lambda _: "abcd", n_seq=1, n_draft_max=0, step_time=0.5)
    scheduler = Scheduler(backend.facts)
    for name in ("first", "second", "third"):
        scheduler.add(make_sequence(backend, name, [65], max_tokens=2))
    backend.clock.advance(1.0)
    aborted = scheduler.abort("third", backend.clock())
    assert aborted is not None
    assert aborted.completion is not None
    assert aborted.completion.timings.total == 1.0
    assert aborted.completion.timings.queued == aborted.completion.timings.total
    done = completions(run_to_end(scheduler, backend))
    first, second = done["first"].timings, done["second"].timings
    assert (first.queued, first.prefill, first.first_token) == (1.0, 0.5, 1.5)
    assert (first.decode, first.total) == (0.5, 2.0)
    assert second.queued == 2.0
    stats = scheduler.stats
    assert stats.steps == 4
    assert stats.target_time == 2.0


def test_a_request_id_cannot_be_used_twice_at_a_time() -> None:
    backend = ScriptedBackend()
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65]))
    with pytest.raises(InternalError, match="added twice"):
        scheduler.add(make_sequence(backend, "r", [65]))


@pytest.mark.parametrize(
    "outcome",
    [
        EntryResult((), 1, 0, None),
        EntryResult((1, 2), 1, 0, None),
        EntryResult((1, 2), 4, 1, None),
        EntryResult((1, 2), 1, 2, None),
        EntryResult((1, 2, 3, 4, 5), 3, 4, "length"),
        EntryResult((), 0, 0, "stop"),
        EntryResult((270,), 0, 0, None),
        EntryResult((1, -1), 1, 1, None),
        EntryResult((1,), 0, 0, None, logprobs=(TokenLogprobs(1, 0.0, 1),)),
        EntryResult((1,), 0, 0, None, prompt_logprobs=(TokenLogprobs(1, 0.0, 1),)),
    ],
)
def test_a_result_that_the_plan_cannot_have_ends_its_request_alone(outcome: EntryResult) -> None:
    backend = ScriptedBackend(lambda _: "long answer")
    scheduler = Scheduler(backend.facts)
    for request_id in ("garbled", "other"):
        scheduler.add(make_sequence(backend, request_id, [65], max_tokens=9))
    plan = hand_over(scheduler, backend)
    assert len(plan.entries) == 2
    assert len(step(scheduler, backend)) == 2
    [result] = backend.exchange(None, wait=True)
    garbled, other = scheduler.update(replace(result, entries=(outcome, result.entries[1])), 0.0)
    assert isinstance(garbled.error, DecodeError)
    assert "was given" in str(garbled.error)
    assert garbled.error.completion is not None
    assert garbled.error.completion.text == "l", "what came before is kept"
    assert other.delta is not None
    assert hand_over(scheduler, backend).release == (0,)
    assert completions(run_to_end(scheduler, backend))["other"].text == "long answ"


def told(*token_ids: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_id, 0.0, 1) for token_id in token_ids)


@pytest.mark.parametrize(
    "outcome",
    [
        EntryResult((1,), 0, 0, None, told(1)),
        EntryResult((1,), 0, 0, None, told(1), told(66)),
        EntryResult((1,), 0, 0, None, (), told(66, 67)),
        EntryResult((1,), 0, 0, None, told(1, 2), told(66, 67)),
        EntryResult((), 0, 0, None, (), told(66, 67)),
    ],
)
def test_a_result_without_what_was_asked_is_noticed(outcome: EntryResult) -> None:
    backend = ScriptedBackend()
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65, 66, 67], logprobs=0, prompt_logprobs=0))
    plan = hand_over(scheduler, backend)
    assert plan.entries[0].scored == (66, 67)
    result = StepResult(1, (outcome,), 3, 1, 0, 0, 0.0, 0.0, 0.0, 0.0)
    [event] = scheduler.update(result, 0.0)
    assert isinstance(event.error, DecodeError)
    assert "was given" in str(event.error)


def test_a_prompt_that_is_scored_leaves_outputs_to_everyone_else() -> None:
    backend = ScriptedBackend(n_seq=3, n_ctx=256, n_batch=64, n_draft_max=3)
    assert backend.facts.n_outputs == 12
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "a", [65], depth=3, max_tokens=40, ignore_eos=True))
    run_step(scheduler, backend)
    for name in ("b", "c"):
        scheduler.add(make_sequence(backend, name, [66] * 100, prompt_logprobs=0, max_tokens=1))
    plan = scheduler.schedule(backend.clock())
    assert plan is not None
    # Each id has one, the drafts of the first three, and of the rest the second takes all.
    assert [len(entry.tokens) for entry in plan.entries] == [0, 7, 1]
    assert [len(entry.scored) for entry in plan.entries] == [0, 7, 1]
    assert backend.exchange(plan, wait=False) == []
    done = completions(run_to_end(scheduler, backend))
    for name in ("b", "c"):
        assert [t.token_id for t in done[name].prompt_logprobs or ()] == [66] * 99


def test_a_grammar_that_fails_ends_its_request_alone() -> None:
    backend = ScriptedBackend(lambda _: "long answer", n_seq=2)
    scheduler = Scheduler(backend.facts)
    for request_id in ("stuck", "free"):
        scheduler.add(make_sequence(backend, request_id, [1, 2], grammar="compiled", depth=0))
    plan = hand_over(scheduler, backend)
    assert [admission.grammar for admission in plan.admit] == ["compiled", "compiled"]
    [result] = backend.exchange(None, wait=True)
    assert len(scheduler.update(result, 1.0)) == 2
    [result] = backend.exchange(None, wait=True)
    _, other = result.entries
    stuck = replace(result, entries=(NO_RESULT, other), stuck=((0, "too hard"),))
    failed, went_on = scheduler.update(stuck, 2.0)
    assert isinstance(failed.error, GrammarError)
    assert "too hard" in str(failed.error)
    assert failed.error.completion is not None
    assert failed.error.completion.finish_reason == "error"
    assert len(failed.error.completion.token_ids) == 1
    assert went_on.delta is not None
    assert went_on.delta.token_ids == other.token_ids
    assert hand_over(scheduler, backend).release == (0,)
    scheduler.check_integrity()


def test_results_are_taken_in_the_order_of_the_plans() -> None:
    backend = ScriptedBackend()
    scheduler = Scheduler(backend.facts)

    def result(plan: int) -> StepResult:
        return StepResult(plan, (EntryResult((65,), 0, 0, None),), 1, 1, 0, 0, 0.0, 0.0, 0.0, 0.0)

    with pytest.raises(InternalError, match="of plan 1, which is not its turn"):
        scheduler.update(result(1), 0.0)
    scheduler.add(make_sequence(backend, "r0", [65]))
    assert scheduler.schedule(0.0)
    scheduler.add(make_sequence(backend, "r1", [65]))
    assert scheduler.schedule(0.0)
    with pytest.raises(InternalError, match="of plan 2, which is not its turn"):
        scheduler.update(result(2), 0.0)
    scheduler.update(result(1), 0.0)
    failed = scheduler.update(result(2), 0.0)
    assert [str(event.error) for event in failed] == [
        "the step this request took part in failed: 2 entries gave 1 results"
    ] * 2
    with pytest.raises(InternalError, match="of plan 1, which is not its turn"):
        scheduler.update(result(1), 0.0)


@pytest.mark.parametrize("n_shared", [0, 200])
def test_thousands_may_wait_and_leave_without_slowing_anyone(n_shared: int) -> None:
    """Work is counted in steps of the interpreter, which no busy machine can disturb."""

    def lines(n_waiting: int) -> int:
        backend = ScriptedBackend(n_seq=2, n_ctx=256, n_batch=512)
        scheduler = Scheduler(backend.facts, snapshot_bytes=10**9)
        for i in range(n_waiting):
            prompt = [*[65] * n_shared, 66 + i]
            scheduler.add(make_sequence(backend, f"r{i}", prompt))
        count = 0

        def trace(frame: object, event: str, argument: object) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        gc.disable()  # it may run finalizers of other tests, whose lines would be counted
        sys.settrace(trace)
        try:
            scheduler.abort(f"r{n_waiting // 2}", 0.0)
            plan = scheduler.schedule(0.0)
        finally:
            sys.settrace(None)
            gc.enable()
        assert plan is not None
        return count

    assert lines(5000) == lines(50)


def test_check_integrity_notices_a_lost_sequence_id() -> None:
    backend = ScriptedBackend()
    scheduler = Scheduler(backend.facts)
    scheduler._free.pop()
    with pytest.raises(InternalError, match="free, held or released"):
        scheduler.check_integrity()


def test_check_integrity_notices_who_is_planned_on_another_id_than_it_holds() -> None:
    backend = ScriptedBackend(n_seq=2)
    scheduler = Scheduler(backend.facts)
    sequence = make_sequence(backend, "r", [65])
    scheduler.add(sequence)
    hand_over(scheduler, backend)
    scheduler.check_integrity()
    sequence.seq_id = 1
    scheduler._free = [0]
    with pytest.raises(InternalError, match="takes part in the newest plan"):
        scheduler.check_integrity()


def test_the_scripted_model_refuses_plans_that_no_executor_could_run() -> None:
    backend = ScriptedBackend(n_seq=1)
    backend.exchange(Plan((0,), (), ()), wait=False)
    with pytest.raises(InternalError, match="release of free sequence 0"):
        backend.exchange(None, wait=True)
    backend = ScriptedBackend(n_seq=1)
    scheduler = Scheduler(backend.facts)
    scheduler.add(make_sequence(backend, "r", [65]))
    plan = hand_over(scheduler, backend)
    backend.exchange(plan, wait=True)
    with pytest.raises(InternalError, match="taken sequence"):
        backend.exchange(None, wait=True)
