"""How deep requests draft: what they ask for, and what pays."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.speculation import (
    Calibration,
    Cost,
    CostModel,
    DraftWish,
    Habit,
    Speculator,
    draft_wish,
)
from mtpbatch.testing import (
    ClosedLoop,
    Drafts,
    RequestKind,
    StepCost,
    Uniform,
    simulate,
    steady,
)
from mtpbatch.types import N_CONFIDENCES, EngineConfig, ModelFacts, Speculation, StepResult


def facts(n_draft_max: int) -> ModelFacts:
    return ModelFacts(
        n_ctx=64,
        n_seq=2,
        n_batch=32,
        n_draft_max=n_draft_max,
        n_vocab=100,
        eog_token_ids=frozenset(),
        n_cells=128,
        n_ubatch=32,
    )


@pytest.mark.parametrize(
    ("requested", "configured", "depth"),
    [
        (None, "auto", 3),
        (None, 2, 2),
        (None, 0, 0),
        ("auto", 1, 3),
        (0, "auto", 0),
        (1, 3, 1),
        (3, 0, 3),
    ],
)
def test_the_requests_wish_goes_before_the_configs(
    requested: Speculation | None, configured: Speculation, depth: int
) -> None:
    assert draft_wish(requested, EngineConfig(speculation=configured), facts(3)).limit == depth


@pytest.mark.parametrize("requested", [None, "auto", 0])
def test_without_heads_nothing_is_drafted(requested: Speculation | None) -> None:
    assert draft_wish(requested, EngineConfig(), facts(0)).limit == 0


def test_without_heads_asking_for_drafts_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InvalidParameterError, match=r"no MTP heads.*use speculation=0") as caught:
        draft_wish(1, EngineConfig(), facts(0))
    assert caught.value.parameter == "speculation"


def test_deeper_than_the_engine_drafts_is_an_error() -> None:
    with pytest.raises(InvalidParameterError, match="4 is deeper than n_draft_max=3"):
        draft_wish(4, EngineConfig(), facts(3))


# ------------------------------------------------------------------------- what things cost


def taught(cost: Cost, sizes: Sequence[int], n: int, *, a: float, b: float, noise: float) -> Cost:
    """After n passes that take a + b * rows, give or take."""
    chance = random.Random(0)
    for i in range(n):
        rows = sizes[i % len(sizes)]
        cost.observe(1, rows, (a + b * rows) * chance.lognormvariate(0, noise))
    return cost


@pytest.mark.parametrize(("a", "b"), [(5e-3, 1.5e-3), (20e-3, 5e-5), (1e-4, 1e-3)])
def test_passes_of_different_sizes_tell_pass_and_row_apart(a: float, b: float) -> None:
    cost = taught(Cost(), [4, 16, 8, 64], 400, a=a, b=b, noise=0.1)
    for rows in (4, 10, 40, 100):
        assert cost.of(1, rows) == pytest.approx(a + b * rows, rel=0.15)


def test_passes_of_one_size_leave_open_what_other_sizes_take() -> None:
    """And when these come they are soon believed."""
    cost = taught(Cost(), [16], 300, a=20e-3, b=1e-4, noise=0.05)
    assert cost.of(1, 16) == pytest.approx(21.6e-3, rel=0.05)
    taught(cost, [64, 16], 30, a=20e-3, b=1e-4, noise=0.0)
    assert cost.of(1, 64) == pytest.approx(26.4e-3, rel=0.15)


def test_a_machine_that_becomes_slower_is_slower_for_all_sizes() -> None:
    cost = taught(Cost(), [4, 32], 300, a=5e-3, b=1e-3, noise=0.0)
    taught(cost, [4], 40, a=10e-3, b=2e-3, noise=0.0)
    assert cost.of(1, 32) == pytest.approx(74e-3, rel=0.15)


def test_one_step_in_which_the_machine_did_something_else_changes_little() -> None:
    cost = taught(Cost(), [4, 32], 300, a=5e-3, b=1e-3, noise=0.05)
    cost.observe(1, 4, 10.0)
    assert cost.of(1, 4) == pytest.approx(9e-3, rel=0.35)


def test_a_row_may_turn_out_to_cost_much_though_it_seemed_to_cost_nothing() -> None:
    cost = taught(Cost(), [8, 16], 2000, a=10e-3, b=0.0, noise=0.05)
    taught(cost, [8, 16, 32], 200, a=5e-3, b=1e-3, noise=0.05)
    assert cost.of(1, 32) == pytest.approx(37e-3, rel=0.2)


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 4096), st.sampled_from((0.0, 1e-6, 1.0, 1e4))),
        max_size=60,
    )
)
def test_whatever_times_come_costs_stay_positive_numbers(
    steps: list[tuple[int, int, float]],
) -> None:
    cost = Cost()
    for passes, rows, seconds in steps:
        cost.observe(passes, max(rows, passes), seconds)
    known = any(seconds > 0 for *_, seconds in steps)
    assert (0 < cost.of(1, 8) < float("inf")) == known
    assert 0 <= cost.per_row <= cost.of(1, 1)


# --------------------------------------------------------------------- what drafts are worth


def test_a_habit_follows_what_came_and_forgets_what_came_long_ago() -> None:
    everybody, own = Habit.guess(3, 400.0), Habit.guess(3, 24.0)
    for drafted, accepted in [(3, 3)] * 100 + [(3, 1)] * 100:
        own.note(3, drafted, accepted)
        own.settle(everybody)
    assert own.reached == pytest.approx([1.0, 1.0, 1.0])
    assert own.gained == pytest.approx([1.0, 0.0, 0.0], abs=0.03)
    assert own.acceptance == pytest.approx(0.5, abs=0.05)
    assert everybody.gained == pytest.approx([1.0, 0.5, 0.5], abs=0.05)


def test_steps_that_may_not_draft_so_deep_say_nothing_of_the_depth() -> None:
    everybody, own = Habit.guess(3, 400.0), Habit.guess(3, 24.0)
    before = list(own.gained)
    for _ in range(50):
        own.note(1, 1, 1)
        own.note(0, 0, 0)
    own.settle(everybody)
    assert own.gained[0] == pytest.approx(1.0, abs=0.1)
    assert own.gained[1:] == before[1:]


def test_a_sequence_begins_with_everybodys_habit() -> None:
    everybody = Habit.guess(2, 400.0)
    one = everybody.copy(24.0, 10)
    for _ in range(200):
        one.note(2, 2, 2)
    one.settle(everybody)
    assert everybody.copy(24.0, 7).gained == pytest.approx([1.0, 1.0], abs=0.05)
    assert everybody.copy(24.0, 7).behind == 7


def test_what_the_head_has_to_take_in_before_it_drafts() -> None:
    habit = Habit.guess(3).copy(24.0, 10)
    habit.note(0, 0, 0)
    assert habit.behind == 11
    habit.note(3, 3, 2)
    assert habit.behind == 3


def test_a_head_is_taken_at_its_word_until_its_drafts_say_otherwise() -> None:
    calibration = Calibration()
    said = calibration.chances
    assert len(said) == 2 * N_CONFIDENCES
    assert list(said[:N_CONFIDENCES]) == sorted(said[:N_CONFIDENCES])
    assert said[2] == pytest.approx(0.58, abs=0.01)  # of p from 0.5 to 0.65
    for _ in range(100):
        calibration.observe([(2, 10, 3), (N_CONFIDENCES + 2, 10, 9)])
    assert calibration.chances[2] == pytest.approx(0.3, abs=0.01)
    assert calibration.chances[N_CONFIDENCES + 2] == pytest.approx(0.9, abs=0.01)
    assert calibration.chances[3] == said[3]


# --------------------------------------------------------------------------- the decision

COSTS = {
    "compute": StepCost(5.5e-3, 1.5e-3, 0.7e-3, 0.15e-3),
    "memory": StepCost(20e-3, 0.05e-3, 1.5e-3, 0.01e-3),
}
TEXTS = {
    "sure": Drafts(0.93, 0.2, 0.97),
    "mixed": Drafts(0.75, 0.7, 0.9),
    "poor": Drafts(0.3, 0.4, 0.8),
}


def played(
    cost: str, text: str, clients: int, depth: Speculation, *, recurrent: bool
) -> tuple[float, float]:
    """Tokens per second, and per step of a sequence."""
    many = ModelFacts(
        n_ctx=2048,
        n_seq=32,
        n_batch=2048,
        n_draft_max=3,
        n_vocab=256,
        eog_token_ids=frozenset(),
        n_cells=32 * 2048,
        n_ubatch=512,
        recurrent=recurrent,
        truncates=not recurrent,
    )
    kind = RequestKind(prompt=Uniform(10, 40), answer=Uniform(48, 144), drafts=TEXTS[text])
    n = 8 * max(clients, 6)
    report = simulate(
        ClosedLoop(steady(clients)), [kind], many, COSTS[cost], n_requests=n, speculation=depth
    )
    return report.throughput, report.generated_tokens / (report.generated_tokens - report.accepted)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("clients", [1, 4, 16])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cost", COSTS)
def test_the_depth_it_chooses_is_as_good_as_the_best_fixed_one(
    cost: str, text: str, clients: int, recurrent: bool
) -> None:
    """From the first step on: what it loses while it learns is in it."""
    best = max(played(cost, text, clients, d, recurrent=recurrent)[0] for d in range(4))
    ours, _ = played(cost, text, clients, "auto", recurrent=recurrent)
    assert ours > 0.93 * best


def test_where_rows_are_dear_and_drafts_poor_it_all_but_stops_drafting() -> None:
    _, per_step = played("compute", "poor", 16, "auto", recurrent=False)
    assert per_step < 1.02


def test_where_rows_are_cheap_it_drafts_as_deep_as_it_can() -> None:
    _, per_step = played("memory", "sure", 4, "auto", recurrent=False)
    _, deepest = played("memory", "sure", 4, 3, recurrent=False)
    assert per_step > 0.95 * deepest


class Drafting:
    """A sequence, as far as speculation looks at it."""

    def __init__(self, request_id: str, wish: DraftWish, habit: Habit) -> None:
        self.request_id = request_id
        self.wish = wish
        self.habit = habit


def step(rows: int, *, drafts: int = 0) -> StepResult:
    """A step of the compute-bound model."""
    cost = COSTS["compute"]
    draft, target = cost(1, [rows], [drafts] if drafts else [])
    return StepResult(1, (), rows, 1, drafts, min(drafts, 1), 0.0, draft, target, 0.0)


def test_who_drafts_badly_is_left_out_while_others_draft() -> None:
    speculator = Speculator(facts(3))
    good, bad = (
        Drafting(name, DraftWish(3, adaptive=True), speculator.new_habit(10))
        for name in ("good", "bad")
    )
    for turn in range(400):
        wishes = [speculator.wish_for(s).limit for s in (good, bad)]
        for sequence, limit, share in zip((good, bad), wishes, (1, 0), strict=True):
            sequence.habit.note(limit, limit, share * limit)
        lengths = [0] * 4
        for limit in wishes:
            lengths[limit] += 1
        speculator.observe(step(2 + sum(wishes), drafts=sum(wishes)), lengths, 0)
        speculator.review([good, bad])
        if turn > 200 and speculator.choice.trial is None:
            assert (wishes[0] == 3 and wishes[1] == 0) or speculator.choice.left_out == {"bad"}
    assert speculator.choice.left_out == {"bad"}


def test_what_a_request_did_counts_though_it_ended_before_a_review() -> None:
    speculator = Speculator(facts(1))
    for _ in range(200):
        habit = speculator.new_habit(10)
        for _ in range(5):
            habit.note(1, 1, 0)
        speculator.learn(habit)
    assert speculator.new_habit(10).gained[0] < 0.1


def test_time_between_steps_says_nothing_of_how_deep_to_draft() -> None:
    calm, hurried = CostModel(facts(3)), CostModel(facts(3))
    for turn in range(100):
        result = step(8 + 8 * (turn % 2))
        calm.observe(result, [8, 0, 0, 0], 0)
        hurried.observe(msgspec.structs.replace(result, gap_time=1.0), [8, 0, 0, 0], 0)
    assert calm.target.of(1, 8) == hurried.target.of(1, 8)


def test_steps_during_which_requests_are_taken_in_do_not_count() -> None:
    """They have fewer rows, and are slow because Python works beside them."""
    costs = CostModel(facts(3))
    for turn in range(600):
        costs.observe(step(8 + 8 * (turn % 2)), [8 * (turn % 2 == 0), 8 * (turn % 2), 0, 0], 0)
    rows, passes = costs.target.per_row, costs.target.per_pass
    for _ in range(300):
        for _ in range(4):
            costs.observe(step(8), [8, 0, 0, 0], 0)
        costs.observe(step(16), [7, 0, 0, 0], 0)
    assert costs.target.per_row == pytest.approx(rows, rel=0.05)
    assert costs.target.per_pass == pytest.approx(passes, rel=0.05)
    for _ in range(300):  # until there are no others
        for n in (8, 7):
            costs.observe(step(2 * n), [n, 0, 0, 0], 0)
    assert costs.target.of(1, 8) == pytest.approx(COSTS["compute"](8, [16], [])[1], rel=0.1)


def test_fixed_wishes_are_left_alone() -> None:
    speculator = Speculator(facts(3))
    fixed = [
        Drafting(str(n), DraftWish(n, adaptive=False), speculator.new_habit(1)) for n in (0, 2)
    ]
    for _ in range(50):
        speculator.observe(step(4), [1, 0, 1, 0], 0)
        assert not speculator.review(fixed)
    assert [speculator.wish_for(s).limit for s in fixed] == [0, 2]


def test_before_anything_was_timed_it_drafts_as_deep_as_it_can() -> None:
    speculator = Speculator(facts(3))
    [new] = [Drafting("new", DraftWish(3, adaptive=True), speculator.new_habit(10))]
    speculator.observe(StepResult(1, (), 10, 1, 0, 0, 0.0, 0.0, 0.1, 0.0), [0, 0, 0, 0], 10)
    assert not speculator.review([new])
    assert speculator.wish_for(new) == DraftWish(3, adaptive=True)


def test_chunks_of_prompts_follow_from_what_a_step_and_a_row_take() -> None:
    costs = Speculator(facts(3)).costs
    assert costs.chunk(512, 0.1) == 512
    for _ in range(100):
        costs.observe(step(8), [8, 0, 0, 0], 0)  # 17.5 ms
        costs.observe(step(108), [8, 0, 0, 0], 100)  # 1.5 ms for each row of a prompt
    assert costs.chunk(512, 0.0) == 32
    assert costs.chunk(512, 2.0) == pytest.approx(3 * 2 * 17.5 / 1.5, rel=0.2)
    assert costs.chunk(512, 100.0) == 512


@settings(max_examples=50)
@given(st.data())
def test_reviews_survive_whatever_steps_take(data: st.DataObject) -> None:
    """Any times, also none; requests of all kinds that come and go."""
    speculator = Speculator(facts(3))
    running: list[Drafting] = []
    for turn in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()) or not running:
            wish = DraftWish(data.draw(st.integers(0, 3)), adaptive=data.draw(st.booleans()))
            running.append(Drafting(str(turn), wish, speculator.new_habit(5)))
        elif data.draw(st.booleans()):
            running.pop()
        lengths = [0] * 4
        for sequence in running:
            limit = speculator.wish_for(sequence).limit
            assert 0 <= limit <= 3
            drafted = data.draw(st.integers(0, limit))
            sequence.habit.note(limit, drafted, data.draw(st.integers(0, drafted)))
            lengths[drafted] += 1
        seconds = data.draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]))
        rows = sum(n * (1 + d) for d, n in enumerate(lengths))
        result = StepResult(1, (), rows, 1, rows, 1, 0.0, seconds, seconds, seconds)
        speculator.observe(result, lengths, data.draw(st.integers(0, 3)))
        speculator.review(running)
        terms = speculator.choice.terms
        for price in (terms.target_row, terms.target_pass, terms.draft_row, terms.draft_decode):
            assert 0 <= price < float("inf")
        assert all(0 <= chance <= 1 for chance in (*terms.greedy, *terms.sampled))
