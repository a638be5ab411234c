"""Cells that run short, requests that pause, and prompts that begin alike.

The scripted model keeps a record of every cell and snapshot, and refuses plans that need what is
not there. What it answers depends on every token of a prompt, so that a wrong prefix is noticed.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mtpbatch.exceptions import InternalError, InvalidParameterError
from mtpbatch.memory import Cells, Snapshots
from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.speculation import DraftWish
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.types import EngineConfig, Plan
from scheduling import completions, make_sequence, moves, run_step, run_to_end, step

MANY_BYTES = 10**9


class Recorder:
    """Stands between scheduler and backend, and keeps the plans."""

    def __init__(
        self, backend: ScriptedBackend, snapshot_bytes: int = MANY_BYTES, **facts: Any
    ) -> None:
        self.backend = backend
        self.scheduler = Scheduler(replace(backend.facts, **facts), snapshot_bytes)
        self.plans: list[Plan] = []
        self.n_queried: list[int] = []  # tokens of prompts, by then
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._record  # type: ignore[method-assign]
        self._names = iter(range(10**6))

    def _record(self, now: float) -> Plan | None:
        self.n_queried.append(self.scheduler.stats.prefix_queries)
        plan = self._schedule(now)
        if plan is not None:
            self.plans.append(plan)
        return plan

    def add(self, prompt: list[int], **params: Any) -> str:
        name = f"r{next(self._names)}"
        self.scheduler.add(make_sequence(self.backend, name, prompt, **params))
        return name

    def plan(self) -> Plan:
        plan = self.scheduler.schedule(self.backend.clock())
        assert plan is not None
        self.backend.exchange(plan, wait=False)
        return plan

    def step(self) -> list[Event]:
        return step(self.scheduler, self.backend)

    def run(self) -> dict[str, tuple[int, ...]]:
        done = completions(run_to_end(self.scheduler, self.backend))
        return {name: completion.token_ids for name, completion in done.items()}

    def run_one(self, prompt: list[int], **params: Any) -> tuple[int, ...]:
        """Its tokens, with nobody beside it."""
        name = self.add(prompt, **params)
        return self.run()[name]

    def all(self, field: str) -> list[Any]:
        return [item for plan in self.plans for item in getattr(plan, field)]


def unlike(number: int, n_tokens: int) -> list[int]:
    """A prompt that begins like no other."""
    chance = random.Random(number)
    return [97 + number % 26, *(chance.randrange(97, 123) for _ in range(n_tokens - 1))]


# ------------------------------------------------------------------------- draft depths


def test_requests_that_leave_their_depth_open_draft_on_terms() -> None:
    backend = ScriptedBackend(lambda _: "x" * 90, n_ctx=100, n_draft_max=3, acceptance=0.9)
    record = Recorder(backend)
    record.add([65], max_tokens=80, ignore_eos=True)
    record.add([66], max_tokens=80, ignore_eos=True, depth=2)
    record.run()
    for plan in record.plans:
        assert (plan.terms is not None) == any(entry.seq_id == 0 for entry in plan.entries)
    selective = {e.seq_id for plan in record.plans for e in plan.entries if e.selective}
    assert selective == {0}


def test_what_short_requests_did_is_learnt_from() -> None:
    """They end before anybody reviews how drafting goes."""
    backend = ScriptedBackend(lambda _: "x" * 90, n_ctx=100, n_draft_max=3, acceptance=0.0)
    record = Recorder(backend)
    for number in range(60):
        record.run_one([65 + number % 20], max_tokens=4, ignore_eos=True, depth=2, followed=False)
    habit = record.scheduler._speculator.new_habit(DraftWish(3, adaptive=True), 1)
    assert habit.gained[0] < 0.2


def test_results_of_a_trial_come_at_once_and_nothing_waits_for_them() -> None:
    """Once those on trial have ended, results come together again."""
    backend = ScriptedBackend(lambda _: "x" * 200, n_seq=2, n_ctx=64)
    record = Recorder(backend)
    tried = record.add([65], max_tokens=20, followed=False)
    record.add([66], max_tokens=60, depth=0, ignore_eos=True, followed=False)
    speculator = record.scheduler._speculator
    speculator.choice = replace(speculator.choice, trial=2, on_trial=frozenset({tried}))
    record.run()
    followed = [plan.followed for plan in record.plans if plan.entries]
    assert (followed[0], followed[-1]) == (True, False)
    assert all(one != next_ for one, next_ in pairwise(followed)), "each trial has one plan"
    assert {plan.run_ahead for plan in record.plans if plan.entries} == {4096}


# ------------------------------------------------------------------------ short of cells


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("lag", [0, 5])
@pytest.mark.parametrize("snapshot_bytes", [0, 120_000, MANY_BYTES])
def test_with_a_quarter_of_the_cells_everyone_finishes_with_the_same_tokens(
    truncates: bool, lag: int, snapshot_bytes: int
) -> None:
    n_seq, n_ctx = 8, 320
    backend = ScriptedBackend(
        lambda prompt: prompt[::-1],
        n_seq=n_seq,
        n_ctx=n_ctx,
        n_cells=n_seq * n_ctx // 4,
        truncates=truncates,
        lag=lag,
        acceptance=0.4,
    )
    record = Recorder(backend, snapshot_bytes)
    chance = random.Random(lag)
    expected = {}
    for number in range(20):
        prompt = unlike(number, chance.randrange(1, 60))
        n_tokens = chance.randrange(100, n_ctx - len(prompt))
        name = record.add(prompt, max_tokens=n_tokens, ignore_eos=True, priority=number % 3)
        expected[name] = tuple(backend.answer(prompt, n_tokens))
    assert record.run() == expected
    stats = record.scheduler.stats
    assert stats.preemptions >= 5
    kept = [resume.snapshot > 0 for resume in record.all("resume")]
    if snapshot_bytes == MANY_BYTES:
        assert all(kept)
        assert stats.prompt_tokens == stats.prefix_queries - stats.prefix_hits
    elif snapshot_bytes == 0:
        assert not any(kept)
    else:
        assert {True, False} == set(kept), "as many as there is memory for"


def test_the_youngest_of_the_lowest_priority_pauses_and_goes_on_before_new_ones() -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=3, n_ctx=100, n_cells=100, n_draft_max=0, lag=1
    )
    record = Recorder(backend)
    record.add([65], max_tokens=90, ignore_eos=True, priority=1)
    record.add([66], max_tokens=70, ignore_eos=True)
    record.add([67], max_tokens=70, ignore_eos=True)
    record.add([68], max_tokens=5, ignore_eos=True, priority=2)
    record.run()
    tickets = [admission.ticket for admission in record.all("admit")]
    begun = {a.seq_id: a.ticket for a in record.plans[0].admit}
    # The urgent ones were admitted first, and of the third there was one more to come.
    assert tickets[:3] == [begun[0], begun[1], begun[2]]
    first_parked = record.all("park")[0]
    assert first_parked.seq_id == 2, "the one of priority 1, though it came first"
    resumed = [i for i, plan in enumerate(record.plans) if plan.resume]
    admitted = [i for i, plan in enumerate(record.plans) if plan.admit]
    assert resumed[0] <= admitted[-1], "nobody begins before who paused goes on"


def test_a_request_that_ends_before_its_parking_takes_effect_is_forgotten() -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=2, n_ctx=64, n_cells=64, n_draft_max=0, lag=3
    )
    record = Recorder(backend)
    done: dict[str, tuple[int, ...]] = {}
    for n_tokens in range(4, 60):  # some of these end just then
        record.add([65], max_tokens=60, ignore_eos=True)
        record.add([66], max_tokens=n_tokens, ignore_eos=True)
        done |= record.run()
    assert [len(token_ids) for token_ids in done.values()].count(60) == 56
    assert sum(map(len, done.values())) == 56 * 60 + sum(range(4, 60))
    assert record.all("forget")
    assert not backend.parked


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_a_parked_request_waits_until_all_its_tokens_are_known(lag: int) -> None:
    """Even if all others end before: the model refuses to compute other tokens than it had."""
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=2, n_ctx=64, n_cells=64, n_draft_max=0, lag=lag
    )
    record = Recorder(backend, 0)
    done: dict[str, tuple[int, ...]] = {}
    for n_tokens in range(4, 60):  # some of these end just then
        record.add([65], max_tokens=n_tokens, ignore_eos=True)
        record.add([66], max_tokens=60, ignore_eos=True)
        done |= record.run()
    assert record.all("resume")
    assert sum(map(len, done.values())) == 56 * 60 + sum(range(4, 60))


@pytest.mark.parametrize("what", ["fail_save", "fail_restore"])
def test_a_parked_request_whose_state_is_lost_is_computed_again(what: str) -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=2, n_ctx=64, n_cells=64, n_draft_max=0, lag=2
    )
    for index in range(3):
        getattr(backend, what)(index)
    record = Recorder(backend)
    for token_id in (65, 66):
        record.add([token_id], max_tokens=60, ignore_eos=True)
    assert [len(token_ids) for token_ids in record.run().values()] == [60, 60]
    kept = [resume.snapshot > 0 for resume in record.all("resume")]
    assert kept == ([False] if what == "fail_save" else [True, False])
    assert not backend.snapshots


@pytest.mark.parametrize("snapshot_bytes", [0, MANY_BYTES], ids=["computed again", "saved"])
def test_how_drafting_went_is_still_known_after_a_pause(snapshot_bytes: int) -> None:
    backend = ScriptedBackend(lambda _: "x" * 200, n_seq=2, n_ctx=100, n_cells=100, acceptance=0.0)
    record = Recorder(backend, snapshot_bytes)
    for token_id in (65, 66):
        record.add([token_id], max_tokens=90, ignore_eos=True, depth=1)
    while not record.scheduler._parked:
        run_step(record.scheduler, backend)
    [paused] = [s for s in record.scheduler._waiting if s.request_id in record.scheduler._parked]
    habit = paused.habit
    habit.update()
    assert habit.gained[0] < 0.2, "no draft was accepted"
    while paused.seq_id is None:
        run_step(record.scheduler, backend)
    assert paused.habit is habit, "it is not taken for a new request"
    record.run()


def test_the_first_pauses_exceed_the_memory_for_states_by_no_more_than_one() -> None:
    """The executor is so far ahead that nobody has heard how large the first state is."""
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=8, n_ctx=128, n_cells=256, n_draft_max=0, lag=20
    )
    record = Recorder(backend, 20_000)  # 1,000 bytes a token
    for number in range(10):
        record.add(unlike(number, 3), max_tokens=56, ignore_eos=True)
    most: list[int] = []
    while record.scheduler.stats.running or record.scheduler.stats.waiting:
        run_step(record.scheduler, backend)
        kept = [len(s.token_ids) * 1000 for s in backend._snapshots.values() if s is not None]
        most = max(most, kept, key=sum)
    assert record.scheduler.stats.preemptions > 1
    assert sum(most) > 20_000 >= sum(most) - max(most)


def test_a_parked_request_can_be_cancelled() -> None:
    backend = ScriptedBackend(lambda _: "x" * 200, n_seq=2, n_ctx=64, n_cells=64, n_draft_max=0)
    record = Recorder(backend)
    record.add([65], max_tokens=60, ignore_eos=True)
    record.add([66], max_tokens=60, ignore_eos=True)
    while not record.all("park"):
        while plan := record.scheduler.schedule(0.0):
            backend.exchange(plan, wait=False)
        record.step()
    record.step()
    assert backend.parked
    assert backend.snapshots
    event = record.scheduler.abort("r1", 0.0)
    assert event is not None
    assert event.completion is not None
    assert len(event.completion.token_ids) > 5, "what it had generated is not lost"
    record.run()
    assert not backend.parked
    assert not backend.snapshots


def test_near_the_end_of_the_cells_plans_do_not_come_with_every_step() -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 2000, n_seq=2, n_ctx=1000, n_cells=1000, n_draft_max=0, lag=1
    )
    record = Recorder(backend, 0)
    for token_id in (65, 66):
        record.add([token_id], max_tokens=990, ignore_eos=True)
    record.run()
    assert record.scheduler.stats.preemptions == 1
    assert backend.n_steps > 1400
    assert len(record.plans) < 60


def test_cells_that_never_run_short_are_not_counted() -> None:
    backend = ScriptedBackend(lambda _: "x" * 200, n_seq=2, n_ctx=64, n_draft_max=0)
    record = Recorder(backend)
    record.add([65], max_tokens=60, ignore_eos=True)
    assert record.plan().run_ahead == 4096
    record.run()
    assert len(record.plans) == 2, "the request, and its release"


@settings(max_examples=300)
@given(data=st.data())
def test_no_executor_begins_more_steps_than_were_reckoned_with(data: st.DataObject) -> None:
    """Against an executor that may be as quick or as slow as it likes, and so may the scheduler."""
    cells = Cells(ScriptedBackend(n_seq=10**6, n_ctx=10**6, n_cells=10**9).facts)
    plans: list[int] = []  # that wait: how far ahead each may run
    standing, stepped = 0, True  # the plan that stands, and whether it has begun
    results: list[bool] = []  # not taken in: whether each is of its plan's first step
    n_begun = n_taken = n_ahead = 0
    for _ in range(data.draw(st.integers(1, 60))):
        if data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(0, len(results)))):
                first = results.pop(0)
                cells.take_in(first=first)
                n_taken += 1
                n_ahead -= first
            if n_ahead < 2 and data.draw(st.booleans()):
                plans.append(cells.plan([], data.draw(st.integers(0, 6))))
                n_ahead += 1
            elif n_ahead < 2:
                assert cells.stand([])
        elif plans and stepped:
            standing, stepped = plans.pop(0), False
        elif not stepped or (standing and n_begun - n_taken <= standing):
            results.append(not stepped)
            n_begun, stepped = n_begun + 1, True
        assert n_begun <= cells._n_begun


def test_a_snapshot_needs_cells_for_all_of_it_though_less_is_kept() -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=3, n_ctx=256, n_cells=300, n_draft_max=0, lag=1
    )
    record = Recorder(backend)
    common = unlike(0, 240)
    record.run_one(common, max_tokens=5)
    record.add(unlike(1, 60), max_tokens=60, ignore_eos=True)
    record.add([*common[:70], 65], max_tokens=20, ignore_eos=True)
    done = record.run()
    assert [len(token_ids) for token_ids in done.values()] == [60, 20], "one after the other"
    assert [a.n_reused for a in record.all("admit")] == [0, 0, 70]


def test_check_integrity_notices_cells_that_may_run_out() -> None:
    backend = ScriptedBackend(n_seq=2, n_ctx=64, n_cells=64)
    record = Recorder(backend)
    record.add([65], max_tokens=60)
    record.plan()
    record.scheduler._cells._n_cells = 3
    with pytest.raises(InternalError, match="may run out"):
        record.scheduler.check_integrity()


def test_fewer_cells_than_one_request_may_need_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match="n_cells: must be at least n_ctx=64, got 63"):
        EngineConfig(n_ctx=64, n_cells=63)


# ------------------------------------------------------------- gaps between sequence ids


def scattered(*, lag: int = 0, n_draft_max: int = 3, **scheduler: Any) -> Recorder:
    """Sixteen requests, of which those on the ids 0, 5, 10 and 15 go on when the others end."""
    backend = ScriptedBackend(
        lambda prompt: prompt[::-1],
        n_seq=16,
        n_batch=512,
        n_draft_max=n_draft_max,
        lag=lag,
    )
    record = Recorder(backend, **{"consecutive_ids": True} | scheduler)
    for number in range(16):
        n_tokens = 5 if number % 5 else 100
        record.add(unlike(number, 20), depth=n_draft_max, max_tokens=n_tokens, ignore_eos=True)
    return record


def answers(record: Recorder) -> dict[str, tuple[int, ...]]:
    """What comes of all requests in the end."""
    sequences = [*record.scheduler._running.values(), *record.scheduler._waiting]
    return {s.request_id: tuple(record.backend.answer(s.prompt, s.max_tokens)) for s in sequences}


def moved(record: Recorder) -> list[dict[int, int]]:
    return [found for plan in record.plans if (found := moves(plan))]


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_who_is_left_on_scattered_ids_moves_together(lag: int) -> None:
    record = scattered(lag=lag)
    measure(record.scheduler._snapshots, 200, 200_000)
    expected = answers(record)
    assert record.run() == expected, "and no token is lost"
    assert moved(record) == [{5: 1, 10: 2, 15: 3}]
    [plan] = [plan for plan in record.plans if plan.park]
    assert sorted(entry.seq_id for entry in plan.entries) == [0, 1, 2, 3]
    dropped = [p.number for p in record.plans if set(p.drop) >= {s.snapshot for s in plan.park}]
    assert dropped, "what it took in host memory is given back"
    assert record.scheduler.stats.preemptions == 0


def test_the_first_to_move_shows_how_large_a_state_is() -> None:
    record = scattered(n_draft_max=0)
    expected = answers(record)
    assert record.run() == expected
    assert moved(record) == [{5: 1}, {10: 2, 15: 3}]


@pytest.mark.parametrize("without", [{"consecutive_ids": False}, {"snapshot_bytes": 0}])
def test_nobody_moves_where_gaps_cost_nothing_or_no_state_can_be_kept(without: Any) -> None:
    record = scattered(**without)
    expected = answers(record)
    assert record.run() == expected
    assert not record.all("park")


def test_who_waits_fills_gaps_instead() -> None:
    record = scattered()
    for number in range(16, 16 + 12):
        record.add(unlike(number, 20), max_tokens=100, ignore_eos=True)
    expected = answers(record)
    assert record.run() == expected
    admitted = [a.seq_id for plan in record.plans[1:] for a in plan.admit]
    assert sorted(admitted) == [s for s in range(16) if s % 5]
    begun = next(i for i, plan in enumerate(record.plans) if len(plan.entries) == 16 and i)
    assert not any(moves(plan) for plan in record.plans[: begun + 1])


def test_who_has_just_lost_a_neighbour_stays_for_some_steps() -> None:
    """Others may end soon as well: each move costs copying."""
    backend = ScriptedBackend(
        lambda prompt: prompt[::-1], n_seq=8, n_ctx=128, n_batch=512, n_draft_max=0
    )
    record = Recorder(backend, consecutive_ids=True)
    order = [3, 5, 1, 6, 2, 4, 0, 7]  # one ends after the other, three steps apart
    for number in range(8):
        n_tokens = 10 + 3 * order.index(number)
        record.add(unlike(number, 20), max_tokens=n_tokens, ignore_eos=True)
    record.run()
    assert not record.all("park")


def test_neighbours_stay_wherever_they_are() -> None:
    backend = ScriptedBackend(lambda prompt: prompt[::-1], n_seq=8, n_ctx=128, n_draft_max=0)
    record = Recorder(backend, consecutive_ids=True)
    for number in range(8):
        n_tokens = 100 if number in (3, 4, 5) else 5
        record.add(unlike(number, 5), max_tokens=n_tokens, ignore_eos=True)
    record.run()
    assert not record.all("park")


@pytest.mark.parametrize(("seconds", "n_steps"), [(1e-4, 4), (0.1, 60), (0.2, None)])
def test_moving_may_take_as_long_as_the_steps_since_there_are_gaps(
    seconds: float, n_steps: int | None
) -> None:
    """Three states are saved and restored, which takes so long for each; a step takes 10 ms."""
    record = scattered(n_draft_max=0)
    snapshots = record.scheduler._snapshots
    measure(snapshots, 200, 1000)
    snapshots.copied(1000, seconds)
    moved_after = None
    while record.scheduler.stats.running or record.scheduler.stats.waiting:
        while (plan := record.scheduler.schedule(0.0)) is not None:
            record.backend.exchange(plan, wait=False)
            if moves(plan):
                moved_after = record.backend.n_steps - 5  # since the others ended
        record.step()
    assert moved_after == n_steps


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("what", ["fail_save", "fail_restore"])
def test_who_is_lost_in_moving_is_computed_again(what: str, lag: int) -> None:
    record = scattered(lag=lag)
    getattr(record.backend, what)(1)
    expected = answers(record)
    assert record.run() == expected
    assert [resume.snapshot > 0 for resume in record.all("resume")] == [True] * 3 + [False]
    assert not record.backend.snapshots - record.scheduler._snapshots._cached.keys()


@pytest.mark.parametrize("lag", [0, 3, 9])
def test_who_ends_before_it_moves_is_there_for_its_next_turn(lag: int) -> None:
    """Its end is not known when the plan is made, and its state goes where it is moved to."""
    n_moved = 0
    for n_tokens in range(44, 70):  # some of these end just then
        backend = ScriptedBackend(
            lambda _: "x" * 200, n_seq=3, n_ctx=200, n_draft_max=0, lag=lag, truncates=False
        )
        record = Recorder(backend, consecutive_ids=True)
        prompts = [unlike(number, 60) for number in range(3)]
        for prompt, n in zip(prompts, (120, 40, n_tokens), strict=True):
            record.add(prompt, max_tokens=n, ignore_eos=True)
        done = record.run()
        n_moved += len(moved(record))
        record.run_one([*prompts[2], *done["r2"], 65], max_tokens=3)
        assert record.all("admit")[-1].n_reused == 60 + n_tokens - 1
        assert record.scheduler.stats.prefix_hits == 60 + n_tokens - 1, "it was not lost"
    assert n_moved > 10


# ----------------------------------------------------------------- prompts that begin alike


@pytest.fixture(params=[True, False], ids=["truncates", "recurrent"])
def sharing(request: pytest.FixtureRequest) -> Recorder:
    backend = ScriptedBackend(
        lambda prompt: prompt[-9:],
        n_seq=16,
        n_ctx=2200,
        n_batch=512,
        truncates=request.param,
        lag=1,
    )
    return Recorder(backend)


def test_a_prefix_that_many_share_is_computed_once(sharing: Recorder) -> None:
    common = unlike(0, 2000)
    expected = {}
    for number in range(64):
        prompt = [*common, *unlike(number, 20 + number)]
        name = sharing.add(prompt, max_tokens=10)
        answer = sharing.backend.answer(prompt, 10)
        expected[name] = tuple(answer[: answer.index(max(answer)) + 1])  # to the end token
    assert sharing.run() == expected
    stats = sharing.scheduler.stats
    n_tails = sum(20 + number for number in range(64))
    assert stats.prefix_queries == 64 * 2000 + n_tails
    assert stats.prompt_tokens == stats.prefix_queries - stats.prefix_hits
    assert stats.prompt_tokens <= 2000 + n_tails + 63 * 31, "less than a block more for each"


def test_without_it_everybody_computes_everything(sharing: Recorder) -> None:
    sharing = Recorder(sharing.backend, 0)
    for number in range(8):
        sharing.add([*unlike(0, 500), *unlike(number, 20)], max_tokens=5)
    sharing.run()
    stats = sharing.scheduler.stats
    assert (stats.prompt_tokens, stats.prefix_queries, stats.prefix_hits) == (8 * 520, 0, 0)
    assert not sharing.all("save")


def test_who_would_compute_the_same_waits_for_it_and_nobody_else_does(sharing: Recorder) -> None:
    common = unlike(0, 100)
    for tail in (65, 66):
        sharing.add([*common, tail, tail], max_tokens=5)
    sharing.add(unlike(1, 30), max_tokens=5)
    first = sharing.plan()
    assert first.admit[1].ticket == first.admit[0].ticket + 2, "the last goes before the second"
    lengths = [len(entry.tokens) for entry in first.entries]
    assert lengths == [96, 30], "the first stops where they part"
    second = sharing.plan()
    assert [save.seq_id for save in second.save] == [0]
    assert [a.n_reused for a in second.admit] == [96]
    assert second.admit[0].snapshot == second.save[0].snapshot
    assert sorted(len(entry.tokens) for entry in second.entries) == [0, 6, 6]
    sharing.run()


@pytest.mark.parametrize("shares_prompt", [False, True])
@pytest.mark.parametrize("why", ["too large", "too dear to copy"])
def test_nobody_waits_for_a_snapshot_that_would_be_refused(
    sharing: Recorder, why: str, *, shares_prompt: bool
) -> None:
    record = Recorder(sharing.backend, 50_000 if why == "too large" else MANY_BYTES)
    record.run_one(unlike(1, 90), max_tokens=5)  # which shows that a token has 1,000 bytes
    record.scheduler._snapshots.copied(10**6, 0.0 if why == "too large" else 1.0)
    for number in range(4):
        tail = 65 if shares_prompt else 65 + number
        record.add([*unlike(0, 100), tail], shares_prompt=shares_prompt, max_tokens=5)
    plan = record.plan()
    assert [len(entry.tokens) for entry in plan.entries] == [101] * 4, "and no prompt is cut"
    record.run()


def test_who_waited_for_a_snapshot_that_is_refused_begins_together_with_others(
    sharing: Recorder,
) -> None:
    for tail in range(65, 69):
        sharing.add([*unlike(0, 100), tail], max_tokens=5)
    assert len(sharing.plan().admit) == 1
    snapshots = sharing.scheduler._snapshots
    snapshots.report(snapshots.keep(100, 0.0), MANY_BYTES)  # by now somebody was parked
    plan = sharing.plan()
    assert not plan.save
    assert sorted(len(entry.tokens) for entry in plan.entries) == [1, 101, 101, 101]
    sharing.run()


@pytest.mark.parametrize("n_shared", [0, 64, 90], ids=["alone", "a start", "nearly all"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
def test_a_prompt_of_n_requests_is_computed_once(
    sharing: Recorder, n_shared: int, together: bool
) -> None:
    """Also where another request shares some of it, and when the first has begun alone."""
    prompt = unlike(0, 100)
    other = [*prompt[:n_shared], *unlike(1, 100 - n_shared)]
    sharing.add(other, max_tokens=5)
    answer = tuple(sharing.backend.answer(prompt, 5))
    expected = {}
    for _ in range(6):
        expected[sharing.add(prompt, shares_prompt=True, max_tokens=5)] = answer
        if not together and (plan := sharing.scheduler.schedule(0.0)):
            sharing.backend.exchange(plan, wait=False)
    done = sharing.run()
    assert {name: done[name] for name in expected} == expected
    stats = sharing.scheduler.stats
    assert stats.prefix_queries == 700
    assert stats.prompt_tokens == stats.prefix_queries - stats.prefix_hits
    assert stats.prompt_tokens <= 100 + 100 + 5, "the last token is computed by each"


def test_a_short_prompt_of_n_requests_is_not_worth_a_snapshot(sharing: Recorder) -> None:
    for _ in range(4):
        sharing.add(unlike(0, 64), shares_prompt=True, max_tokens=1, ignore_eos=True)
    sharing.run()
    assert sharing.scheduler.stats.prompt_tokens == 4 * 64


def test_who_waits_for_a_shared_prompt_can_be_cancelled(sharing: Recorder) -> None:
    common = unlike(0, 100)
    names = [sharing.add([*common, tail], max_tokens=5) for tail in (65, 66, 67)]
    sharing.plan()
    assert sharing.scheduler.abort(names[1], 0.0)
    sharing.scheduler.check_integrity()
    assert sharing.run().keys() == {names[0], names[2]}


def test_what_is_waited_for_may_not_come(sharing: Recorder) -> None:
    common = unlike(0, 100)
    names = [sharing.add([*common, tail], max_tokens=5) for tail in (65, 66)]
    sharing.plan()
    assert sharing.scheduler.abort(names[0], 0.0)
    assert [a.snapshot for a in sharing.plan().admit] == [0]
    assert sharing.run().keys() == {names[1]}


def test_a_conversation_goes_on_where_it_ended(sharing: Recorder) -> None:
    prompt = unlike(0, 80)
    answer = list(sharing.run_one(prompt, max_tokens=40, ignore_eos=True))
    sharing.run_one([*prompt, *answer, *unlike(1, 30)], max_tokens=5)
    # The token that is sampled last has never been computed.
    assert sharing.all("admit")[1].n_reused == 80 + 40 - 1


def test_a_stop_text_ends_in_the_middle_of_what_is_saved() -> None:
    backend = ScriptedBackend(
        lambda _: "one two STOP three", n_ctx=400, n_draft_max=8, acceptance=1.0, truncates=False
    )
    record = Recorder(backend)
    prompt = unlike(0, 80)
    record.run_one(prompt, max_tokens=40, stop=("STOP",))
    assert len(record.all("save")) == 1
    held = backend._snapshots[record.all("save")[0].snapshot]
    assert held is not None
    record.run_one([*held.token_ids, 65], max_tokens=5)
    assert record.all("admit")[1].n_reused == len(held.token_ids) > 80


def test_traffic_that_shares_nothing_saves_nothing_but_what_may_go_on(sharing: Recorder) -> None:
    n_tokens = [10, 30, 54, 63, 64, 100, 600, 1500]
    for number, n in enumerate(n_tokens):
        sharing.add(unlike(number, n), max_tokens=8, ignore_eos=True)
    without = Recorder(sharing.backend, 0)
    sharing.run()
    assert len(sharing.all("save")) == sum(n + 8 - 1 >= 64 for n in n_tokens)
    assert all(plan.release for plan in sharing.plans if plan.save), "of those that ended"
    for number, n in enumerate(n_tokens):
        without.add(unlike(number, n), max_tokens=8, ignore_eos=True)
    without.run()
    chunks = [[len(e.tokens) for p in r.plans for e in p.entries] for r in (sharing, without)]
    assert chunks[0] == chunks[1], "and no prompt is cut for it"


def test_a_request_can_keep_out_of_it(sharing: Recorder) -> None:
    prompt = unlike(0, 200)
    sharing.run_one(prompt, max_tokens=5, reuse_prefix=False)
    assert not sharing.all("save"), "it is not written"
    sharing.run_one(prompt, max_tokens=5)
    assert len(sharing.all("save")) == 1
    sharing.run_one(prompt, max_tokens=5, reuse_prefix=False)
    assert sharing.all("admit")[-1].snapshot == 0, "and it does not read"
    assert sharing.scheduler.stats.prefix_queries == 200


def test_a_prompt_that_is_scored_is_computed_for_others_too(sharing: Recorder) -> None:
    prompt = unlike(0, 200)
    for _ in range(2):
        sharing.run_one(prompt, max_tokens=5, prompt_logprobs=0)
    assert [a.snapshot for a in sharing.all("admit")] == [0, 0], "it does not read"
    sharing.run_one([*prompt, 65], max_tokens=5)
    assert sharing.all("admit")[-1].n_reused >= 192, "but it is written"
    assert sharing.scheduler.stats.prefix_queries == 201


def test_a_prompt_that_is_scored_waits_for_nobody(sharing: Recorder) -> None:
    common = unlike(0, 100)
    for tail in (65, 66):
        sharing.add([*common, tail], max_tokens=5, prompt_logprobs=0)
    assert [a.snapshot for a in sharing.plan().admit] == [0, 0]
    sharing.run()


def test_a_prompt_that_starts_again_is_scored_once() -> None:
    backend = ScriptedBackend(
        lambda _: "x" * 200, n_seq=2, n_ctx=64, n_cells=64, n_batch=2, n_draft_max=0
    )
    record = Recorder(backend)
    record.add([65], max_tokens=60, ignore_eos=True)
    prompt = [66, *range(97, 127)]
    name = record.add(prompt, max_tokens=3, ignore_eos=True, prompt_logprobs=1)
    ends = completions(run_to_end(record.scheduler, backend))
    assert record.scheduler.stats.preemptions > 0
    assert record.scheduler.stats.prompt_tokens > 1 + len(prompt), "some of it came twice"
    told = ends[name].prompt_logprobs
    assert told is not None
    assert [t.token_id for t in told] == prompt[1:]


def test_who_never_drafts_has_a_cache_of_its_own(sharing: Recorder) -> None:
    prompt = [*unlike(0, 200)]
    sharing.run_one(prompt, max_tokens=5, depth=0)
    sharing.run_one([*prompt, 65], max_tokens=5)
    assert [a.n_reused for a in sharing.all("admit")] == [0, 0]


def test_a_prefix_that_cannot_be_restored_is_computed(sharing: Recorder) -> None:
    backend = sharing.backend
    backend.fail_restore(0)
    common = unlike(0, 100)
    prompts = [[*common, 65], [*common, 66], [*common, 67]]
    expected = {sharing.add(p, max_tokens=5): tuple(backend.answer(p, 5)) for p in prompts}
    tokens = sharing.run()
    assert tokens == {name: tokens[name] for name in expected}
    assert all(expected[name][: len(tokens[name])] == tokens[name] for name in expected)
    first = sharing.all("save")[0].snapshot
    assert first in sharing.all("drop"), "nobody else tries it"
    stats = sharing.scheduler.stats
    assert stats.prefix_queries == sum(map(len, prompts)), "what was in vain is not counted"
    assert sharing.n_queried == sorted(sharing.n_queried), "nor taken back"
    assert stats.prompt_tokens == stats.prefix_queries - stats.prefix_hits


def test_memory_goes_to_what_was_used_last() -> None:
    backend = ScriptedBackend(n_ctx=400, n_seq=1)
    record = Recorder(backend, 250_000)  # 1,000 bytes a token
    prompts = [unlike(number, 100) for number in range(3)]
    for prompt in (prompts[0], prompts[1], [*prompts[0], 65], prompts[2]):
        record.run_one(prompt, max_tokens=1, ignore_eos=True)
    kept = [snapshot for snapshot in backend._snapshots.values() if snapshot is not None]
    assert [list(s.token_ids[:100]) for s in kept] == [prompts[0], prompts[2]]


@pytest.mark.anyio
async def test_a_completion_says_what_was_there_already() -> None:
    async with open_scripted_engine(ScriptedBackend(n_ctx=400)) as engine:
        prompt = unlike(0, 150)
        first = await engine.generate(prompt, max_tokens=5)
        second = await engine.generate([*prompt, 65], max_tokens=5)
        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens == 150
        stats = engine.stats()
        assert (stats.prefix_queries, stats.prefix_hits) == (301, 150)
        assert stats.preemptions == 0


def test_figures_of_memory_are_those_of_the_executor() -> None:
    backend = ScriptedBackend(
        lambda prompt: prompt[::-1], n_seq=4, n_ctx=320, n_cells=400, n_batch=40, acceptance=0.5
    )
    record = Recorder(backend, MANY_BYTES)
    chance = random.Random(0)
    for number in range(12):
        prompt = unlike(number, chance.randrange(70, 120))
        record.add(prompt, max_tokens=chance.randrange(50, 150), ignore_eos=True)
    most = 0
    while record.scheduler.stats.waiting or record.scheduler.stats.running:
        run_step(record.scheduler, backend)
        used = record.scheduler.stats.kv_cells_used
        assert used == sum(len(s.token_ids) for s in backend._sequences.values() if not s.over)
        most = max(most, used)
    record.run()  # what the last one leaves to do
    stats = record.scheduler.stats
    kept = [snapshot.token_ids for snapshot in backend._snapshots.values() if snapshot]
    assert stats.snapshot_bytes == 1000 * sum(map(len, kept)) > 0
    assert (stats.kv_cells_used, stats.n_cells) == (0, 400)
    assert stats.preemptions > 0
    assert 300 < most <= 400


# -------------------------------------------------------------------------------- snapshots


def test_snapshots_keep_to_their_budget_and_parked_requests_come_first() -> None:
    snapshots = Snapshots(1000)
    one, two = snapshots.take(100, 0.0), snapshots.take(100, 0.0)
    snapshots.report(one, 400)
    snapshots.report(two, 400)
    assert snapshots.size(200) == 800, "by what has been seen"
    snapshots.use(one)
    parked = snapshots.keep(100, 0.0)
    assert snapshots.take_dropped() == (two,)
    snapshots.report(parked, 700)
    assert snapshots.take_dropped() == (one,)
    snapshots.check_integrity()
    assert snapshots.take(100, 0.0) == 0, "beside the parked one there is no room"
    snapshots.drop(parked)
    assert snapshots.take_dropped() == (parked,)
    assert snapshots.take(100, 0.0) > parked, "a number is used once"


def measure(snapshots: Snapshots, n_tokens: int, n_bytes: int) -> None:
    snapshots.report(take_in_time(snapshots, n_tokens), n_bytes)


def take_in_time(snapshots: Snapshots, n_tokens: int, token_seconds: float = 0.0) -> int:
    """A prompt's snapshot, which may be refused some times."""
    asked = (snapshots.take(n_tokens, token_seconds) for _ in range(5000))
    return next(number for number in asked if number)


def test_the_size_of_a_snapshot_is_a_part_that_is_always_there_and_one_for_each_token() -> None:
    snapshots = Snapshots(10**6)
    for n_tokens, n_bytes in ((100, 1100), (400, 1400), (200, 1200)):
        measure(snapshots, n_tokens, n_bytes)
    sizes = [snapshots.size(n) for n in (50, 100, 300, 1000)]
    assert sizes == pytest.approx([1050, 1100, 1300, 2000], rel=0.05)


def test_one_length_alone_does_not_say_which_part_is_which() -> None:
    snapshots = Snapshots(10**6)
    measure(snapshots, 100, 1000)
    assert [snapshots.size(n) for n in (50, 200)] == [1000, 2000], "the most that they can have"


def test_lengths_that_hardly_differ_say_little_of_long_ones() -> None:
    """All tokens of the second wait for the MTP head, of the first none: it is half as large."""
    snapshots = Snapshots(10**7)
    for n_tokens, n_bytes in ((100, 100_000), (101, 202_000)):
        measure(snapshots, n_tokens, n_bytes)
    assert 3000 * 1000 <= snapshots.size(3000) <= 3000 * 2000
    assert snapshots.take(3000, 0.0), "there is room for it"


LENGTHS = st.integers(1, 10**5)


@settings(max_examples=50)
@given(
    before=st.lists(st.tuples(LENGTHS, st.integers(1, 10**10)), max_size=20),
    lengths=st.lists(LENGTHS, min_size=1, max_size=4, unique=True),
    always=st.integers(1, 10**8),
    each=st.integers(0, 10**4),
)
def test_sizes_come_right_whatever_was_measured_before(
    before: list[tuple[int, int]], lengths: list[int], always: int, each: int
) -> None:
    snapshots = Snapshots(10**12)
    for n_tokens, n_bytes in before:
        measure(snapshots, n_tokens, n_bytes)
    for _ in range(400 // len(lengths)):
        for n_tokens in lengths:
            measure(snapshots, n_tokens, always + each * n_tokens)
    longest = always + each * max(lengths)
    for n_tokens in (*lengths, sum(lengths) // len(lengths)):
        assert abs(snapshots.size(n_tokens) - (always + each * n_tokens)) <= 0.1 * longest


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(LENGTHS, st.integers(1, 10**9)), max_size=5),
    copies=st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.0, 100.0)), max_size=5),
    n_tokens=st.integers(64, 5000),
)
def test_nothing_is_refused_for_ever_because_of_what_was_measured_before(
    sizes: list[tuple[int, int]], copies: list[tuple[int, float]], n_tokens: int
) -> None:
    snapshots = Snapshots(10**6)
    for length, n_bytes in sizes:
        measure(snapshots, length, n_bytes)
    for n_bytes, seconds in copies:
        snapshots.copied(n_bytes, seconds)
    for _ in range(300):  # it has room, and is cheap
        number = take_in_time(snapshots, n_tokens, 0.001)
        snapshots.report(number, 100 * n_tokens)
        snapshots.copied(100 * n_tokens, 1e-9 * 100 * n_tokens)
        snapshots.check_integrity()
    assert all(snapshots.take(n_tokens, 0.001) for _ in range(10)), "from then on none is refused"


def test_what_is_tried_and_turns_out_too_large_takes_nothing_from_others() -> None:
    snapshots = Snapshots(1000)
    measure(snapshots, 100, 400)
    assert not snapshots.would_take(1000, 0.0)
    assert not snapshots.take(1000, 0.0)
    tried = take_in_time(snapshots, 1000)
    assert not snapshots.take_dropped()
    snapshots.check_integrity()
    assert not any(snapshots.take(1000, 0.0) for _ in range(35)), "one is enough for a while"
    snapshots.report(tried, 4000)
    assert snapshots.take_dropped() == (tried,)
    assert snapshots.n_bytes == 400


def test_before_any_size_is_known_one_parked_request_is_saved_at_a_time() -> None:
    snapshots = Snapshots(1000)
    failed = snapshots.keep(100, 0.0)
    assert not snapshots.keep(100, 0.0)
    snapshots.report(failed, 0)
    first = snapshots.keep(100, 0.0)
    assert not snapshots.keep(100, 0.0), "nothing is known yet"
    snapshots.report(first, 500)
    assert snapshots.keep(100, 0.0)
    assert not snapshots.keep(1, 0.0), "it is full"


def test_what_costs_more_to_copy_than_to_compute_is_computed() -> None:
    snapshots = Snapshots(10**6)
    snapshots.report(snapshots.take(100, 0.0), 1000)
    snapshots.copied(1000, 1.0)  # so a token takes 10 ms to copy
    assert snapshots.keep(100, 2.1)
    assert not snapshots.keep(100, 1.9), "it would be saved and restored"
    assert snapshots.take(100, 0.041)
    assert not snapshots.take(100, 0.039), "it may never be used"
    for _ in range(50):
        snapshots.copied(1000, 0.1)  # faster by now
    assert snapshots.take(100, 0.039)


def test_a_snapshot_that_could_not_be_taken_is_none() -> None:
    snapshots = Snapshots(1000)
    number = snapshots.take(100, 0.0)
    snapshots.report(number, 0)
    assert snapshots.take_dropped() == (number,)
    snapshots.report(number, 100)  # it had gone by then
    snapshots.check_integrity()
    assert Snapshots(0).take(100, 0.0) == Snapshots(0).keep(100, 0.0) == 0
