"""How deep requests draft: what they ask for, and what pays."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpbatch.costs import Cost, CostModel
from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.speculation import (
    Calibration,
    Choice,
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


def test_what_a_size_takes_is_remembered_while_others_come() -> None:
    """Not all machines take their time by rows: here one and two take as long."""
    cost = Cost()
    for _ in range(40):
        for rows, seconds in ((1, 20e-3), (2, 20e-3), (4, 25e-3), (8, 40e-3)):
            cost.observe(1, rows, seconds)
    assert cost.of(1, 2) == pytest.approx(20e-3, rel=0.03)
    for _ in range(1000):
        cost.observe(1, 16, 75e-3)
    for rows, seconds in ((1, 20e-3), (2, 20e-3), (4, 25e-3), (8, 40e-3)):
        assert cost.of(1, rows) == pytest.approx(seconds, rel=0.1)
    assert cost.doubt((1, 1), (1, 2)) < cost.doubt((1, 64), (1, 128)) / 2


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
    assert 0 <= cost.parts(1, 1)[1] <= cost.of(1, 1)


# --------------------------------------------------------------------- what drafts are worth


def test_a_habit_follows_what_came_and_forgets_what_came_long_ago() -> None:
    everybody, own = Habit.guess(3, 400.0), Habit.guess(3, 24.0)
    for drafted, accepted in [(3, 3)] * 100 + [(3, 1)] * 100:
        own.note(3, drafted, accepted)
        everybody.follow([own])
        own.update()
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
    everybody.follow([own])
    own.update()
    assert own.gained[0] == pytest.approx(1.0, abs=0.1)
    assert own.gained[1:] == before[1:]


def test_a_sequence_begins_with_everybodys_habit() -> None:
    everybody = Habit.guess(2, 400.0)
    one = everybody.copy(24.0, 10)
    for _ in range(200):
        one.note(2, 2, 2)
    everybody.follow([one])
    one.update()
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


ADAPTIVE = DraftWish(3, adaptive=True)


class Drafting:
    """A sequence, as far as speculation looks at it."""

    def __init__(self, request_id: str, wish: DraftWish, habit: Habit, n_tokens: int = 0) -> None:
        self.request_id = request_id
        self.wish = wish
        self.habit = habit
        self.token_ids = [0] * n_tokens


def step(rows: int, *, drafts: int = 0) -> StepResult:
    """A step of the compute-bound model."""
    cost = COSTS["compute"]
    draft, target = cost(1, [rows], [drafts] if drafts else [])
    return StepResult(1, (), rows, 1, drafts, min(drafts, 1), 0.0, draft, target, 0.0)


def test_who_drafts_badly_is_left_out_while_others_draft() -> None:
    speculator = Speculator(facts(3))
    good, bad = (
        Drafting(name, ADAPTIVE, speculator.new_habit(ADAPTIVE, 10)) for name in ("good", "bad")
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


def test_of_very_many_each_is_looked_at_in_turn() -> None:
    speculator = Speculator(facts(1))
    habit = speculator.everybody
    many = [Drafting(str(n), DraftWish(1, adaptive=True), habit.copy(24.0, 10)) for n in range(150)]
    for _ in range(80):
        for sequence in many:
            sequence.habit.note(1, 1, 0)
        speculator.observe(step(300, drafts=150), [0, 150], 0)
        speculator.review(many)
    assert max(sequence.habit.gained[0] for sequence in many) < 0.05
    assert speculator.everybody.gained[0] < 0.05


def test_what_a_request_did_counts_though_it_ended_before_a_review() -> None:
    speculator = Speculator(facts(1))
    for _ in range(200):
        habit = speculator.new_habit(ADAPTIVE, 10)
        for _ in range(5):
            habit.note(1, 1, 0)
        speculator.learn(Drafting("short", ADAPTIVE, habit, 20))
    assert speculator.new_habit(ADAPTIVE, 10).gained[0] < 0.1


def test_who_never_drafts_says_nothing_of_how_deep_others_should() -> None:
    """Long prompts with answers of a token, say, between requests that drafts are good for."""
    never = DraftWish(0, adaptive=False)

    def choices(*, beside: bool) -> list[Choice]:
        crowd = Crowd(lambda _: 3, depth=3, n_prompt=50)
        chosen = []
        for _ in range(12):
            if beside:
                habit = crowd.speculator.new_habit(never, 2000)
                crowd.speculator.learn(Drafting("other", never, habit, 1))
            chosen += crowd.run(1, 15)
            crowd.end()
        return chosen

    alone = choices(beside=False)
    assert alone[-1].depth == 3
    assert choices(beside=True) == alone


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
    passes, rows = costs.target.parts(1, 8)
    for _ in range(300):
        for _ in range(4):
            costs.observe(step(8), [8, 0, 0, 0], 0)
        costs.observe(step(16), [7, 0, 0, 0], 0)
    assert costs.target.parts(1, 8) == pytest.approx((passes, rows), rel=0.05)
    for _ in range(300):  # until there are no others
        for n in (8, 7):
            costs.observe(step(2 * n), [n, 0, 0, 0], 0)
    assert costs.target.of(1, 8) == pytest.approx(COSTS["compute"](8, [16], [])[1], rel=0.1)


def test_fixed_wishes_are_left_alone() -> None:
    speculator = Speculator(facts(3))
    fixed = [
        Drafting(str(wish.limit), wish, speculator.new_habit(wish, 1))
        for wish in (DraftWish(0, adaptive=False), DraftWish(2, adaptive=False))
    ]
    for _ in range(50):
        speculator.observe(step(4), [1, 0, 1, 0], 0)
        assert not speculator.review(fixed)
    assert [speculator.wish_for(s).limit for s in fixed] == [0, 2]


def test_before_anything_was_timed_it_drafts_as_deep_as_it_can() -> None:
    speculator = Speculator(facts(3))
    new = Drafting("new", ADAPTIVE, speculator.new_habit(ADAPTIVE, 10))
    speculator.observe(StepResult(1, (), 10, 1, 0, 0, 0.0, 0.0, 0.1, 0.0), [0, 0, 0, 0], 10)
    assert not speculator.review([new])
    assert speculator.wish_for(new) == ADAPTIVE


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
            running.append(Drafting(str(turn), wish, speculator.new_habit(wish, 5)))
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


# ------------------------------------------------------------- the decision, when all is known


class Crowd:
    """Sequences that draft as a speculator says, on a model of which everything is known.

    A row takes ``ROW`` of the time of its pass, which is what speculators assume at first: their
    costs are right from the first step on.
    """

    ROW = 0.35**2

    def __init__(
        self,
        right: Callable[[int], int],
        *,
        depth: int = 1,
        target: float = 0.01,
        draft: float = 0.001,
        recurrent: bool = False,
        n_plain: int = 0,
        n_prompt: int = 1,
    ) -> None:
        """``right`` says how many drafts are right, by turn and sequence added. A pass of the
        target and of its head, which drafts up to ``depth`` tokens, take so many seconds. The first
        ``n_plain`` sequences never draft. Each begins with a prompt of ``n_prompt`` tokens."""
        self.speculator = Speculator(msgspec.structs.replace(facts(depth), recurrent=recurrent))
        self.target, self.draft = target, draft
        self.trials: tuple[tuple[int, int, int], ...] = ()  # what each step says of its drafts
        self.stops_at: dict[int, int] = {}  # sequences whose head is not sure of more
        self.sequences: list[Drafting] = []
        self.turn = 0
        self.n_tokens = 0
        self._right = right
        self._depth = depth
        self._recurrent = recurrent
        self._n_plain = n_plain
        self._n_prompt = n_prompt

    def step(self, n: int) -> tuple[Choice, float]:
        """A step of ``n`` sequences, by the choice in force; that, and the seconds it took."""
        for number in range(len(self.sequences), n):
            plain = number < self._n_plain
            wish = DraftWish(0 if plain else self._depth, adaptive=not plain)
            habit = self.speculator.new_habit(wish, self._n_prompt)
            self.sequences.append(Drafting(str(number), wish, habit))
        del self.sequences[n:]
        choice = self.speculator.choice
        lengths = [0] * (self._depth + 1)
        rows = [0] * self._depth  # of each decode of the head
        for number, sequence in enumerate(self.sequences):
            allowed = self.speculator.wish_for(sequence).limit
            length = min(allowed, self.stops_at.get(number, allowed))
            for d in range(length):
                rows[d] += 1 if d else max(1, sequence.habit.behind)
            accepted = min(length, self._right(self.turn + number))
            sequence.habit.note(allowed, length, accepted)
            sequence.token_ids += [0] * (1 + accepted)
            self.n_tokens += 1 + accepted
            lengths[length] += 1
        self.turn += 1
        return choice, self._take(lengths, [n_rows for n_rows in rows if n_rows])

    def _take(self, lengths: list[int], drafted: list[int]) -> float:
        rows = sum(count * (1 + length) for length, count in enumerate(lengths))
        n_passes = sum(count > 0 for count in lengths) if self._recurrent else 1
        draft_time = self.draft * (len(drafted) + self.ROW * sum(drafted))
        target_time = self.target * (n_passes + self.ROW * rows)
        result = StepResult(
            *(1, (), rows, n_passes, sum(drafted), len(drafted), 0.0, draft_time, target_time, 0.0),
            trials=self.trials,
        )
        self.speculator.observe(result, lengths, 0)
        self.speculator.review(self.sequences)
        return draft_time + target_time

    def end(self) -> None:
        """All requests end."""
        for sequence in self.sequences:
            self.speculator.learn(sequence)
        self.sequences.clear()

    def run(self, n: int, n_steps: int) -> list[Choice]:
        """The choices by which so many steps of ``n`` sequences went."""
        return [self.step(n)[0] for _ in range(n_steps)]


def never(_: int) -> int:
    return 0


def always(_: int) -> int:
    return 9


def every_second(turn: int) -> int:
    return turn % 2


@pytest.mark.parametrize(("draft", "n_prompt"), [(1e-3, 1), (3e-3, 1), (1e-3, 300)])
def test_what_trials_lose_is_bounded(draft: float, n_prompt: int) -> None:
    """Drafts are all wrong, and the load and those who make it change all the time."""
    crowd = Crowd(never, depth=3, draft=draft, n_prompt=n_prompt)
    spent = lost = 0.0
    n_trials = 0
    for turn in range(8000):
        n = 3 if turn // 30 % 2 else 1
        if turn % 30 == 0:
            crowd.sequences.clear()  # others come
        choice, seconds = crowd.step(n)
        spent += seconds
        if choice.trial and not choice.depth:
            n_trials += 1
            lost += seconds - crowd.target * (1 + crowd.ROW * n)
    assert n_trials > 0
    # What two steps take may be lost at the beginning.
    assert lost < 0.0075 * spent + 2 * crowd.target * (1 + crowd.ROW * 3)


def test_trials_become_rarer() -> None:
    """The more is known the less there is to find out: a depth that gives and takes as much as the
    present one is tried when it may be better, and not for ever."""
    target, row = 0.01, Crowd.ROW
    draft = target * (6 / 4 * (1 + 4 * row) - (1 + 8 * row)) / (1 + 6 * row)
    crowd = Crowd(every_second, target=target, draft=draft)
    tried = [choice.trial is not None for choice in crowd.run(4, 3000)]
    begins = [n for n, (before, now) in enumerate(pairwise(tried)) if now and not before]
    pauses = [later - earlier for earlier, later in pairwise(begins)]
    assert pauses[0] < 20
    assert all(pause > 100 for pause in pauses[8:])


def test_hopeless_depths_are_not_tried() -> None:
    """A draft takes longer than a step without one, and is always wrong."""
    crowd = Crowd(never, draft=0.012)
    crowd.run(1, 200)
    choices = crowd.run(1, 4000)
    assert {(choice.depth, choice.trial) for choice in choices} == {(0, None)}


def test_a_depth_is_tried_by_few_or_by_all_who_draft_to_it_in_any_case() -> None:
    """Few show what is accepted, all show what such steps take."""
    crowd = Crowd(always, depth=2)
    n_trials = 0
    for _ in range(300):
        crowd.step(12)
        choice = crowd.speculator.choice
        wishes = {s.request_id: crowd.speculator.wish_for(s) for s in crowd.sequences}
        on_trial = {name for name, wish in wishes.items() if not wish.adaptive}
        assert on_trial == choice.on_trial
        assert {wishes[name].limit for name in on_trial} <= {choice.trial}
        n_trials += len(on_trial) > 0
        assert len(on_trial) in (0, 4, 12)
    assert n_trials >= 2


@pytest.mark.parametrize(("gain", "moves"), [(1.005, False), (1.06, True)])
def test_it_stays_with_a_depth_that_is_nearly_as_good(gain: float, moves: bool) -> None:
    """It begins with drafts, of which half are right; without them it is somewhat faster."""
    target, row = 0.01, Crowd.ROW
    # Per step of 4, of which 2 gain a token: 6 tokens, 8 rows, 6 of the head.
    draft = target * (gain * 6 / 4 * (1 + 4 * row) - (1 + 8 * row)) / (1 + 6 * row)
    crowd = Crowd(every_second, target=target, draft=draft)
    depths = {choice.depth for choice in crowd.run(4, 3000)[1500:]}
    assert depths == ({0} if moves else {1})


@pytest.mark.parametrize(("right", "draft", "keeps"), [(never, 0.012, False), (always, 1e-3, True)])
def test_prompts_are_kept_for_the_head_where_drafts_may_pay(
    right: Callable[[int], int], draft: float, *, keeps: bool
) -> None:
    crowd = Crowd(right, draft=draft)
    assert crowd.speculator.choice.keep_prompts, "nothing is known yet"
    assert {choice.keep_prompts for choice in crowd.run(2, 600)[400:]} == {keeps}


@pytest.mark.parametrize(("n_right", "n_prompt"), [(0, 1), (1, 1), (0, 500), (1, 500)])
def test_texts_that_drafts_are_good_at_are_noticed_after_many_that_they_are_poor_at(
    n_right: int, n_prompt: int
) -> None:
    """One request after another; alone, drafts cost little."""
    good = False
    crowd = Crowd(lambda _: 9 if good else n_right, depth=3, target=0.02, n_prompt=n_prompt)

    def requests(n: int) -> float:
        """Tokens per step of the last of so many."""
        for _ in range(n):
            crowd.sequences.clear()
            before = crowd.n_tokens
            crowd.run(1, 40)
        return (crowd.n_tokens - before) / 40

    assert n_right + 0.9 < requests(60) < n_right + 1.1
    good = True
    assert requests(20) > 2.5


def test_it_is_saved_up_for_a_trial_within_one_long_answer() -> None:
    """What the head has to catch up with grows meanwhile."""
    good = False
    crowd = Crowd(lambda _: 9 if good else 0, depth=3, target=0.02, draft=1e-4, n_prompt=4000)
    for _ in range(60):
        crowd.sequences.clear()
        choices = crowd.run(1, 40)
    assert choices[-1].depth == 0
    crowd.sequences.clear()
    good = True
    crowd.run(1, 2000)
    before = crowd.n_tokens
    crowd.run(1, 100)
    assert crowd.n_tokens - before > 250


def test_who_comes_makes_it_choose_at_once() -> None:
    """Alone a row costs little; beside many others it costs as much as a token brings."""
    crowd = Crowd(every_second, depth=1, draft=1e-3)
    for _ in range(40):
        crowd.run(1, 30)
        crowd.run(32, 30)
    crowd.run(1, 30)
    before, _ = crowd.step(1)
    crowd.step(32)
    after = crowd.speculator.choice
    assert (before.depth, after.depth) == (1, 0)


@pytest.mark.parametrize("n", [8, 32])
def test_of_a_load_that_is_new_it_chooses_what_looks_best(n: int) -> None:
    """Nothing speaks for the depth that was best for another one."""
    crowd = Crowd(every_second, depth=1, draft=1e-3)
    choices = crowd.run(1, 300)
    assert choices[-1].depth == 1
    crowd.step(n)
    assert crowd.speculator.choice.depth == 0


@pytest.mark.parametrize(("n_prompt", "depth"), [(1, 1), (300, 0)])
def test_the_prompts_that_the_head_takes_in_are_part_of_what_drafts_cost(
    n_prompt: int, depth: int
) -> None:
    """Answers are short; it is known as soon as some have ended."""
    crowd = Crowd(always, draft=2e-3, n_prompt=n_prompt)
    for _ in range(3):
        crowd.run(2, 12)
        crowd.end()
    crowd.run(2, 2)
    assert crowd.speculator.choice.depth == depth


def test_answers_that_have_become_longer_count_before_they_end() -> None:
    """Else a prompt would be spread over as few tokens as those before had, and drafts be dear."""
    crowd = Crowd(never, draft=0.012)
    for _ in range(20):
        crowd.run(4, 8)
        crowd.end()
    crowd.run(4, 4)
    assert crowd.speculator._answer == pytest.approx(8, rel=0.1)
    crowd.run(16, 44)
    assert crowd.speculator._answer == pytest.approx((32 * 8 + 16 * 45) / (32 + 16), rel=0.1)
    crowd.run(16, 4000)
    assert crowd.speculator._answer > 1000


def test_of_very_many_those_on_trial_are_all_looked_at() -> None:
    crowd = Crowd(always, depth=2, draft=3e-4)
    n_trials = 0
    for _ in range(200):
        trial = crowd.speculator.choice.on_trial
        crowd.step(150)
        if trial and crowd.speculator.choice.on_trial != trial:
            n_trials += 1
            assert all(not any(s.habit._allowed) for s in crowd.sequences if s.request_id in trial)
    assert n_trials


def test_a_draft_is_not_worth_it_where_the_head_takes_as_long_as_the_model() -> None:
    crowd = Crowd(every_second, draft=0.01)
    assert {choice.depth for choice in crowd.run(2, 800)[400:]} == {0}


def test_prices_are_what_could_be_generated_in_the_time() -> None:
    crowd = Crowd(always, draft=2e-3)
    crowd.run(4, 400)
    seconds = crowd.target * (1 + 8 * crowd.ROW) + crowd.draft * (1 + 8 * crowd.ROW)
    speed = 8 / seconds  # a token and a draft of each
    terms = crowd.speculator.choice.terms
    assert terms.target_pass == pytest.approx(speed * crowd.target, rel=0.2)
    assert terms.target_row == pytest.approx(speed * crowd.target * crowd.ROW, rel=0.2)
    assert terms.draft_decode == pytest.approx(speed * crowd.draft, rel=0.2)
    assert terms.draft_row == pytest.approx(speed * crowd.draft * crowd.ROW, rel=0.2)


def test_prices_that_change_are_a_new_choice() -> None:
    """Though the depth stays: one draft more is always right."""
    crowd = Crowd(always)
    crowd.run(4, 3000)
    before = crowd.speculator.choice
    crowd.draft *= 3
    crowd.run(4, 60)
    after = crowd.speculator.choice
    assert (before.depth, before.trial) == (after.depth, after.trial) == (1, None)
    assert after.terms.draft_decode > 2 * before.terms.draft_decode


def test_chances_that_change_are_a_new_choice_for_those_they_are_of() -> None:
    crowd = Crowd(always)
    crowd.run(4, 3000)
    before = crowd.speculator.choice
    crowd.trials = ((2, 10, 1), (N_CONFIDENCES + 2, 10, 10))
    crowd.run(4, 60)
    after = crowd.speculator.choice
    assert (before.depth, before.trial) == (after.depth, after.trial) == (1, None)
    assert before.terms.greedy[2] == before.terms.sampled[2]
    assert after.terms.greedy[2] < 0.2
    assert after.terms.sampled[2] > 0.9


@pytest.mark.parametrize("recurrent", [False, True])
def test_who_never_drafts_makes_drafts_a_pass_of_their_own_where_state_is_recurrent(
    recurrent: bool,
) -> None:
    """Two of eight gain a token each: that is worth two rows, but not another pass."""
    crowd = Crowd(always, recurrent=recurrent, n_plain=6)
    depths = {choice.depth for choice in crowd.run(8, 1000)[500:]}
    assert depths == {0 if recurrent else 1}


@pytest.mark.parametrize("recurrent", [False, True])
def test_drafts_of_several_lengths_are_several_passes_where_state_is_recurrent(
    recurrent: bool,
) -> None:
    """The head of every second one is sure of one token only: to draft two is worth its rows for
    the others, but not another pass."""
    crowd = Crowd(always, depth=2, draft=5e-4, recurrent=recurrent)
    crowd.stops_at = {0: 1, 2: 1}
    depths = {choice.depth for choice in crowd.run(4, 2000)[1000:]}
    assert depths == {1 if recurrent else 2}
