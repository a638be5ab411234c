"""The simulator against the scripted model played step by step, and against queueing theory."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from mtpbatch.exceptions import InternalError, InvalidParameterError, PromptTooLongError
from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.testing import (
    ClosedLoop,
    Drafts,
    Fixed,
    LogNormal,
    OpenLoop,
    Profile,
    RequestKind,
    ScriptedBackend,
    SimulationReport,
    StepCost,
    Uniform,
    ramp,
    simulate,
    square_wave,
    steady,
)
from mtpbatch.testing.scripted import _ScriptedSequence
from mtpbatch.testing.simulated import SimulatedExecutor
from mtpbatch.testing.workload import N_LUCK, Luck
from mtpbatch.text import TextAssembler
from mtpbatch.types import (
    Admission,
    ModelFacts,
    Park,
    Plan,
    PlanEntry,
    Resume,
    SamplingParams,
    SequenceStep,
    StepResult,
    Terms,
)

STEP = 0.0625  # seconds, exact in binary, and longer than results are held back


def facts(**changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "n_ctx": 256,
        "n_seq": 4,
        "n_batch": 64,
        "n_draft_max": 3,
        "n_vocab": 256,
        "eog_token_ids": frozenset(),
        "n_cells": 1024,
        "n_ubatch": 64,
    }
    return ModelFacts(**values | changes)


def per_pass(seconds: float) -> StepCost:
    return StepCost(target_pass=seconds, target_row=0.0, draft_decode=0.0, draft_row=0.0)


# ------------------------------------------------------------ beside the scripted model


class Recorder(Scheduler):
    """Notes down what goes in and out."""

    def __init__(self, facts: ModelFacts, snapshot_bytes: int = 0) -> None:
        super().__init__(facts, snapshot_bytes)
        self.added: list[Sequence] = []
        self.log: list[object] = []

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self.added.append(sequence)

    def schedule(self, now: float) -> Plan | None:
        plan = super().schedule(now)
        if plan is not None:
            # Which tokens a paused request is fed again is not played.
            entries = tuple(replace(e, tokens=(0,) * len(e.tokens)) for e in plan.entries)
            self.log.append((round(now, 6), replace(plan, entries=entries)))
        return plan

    def update(
        self, result: StepResult, now: float, parts: list[SequenceStep] | None = None
    ) -> list[Event]:
        events = super().update(result, now, parts)
        outcomes = [
            (len(e.token_ids), e.n_drafted, e.n_accepted, e.finish_reason) for e in result.entries
        ]
        self.log.append(
            (round(now, 6), result.plan, outcomes, result.n_target_tokens, result.n_draft_decodes)
        )
        ended = [event.completion.timings for event in events if event.completion]
        self.log += [[round(seconds, 6) for seconds in astuple(timings)] for timings in ended]
        return events


class LuckyBackend(ScriptedBackend):
    """A scripted model whose drafts are right where a simulation's are."""

    def __init__(self, luck: dict[int, tuple[Luck, int]], **options: Any) -> None:
        # A step runs before the result of the one before it is given out.
        super().__init__(lambda _: "x" * 50, step_time=STEP, lag=1, **options)
        self._luck = luck
        self.ends: list[float] = []

    def _hit(self, sequence: _ScriptedSequence) -> bool:
        luck, place = self._luck[sequence.ticket]
        return luck.needs[(place + sequence.n_generated) % N_LUCK] < 1.0

    def _begins(self) -> bool:
        opened = self._standing is not None and not self._stepped
        return opened or super()._begins()  # once it is opened, its step has begun

    def _result(self, *arguments: Any) -> StepResult:
        self.ends.append(self.clock())
        return super()._result(*arguments)


def play_step_by_step(
    backend: LuckyBackend, requests: list[Sequence], snapshot_bytes: int
) -> list[object]:
    """What the engine would do, in the words of its loop, with the time of each result at hand."""
    scheduler = Recorder(backend.facts, snapshot_bytes)
    to_come = sorted(requests, key=lambda s: s.submitted)

    def plan(now: float) -> None:
        while (plan := scheduler.schedule(now)) is not None:
            backend.exchange(plan, wait=False)

    def under_way() -> bool:
        begins = backend._begins()  # a plan without steps may have a result at once
        return begins or len(backend.ends) > n_results

    n_results = 0
    while to_come or under_way():
        if not under_way():
            backend.clock.advance(to_come[0].submitted - backend.clock())
        ahead = backend.ends[n_results:]
        end = ahead[0] if ahead else backend.clock() + STEP
        while to_come and to_come[0].submitted < end:
            now = to_come[0].submitted
            while to_come and to_come[0].submitted == now:
                scheduler.add(to_come.pop(0))
            plan(now)
        now = end
        while end == now:  # a step of nobody who is left takes no time
            [result] = backend.exchange(None, wait=True)
            now = backend.ends[n_results]
            n_results += 1
            scheduler.update(result, now)
            end = backend.ends[n_results] if len(backend.ends) > n_results else math.inf
        plan(now)
    return scheduler.log


@given(
    n_seq=st.integers(1, 4),
    n_batch=st.integers(4, 40),
    speculation=st.integers(0, 3),
    acceptance=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    rate=st.sampled_from([1.0, 4.0, 20.0]),
    variation=st.sampled_from([0.5, 1.0, 3.0]),
    streaming=st.booleans(),
    n_cells=st.sampled_from([256, 300, 1024]),
    snapshot_bytes=st.sampled_from([0, 60_000, 10_000_000]),
    consecutive_ids=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(  # a plan that releases only is opened before one that saves has had its step
    n_seq=3,
    n_batch=4,
    speculation=0,
    acceptance=0.0,
    rate=4.0,
    variation=0.5,
    streaming=False,
    n_cells=256,
    snapshot_bytes=10_000_000,
    consecutive_ids=False,
    seed=1,
)
@example(  # who is left on scattered ids moves
    n_seq=4,
    n_batch=40,
    speculation=0,
    acceptance=0.0,
    rate=1.0,
    variation=3.0,
    streaming=True,
    n_cells=1024,
    snapshot_bytes=10_000_000,
    consecutive_ids=True,
    seed=1,
)
@settings(max_examples=60)
def test_it_does_what_the_scripted_model_does_step_by_step(
    n_seq: int,
    n_batch: int,
    speculation: int,
    acceptance: float,
    rate: float,
    variation: float,
    streaming: bool,
    n_cells: int,
    snapshot_bytes: int,
    consecutive_ids: bool,
    seed: int,
) -> None:
    """The same plans, results and ends at the same times."""
    drafts = Drafts(acceptance=acceptance, falloff=1.0)
    kinds = [
        RequestKind(
            prompt=Uniform(1, 120), answer=Uniform(1, 60), drafts=drafts, streaming=streaming
        ),
        RequestKind(prompt=Fixed(1), answer=Fixed(1), drafts=drafts, priority=-3, deadline=9.0),
    ]
    luck: dict[int, tuple[Luck, int]] = {}
    recorders: list[Recorder] = []

    def recorder(facts: ModelFacts) -> Recorder:
        recorders.append(Recorder(facts, snapshot_bytes))
        return recorders[-1]

    played = facts(
        n_seq=n_seq,
        n_batch=n_batch,
        n_ubatch=n_batch,
        n_cells=n_cells,
        consecutive_ids=consecutive_ids,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedExecutor, "expect", noting(luck))
        simulate(
            OpenLoop(steady(rate), variation),
            kinds,
            played,
            per_pass(STEP),
            n_requests=20,
            speculation=speculation,
            make_scheduler=recorder,
            seed=seed,
        )
    [simulated] = recorders
    backend = LuckyBackend(luck, n_seq=n_seq, n_batch=n_batch, n_cells=n_cells)
    backend.facts = replace(backend.facts, consecutive_ids=consecutive_ids)
    requests = [again(sequence) for sequence in simulated.added]
    assert simulated.log == play_step_by_step(backend, requests, snapshot_bytes)


def noting(luck: dict[int, tuple[Luck, int]]) -> Any:
    original = SimulatedExecutor.expect

    def expect(self: SimulatedExecutor, ticket: int, of_it: Luck, place: int) -> None:
        luck[ticket] = of_it, place
        original(self, ticket, of_it, place)

    return expect


def again(sequence: Sequence) -> Sequence:
    """The request as it was submitted."""
    return Sequence(
        sequence.request_id,
        sequence.ticket,
        sequence.prompt,
        sequence.params,
        seed=sequence.seed,
        max_tokens=sequence.max_tokens,
        wish=sequence.wish,
        n_draft_max=3,
        followed=sequence.followed,
        assembler=TextAssembler([b""] * 512),
        submitted=sequence.submitted,
    )


# ------------------------------------------------------------------------- by reckoning


def test_a_single_server_waits_as_queueing_theory_says() -> None:
    """M/D/1: one step for each request, at half the load, waits half a step on average."""
    report = simulate(
        OpenLoop(steady(0.5)),
        [RequestKind(prompt=Fixed(1), answer=Fixed(1))],
        facts(n_seq=1),
        per_pass(1.0),
        n_requests=20_000,
    )
    assert report.queued.mean == pytest.approx(0.5, rel=0.05)
    assert report.utilisation == pytest.approx(0.5, rel=0.03)
    assert report.first_token.mean == pytest.approx(report.queued.mean + 1.0)


@pytest.mark.parametrize("speculation", [0, 1, 3])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_step_costs_what_its_passes_and_decodes_do(speculation: int, recurrent: bool) -> None:
    """Two clients, every draft right: the figures can be worked out by hand."""
    cost = StepCost(
        target_pass=1.0, target_row=0.125, draft_decode=0.25, draft_row=0.0625, sequence=0.5
    )
    drafts = Drafts(acceptance=1.0, spread=0.0, falloff=1.0)
    report = simulate(
        ClosedLoop(steady(2)),
        [RequestKind(prompt=Fixed(10), answer=Fixed(17), drafts=drafts)],
        facts(n_seq=2, recurrent=recurrent),
        cost,
        n_requests=2,
        speculation=speculation,
    )
    n_steps = 16 // (1 + speculation)
    rows = 2 * (1 + speculation)
    first = 1.0 + 20 * 0.125 + 2 * 0.5
    steps = n_steps * (1.0 + rows * 0.125 + 2 * 0.5)
    if speculation:
        # What waits for the head: the prompt at first, then the drafts that were accepted.
        head_rows = 2 * 10 + (n_steps - 1) * 2 * speculation + n_steps * rows - 2 * n_steps
        steps += n_steps * speculation * 0.25 + head_rows * 0.0625
    assert report.seconds == pytest.approx(first + steps)
    assert report.first_token.most == pytest.approx(first)
    assert report.per_token.mean == pytest.approx(steps / 16)
    assert (report.drafted, report.accepted) == (2 * n_steps * speculation,) * 2
    assert report.utilisation == pytest.approx(1.0)


def test_lengths_that_differ_are_passes_of_their_own_where_state_is_recurrent() -> None:
    passes: list[list[int]] = []

    def cost(n_sequences: int, target_rows: Any, draft_rows: Any) -> tuple[float, float]:
        passes.append(list(target_rows))
        return 0.0, 1.0

    for recurrent in (False, True):
        executor = SimulatedExecutor(facts(n_ubatch=8, recurrent=recurrent), cost)
        play(executor, [PlanEntry(i, (), True, n) for i, n in enumerate((0, 3, 1, 3))], n_prompt=5)
    one_by_one = passes[2:]
    assert passes[:2] == [[8, 8, 4], [8, 3]], "as many rows as fit"
    # All prompts at once, a token of each in every pass; then no draft, one of 1, two of 3.
    assert one_by_one == [[8, 8, 4], [1, 2, 8]]


def play(
    executor: SimulatedExecutor,
    entries: list[PlanEntry],
    *,
    n_prompt: int = 1,
    terms: Terms | None = None,
    drafts: Drafts | None = None,
    temperature: float = 0.0,
) -> StepResult:
    """The result of the step after the one that feeds the prompts."""
    luck = Luck(drafts or Drafts())
    admissions, prompts = [], []
    for entry in entries:
        executor.expect(entry.seq_id, luck, 1000 * entry.seq_id)
        params = SamplingParams(temperature=temperature)
        admissions.append(Admission(entry.seq_id, params, 0, (), 100, ticket=entry.seq_id))
        prompts.append(PlanEntry(entry.seq_id, (0,) * n_prompt, True, 0))
    executor.hand_over(Plan((), tuple(admissions), tuple(prompts), number=1), 0.0)
    executor.hand_over(Plan((), (), tuple(entries), number=2, terms=terms), 0.0)
    executor.end_step()
    executor.end_step()
    return executor.take_results(2.0)[1]


@pytest.mark.parametrize(
    ("prices", "expected", "n_drafted"),
    [
        # Each draft has a chance of 0.8, which with those before it makes 0.8, 0.64, 0.51.
        ({}, 0.8, 3),
        ({"target_row": 0.55}, 0.8, 2),  # the third is expected to be worth less than its row
        ({"target_row": 0.7}, 0.8, 1),
        ({"target_row": 0.85}, 0.8, 0),  # the first is not, now that it is known
        ({"target_row": 0.55}, 0.1, 1),  # the second is not expected to
        ({"target_row": 0.6, "draft_row": 0.05}, 0.8, 1),
        ({"target_row": 0.6, "draft_decode": 0.05}, 0.8, 1),  # 0.04 is not worth a decode
        ({"target_row": 0.6, "draft_decode": 0.03}, 0.8, 2),
    ],
)
def test_selective_drafts_go_as_deep_as_pays(
    prices: dict[str, float], expected: float, n_drafted: int
) -> None:
    terms = Terms(
        target_row=prices.get("target_row", 0.1),
        target_pass=0.0,
        draft_row=prices.get("draft_row", 0.0),
        draft_decode=prices.get("draft_decode", 0.0),
        greedy=(0.0,) * 16,
        sampled=tuple(0.8 if i == 4 else 0.0 for i in range(16)),  # 4: of a probability of 3 / 4
    )
    result = play(
        SimulatedExecutor(facts(), per_pass(1.0)),
        [PlanEntry(0, (), True, 3, selective=True, expected=expected)],
        terms=terms,
        drafts=Drafts(acceptance=0.75, spread=0.0, falloff=1.0),
        temperature=1.0,
    )
    [entry] = result.entries
    assert entry.n_drafted == n_drafted
    n_tried = min(n_drafted, entry.n_accepted + 1)
    assert result.trials == (((16 + 4, n_tried, entry.n_accepted),) if n_drafted else ())
    assert result.n_draft_decodes == max(1, n_drafted)


def test_where_state_is_recurrent_a_few_drafts_are_cut_rather_than_given_a_pass() -> None:
    def lengths(target_pass: float) -> list[int]:
        certain = (1.0,) * 16
        terms = Terms(
            target_row=0.1,
            target_pass=target_pass,
            draft_row=0.0,
            draft_decode=0.0,
            greedy=certain,
            sampled=certain,
        )
        entries = [
            PlanEntry(i, (), True, n, selective=True, expected=1.0) for i, n in enumerate((1, 1, 3))
        ]
        executor = SimulatedExecutor(facts(recurrent=True), per_pass(1.0))
        return [entry.n_drafted for entry in play(executor, entries, terms=terms).entries]

    # Two drafts more, at 1.0 - 0.1 each, are worth 1.8 tokens.
    assert lengths(1.7) == [1, 1, 3]
    assert lengths(1.9) == [1, 1, 1]


# ----------------------------------------------------------------------------- loads


def test_how_results_are_bundled_changes_nothing() -> None:
    """Streaming reports each step; else results come together, many steps of 1 ms at a time."""

    def report(streaming: bool) -> SimulationReport:
        kind = RequestKind(prompt=Uniform(1, 200), answer=Uniform(1, 40), streaming=streaming)
        # Rows cost nothing: else prompts come in smaller chunks where somebody follows.
        cost = StepCost(target_pass=1e-3, target_row=0.0, draft_decode=1e-4, draft_row=1e-5)
        return simulate(
            OpenLoop(steady(50.0), 3.0), [kind], facts(), cost, n_requests=500, speculation=2
        )

    assert report(streaming=True) == report(streaming=False)


def test_trials_end_after_a_few_steps_though_results_are_reported_rarely() -> None:
    """Drafts are seldom right, nobody follows, and many steps fit into the time between reports."""
    cost = StepCost(target_pass=3e-4, target_row=6e-5, draft_decode=1e-4, draft_row=2e-5)
    kind = RequestKind(
        prompt=Uniform(35, 55), answer=Uniform(32, 96), drafts=Drafts(0.06, 0.2, falloff=0.8)
    )
    undrafted, adaptive = (
        simulate(
            ClosedLoop(steady(1)), [kind], facts(), cost, n_requests=200, speculation=speculation
        )
        for speculation in (0, "auto")
    )
    assert adaptive.drafted > 200  # some 150 at the beginning, then those of trials
    assert adaptive.throughput > 0.985 * undrafted.throughput


def test_the_same_arguments_give_the_same_report() -> None:
    def report(seed: int) -> SimulationReport:
        kind = RequestKind(prompt=LogNormal(20, 1.0, 200), answer=Uniform(1, 40))
        return simulate(
            OpenLoop(steady(3.0)), [kind], facts(), per_pass(0.01), n_requests=100, seed=seed
        )

    assert report(1) == report(1)
    assert report(1) != report(2)


def test_drafts_are_right_as_often_as_their_kind_says() -> None:
    drafts = Drafts(acceptance=0.7, spread=0.4, falloff=0.8)
    luck = Luck(drafts)
    for depth in range(3):
        share = statistics.mean(need < luck.left[depth] for need in luck.needs)
        assert share == pytest.approx(0.7 * 0.8**depth, rel=0.02)
        of_class = Counter(luck.confidences(depth))
        right = Counter(
            c
            for c, need in zip(luck.confidences(depth), luck.needs, strict=True)
            if need < luck.left[depth]
        )
        for confidence, n in of_class.items():
            if n > 1000:  # the head's probability is that of being right
                least, most = (1 - 2 ** (-c / 2) for c in (confidence, confidence + 1))
                assert least - 0.03 < right[confidence] / n < (most + 0.03 if most < 0.99 else 1.01)


@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0, 3.0])
def test_gaps_vary_as_asked(variation: float) -> None:
    times = list(itertools.islice(OpenLoop(steady(4.0), variation).times(random.Random(1)), 40_000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(variation, abs=0.12)


def test_a_square_wave_of_requests() -> None:
    times = itertools.takewhile(
        lambda t: t < 1000, OpenLoop(square_wave(2.0, 10.0, 20.0)).times(random.Random(1))
    )
    halves = Counter(int(t // 10) % 2 for t in times)
    assert halves[0] == pytest.approx(1000, rel=0.1)
    assert halves[1] == pytest.approx(5000, rel=0.1)


def test_nobody_comes_while_the_rate_is_0() -> None:
    arrivals = OpenLoop(Profile(((5.0, 0.0), (1.0, 3.0))), variation=0.0)
    times = list(itertools.islice(arrivals.times(random.Random(1)), 7))
    assert all(t % 6 >= 5 or t % 6 == 0 for t in times)


def test_a_ramp_goes_up_and_down_by_one() -> None:
    assert ramp(1, 4, 14.0).pieces == tuple((2.0, float(n)) for n in (1, 2, 3, 4, 3, 2, 1))


def test_clients_come_and_leave_as_the_profile_says() -> None:
    report = simulate(
        ClosedLoop(square_wave(1, 5, 20.0)),
        [RequestKind(prompt=Fixed(3), answer=Fixed(4))],
        facts(n_seq=3),
        per_pass(0.1),
        until=60.0,
    )
    for sample in report.samples:
        if sample.time % 10 > 2 and sample.time < 60:
            level = 1 if sample.time % 20 < 10 else 5
            assert sample.running + sample.waiting == level
    assert report.samples[-1].time <= report.seconds < 62
    assert sum(s.tokens for s in report.samples) <= report.generated_tokens == 4 * report.requests


def test_engines_share_requests_evenly() -> None:
    report = simulate(
        ClosedLoop(steady(6)),
        [RequestKind(prompt=Fixed(3), answer=Fixed(4))],
        facts(n_seq=2),
        per_pass(0.1),
        n_requests=600,
        n_engines=3,
        speculation=0,
    )
    assert [sum(s.finished.values()) for s in report.stats] == [200, 200, 200]
    assert report.queued.most == 0.0
    assert report.throughput == pytest.approx(60.0)
    assert report.busy == pytest.approx([40.0] * 3)


def test_urgent_requests_wait_less() -> None:
    kinds = [
        RequestKind(prompt=Fixed(1), answer=Fixed(1), weight=9.0),
        RequestKind(prompt=Fixed(1), answer=Fixed(1), priority=-5),
    ]
    recorders: list[Recorder] = []

    def recorder(facts: ModelFacts) -> Recorder:
        recorders.append(Recorder(facts))
        return recorders[-1]

    simulate(
        OpenLoop(steady(10.5)),
        kinds,
        facts(n_seq=1),
        per_pass(0.1),
        n_requests=4000,
        make_scheduler=recorder,
    )
    [simulated] = recorders
    waits: dict[int, list[float]] = {0: [], -5: []}
    for sequence in simulated.added:
        assert sequence.admitted is not None
        waits[sequence.params.priority].append(sequence.admitted - sequence.submitted)
    assert statistics.mean(waits[-5]) < 0.2 < 2.0 < statistics.mean(waits[0])


def test_what_the_scheduler_breaks_is_noticed() -> None:
    class Forgetful(Scheduler):
        def add(self, sequence: Sequence) -> None:
            if sequence.ticket % 7:
                super().add(sequence)

    with pytest.raises(InternalError, match="20 requests were asked for, and 18 came out"):
        simulate(
            OpenLoop(steady(1.0)),
            [RequestKind(prompt=Fixed(3), answer=Fixed(4))],
            facts(),
            per_pass(0.1),
            n_requests=20,
            make_scheduler=Forgetful,
        )


@pytest.mark.parametrize("snapshot", [0, 7])
def test_a_parked_request_goes_on_where_it_was(snapshot: int) -> None:
    """Two steps, a pause, and the rest of its five tokens."""
    executor = SimulatedExecutor(facts(n_cells=300), per_pass(1.0))
    executor.expect(1, Luck(Drafts()), 0)
    admission = Admission(0, SamplingParams(), 0, (), 5, ticket=1)
    goes_on = (PlanEntry(0, (), True, 0),)
    executor.hand_over(Plan((), (admission,), (PlanEntry(0, (65,) * 9, True, 0),), number=1), 0.0)
    executor.hand_over(Plan((), (), goes_on, number=2), 0.0)
    assert executor.end_step()
    executor.hand_over(Plan((), (), (), number=3, park=(Park(0, snapshot),)), 1.0)
    assert executor.end_step()
    results = executor.take_results(2.0)
    saved = ((7, 10_000),) if snapshot else ()
    if snapshot:
        assert results.pop().saved == saved, "ten tokens: the newest has not been fed"
    assert [len(result.entries[0].token_ids) for result in results] == [1, 1]
    assert executor.step_end == math.inf

    fed = goes_on if snapshot else (PlanEntry(2, (65,) * 11, True, 0),)
    entry = PlanEntry(2, fed[0].tokens, True, 0)
    resume = Plan((), (), (entry,), number=4, run_ahead=9, resume=(Resume(2, 1, snapshot),))
    executor.hand_over(resume, 2.0)
    while executor.step_end < math.inf:
        executor.end_step()
    results = executor.take_results(5.0)
    assert [result.entries[0].finish_reason for result in results] == [None, None, "length"]
    assert results[0].n_target_tokens == (1 if snapshot else 11)


def test_a_plan_is_not_repeated_beyond_the_cells() -> None:
    executor = SimulatedExecutor(facts(n_cells=16), per_pass(1.0))
    executor.expect(1, Luck(Drafts()), 0)
    admission = Admission(0, SamplingParams(), 0, (), 100, ticket=1)
    entry = PlanEntry(0, (65,) * 9, True, 0)
    executor.hand_over(
        Plan((), (admission,), (entry,), number=1, run_ahead=99, followed=False), 0.0
    )
    n_steps = 0
    while executor.step_end < math.inf:
        wake = executor.end_step()
        n_steps += 1
    assert n_steps == 1 + 7, "nine tokens of the prompt, and then one for each step"
    assert wake, "somebody must make another plan"
    with pytest.raises(InternalError, match="cells do not suffice"):
        executor.hand_over(Plan((), (), (PlanEntry(0, (), True, 0),), number=2), 8.0)


def test_what_is_released_leaves_before_its_plan_begins() -> None:
    executor = SimulatedExecutor(facts(), per_pass(1.0))
    executor.expect(1, Luck(Drafts()), 0)
    executor.expect(2, Luck(Drafts()), 0)
    admissions = tuple(Admission(i, SamplingParams(), 0, (), 9, ticket=1 + i) for i in (0, 1))
    entries = tuple(PlanEntry(i, (65,), True, 0) for i in (0, 1))
    executor.hand_over(Plan((), admissions, entries, number=1), 0.0)
    both = tuple(PlanEntry(i, (), True, 0) for i in (0, 1))
    executor.hand_over(Plan((), (), both, number=2), 0.0)
    executor.hand_over(Plan((0,), (), both[1:], number=3), 0.0)
    for _ in range(3):
        executor.end_step()
    n_tokens = [[len(e.token_ids) for e in r.entries] for r in executor.take_results(3.0)]
    assert n_tokens == [[1, 1], [0, 1], [1]]


def test_an_executor_refuses_what_no_executor_could_run() -> None:
    executor = SimulatedExecutor(facts(), per_pass(1.0))
    with pytest.raises(InternalError, match="sequence 0 is left but free"):
        executor.hand_over(Plan((0,), (), ()), 0.0)
    with pytest.raises(InternalError, match="no step is under way"):
        executor.end_step()


@pytest.mark.parametrize(
    ("parameter", "make"),
    [
        ("n", lambda: Fixed(0)),
        ("low", lambda: Uniform(3, 2)),
        ("median", lambda: LogNormal(0, 1.0, 9)),
        ("acceptance", lambda: Drafts(acceptance=1.5)),
        ("weight", lambda: RequestKind(prompt=Fixed(1), answer=Fixed(1), weight=0.0)),
        ("pieces", lambda: steady(0.0)),
        ("pieces", lambda: Profile(((0.0, 1.0),))),
        ("variation", lambda: OpenLoop(steady(1.0), -1.0)),
        ("target_row", lambda: StepCost(1.0, -1.0, 0.0, 0.0)),
        ("n_requests", lambda: run()),
        ("n_engines", lambda: run(n_requests=1, n_engines=0)),
        ("sample_every", lambda: run(n_requests=1, sample_every=0.0)),
        ("kinds", lambda: simulate(OpenLoop(steady(1.0)), [], facts(), per_pass(1.0), until=1.0)),
        ("speculation", lambda: run(n_requests=1, speculation=5)),
        ("speculation", lambda: run(n_requests=1, speculation=-1)),
        ("n_requests", lambda: run(n_requests=0)),
        ("until", lambda: run(until=0.0)),
        ("until", lambda: run(until=math.nan)),
        *(
            (name, lambda name=name, value=value: one_kind(**{name: value}))
            for name, value in (
                *(("priority", 101), ("deadline", 0.0), ("temperature", -1.0)),
                ("temperature", math.inf),
            )
        ),
    ],
)
def test_a_bad_argument_is_named(parameter: str, make: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        make()
    assert caught.value.parameter == parameter


def test_a_prompt_that_no_engine_would_take_is_refused() -> None:
    with pytest.raises(PromptTooLongError):
        run(n_prompt=256, n_requests=1)


def test_where_no_time_passes_nothing_comes_per_second() -> None:
    report = simulate(ClosedLoop(steady(1)), [one_kind()], facts(), per_pass(0.0), n_requests=3)
    assert report.seconds == report.throughput == report.utilisation == 0.0


def test_a_target_that_takes_no_time_leaves_nothing_to_choose() -> None:
    cost = StepCost(target_pass=0.0, target_row=0.0, draft_decode=1e-3, draft_row=0.0)
    kind = RequestKind(prompt=Fixed(1), answer=Fixed(100))
    report = simulate(ClosedLoop(steady(1)), [kind], facts(), cost, n_requests=3)
    assert report.requests == 3


def one_kind(**options: Any) -> RequestKind:
    return RequestKind(prompt=Fixed(1), answer=Fixed(1), **options)


def run(n_prompt: int = 1, **options: Any) -> SimulationReport:
    kind = RequestKind(prompt=Fixed(n_prompt), answer=Fixed(1))
    return simulate(OpenLoop(steady(1.0)), [kind], facts(), per_pass(1.0), **options)
