"""Figures of runs, against figures counted by hand and against numpy on plain lists."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.simulated_runs import simulated_run
from mtpbatch.loadtest.records import Outcome, RequestRecord, RunRecord, Slo
from mtpbatch.loadtest.summary import (
    Distribution,
    Weighted,
    distribution,
    meets,
    summarize,
    tpot,
    ttft,
)


def request(
    index: int,
    sent: float,
    chunks: list[tuple[float, int]],
    ended: float,
    *,
    outcome: Outcome = "ok",
    output_tokens: int | None = None,
    prompt_tokens: int | None = 10,
    cached_tokens: int | None = None,
    drafted: int | None = None,
    accepted: int | None = None,
    steps: int | None = None,
) -> RequestRecord:
    tokens = sum(n for _, n in chunks)
    return RequestRecord(
        index=index,
        scheduled=sent,
        sent=sent,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=tokens if output_tokens is None else output_tokens,
        chunks=tuple(chunks),
        ended=ended,
        outcome=outcome,
        finish_reason="stop" if outcome == "ok" else None,
        error="timeout" if outcome == "error" else None,
        drafted=drafted,
        accepted=accepted,
        steps=steps,
    )


def run(
    requests: list[RequestRecord], window: tuple[float, float], slo: Slo | None = None
) -> RunRecord:
    return RunRecord(
        name="a run",
        started_at="2026-11-29T12:00:00Z",
        target={},
        load={},
        environment={},
        window=window,
        requests=tuple(requests),
        slo=slo or {},
    )


# Counted from second 10 to second 20. The first was sent before, the last ends after.
BY_HAND = run(
    [
        request(0, 8.0, [(9.0, 1), (11.0, 1)], 11.0, prompt_tokens=100, cached_tokens=50),
        request(1, 10.0, [(10.5, 1), (11.5, 3), (12.5, 1)], 13.0, drafted=6, accepted=2, steps=3),
        request(2, 12.0, [(14.0, 2)], 14.5, outcome="cancelled"),
        request(3, 15.0, [], 16.0, outcome="error"),
        request(4, 18.0, [(19.0, 1), (21.0, 1)], 22.0, drafted=2, accepted=0, steps=2),
    ],
    (10.0, 20.0),
    {"ttft": 0.75, "tpot": 1.0},
)


def test_the_figures_of_a_run_counted_by_hand() -> None:
    summary = summarize(BY_HAND)
    assert (summary.seconds, summary.requests, summary.sent) == (10.0, 5, 4)
    assert (summary.ok, summary.cancelled, summary.failed) == (2, 1, 1)
    assert summary.errors == {"timeout": 1}
    assert summary.finish_reasons == {"stop": 2}
    # Ended well within the window: the first two. Tokens within it: 1, 1 + 3 + 1, 2, and 1.
    assert summary.request_rate == pytest.approx(0.2)
    assert summary.output_rate == pytest.approx(0.9)
    # First chunks within it: of the second, the third and the last.
    assert summary.input_rate == pytest.approx(3.0)
    # Only the second one kept the SLO.
    assert summary.goodput_requests == pytest.approx(0.1)
    assert summary.goodput_tokens == pytest.approx(0.5)
    assert summary.slo_share == pytest.approx(1 / 3)
    # Of the two sent within it that ended well.
    assert summary.ttft is not None
    assert (summary.ttft.n, summary.ttft.mean, summary.ttft.maximum) == (2, 0.75, 1.0)
    assert summary.tpot is not None
    assert (summary.tpot.minimum, summary.tpot.maximum) == (0.5, 2.0)
    assert summary.e2e is not None
    assert summary.e2e.mean == 3.5
    # Gaps that end within it: 2 s of the first one, 1 s and 1 s of the second.
    assert summary.icl is not None
    assert summary.icl.n == 3
    assert summary.icl.mean == pytest.approx(4 / 3)
    assert summary.itl is not None
    assert summary.itl.n == 5
    assert summary.itl.mean == pytest.approx(4 / 5)
    assert summary.itl.median == pytest.approx(1 / 3)
    assert summary.acceptance_length == pytest.approx(7 / 5)
    assert summary.acceptance_rate == pytest.approx(2 / 8)
    assert summary.peak_concurrency == 2
    # 1 s of the first one, 3, 2.5, 1, and 2 s of the last one.
    assert summary.mean_concurrency == pytest.approx(0.95)


def test_steps_that_nobody_counted_follow_from_what_was_accepted() -> None:
    one = request(0, 0.0, [(1.0, 1), (2.0, 4)], 2.0, drafted=9, accepted=3)
    assert summarize(run([one], (0.0, 2.0))).acceptance_length == pytest.approx(5 / 2)


def test_without_an_slo_there_is_no_goodput() -> None:
    summary = summarize(run([*BY_HAND.requests], BY_HAND.window))
    figures = (summary.goodput_requests, summary.goodput_tokens, summary.slo_share)
    assert figures == (None, None, None)


@pytest.mark.parametrize("requests", [[], [request(0, 0.0, [], 1.0, outcome="error")]])
@pytest.mark.parametrize("window", [(0.0, 0.0), (0.0, 2.0)])
def test_a_run_of_nothing_has_no_latencies(
    requests: list[RequestRecord], window: tuple[float, float]
) -> None:
    summary = summarize(run(requests, window))
    assert (summary.ttft, summary.itl, summary.e2e) == (None, None, None)
    assert summary.output_rate == (0.0 if window[1] else None)


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        ({}, True),
        ({"ttft": 1.0}, True),
        ({"ttft": 0.999}, False),
        ({"tpot": 0.5}, True),
        ({"tpot": 0.499}, False),
        ({"e2e": 4.0}, True),
        ({"e2e": 3.999}, False),
        ({"ttft": 2.0, "e2e": 3.0}, False),
    ],
)
def test_a_request_keeps_an_slo_up_to_its_limits(slo: Slo, kept: bool) -> None:
    assert meets(request(0, 1.0, [(2.0, 3), (4.0, 2)], 5.0), slo) == kept


def test_who_ended_badly_keeps_no_slo_and_who_has_one_token_keeps_any_per_token() -> None:
    chunks = [(1.0, 1)]
    assert not meets(request(0, 0.0, chunks, 1.0, outcome="cancelled"), {})
    assert meets(request(0, 0.0, chunks, 1.0), {"tpot": 1e-9})
    assert not meets(request(0, 0.0, [], 1.0), {"ttft": 1e9})


def test_tokens_that_the_server_did_not_tell_by_chunk_are_spread_over_its_chunks() -> None:
    """Ten tokens in four chunks that count one each: two and a half in each."""
    one = request(0, 0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)], 4.0, output_tokens=10)
    summary = summarize(run([one], (0.0, 4.0)))
    assert summary.output_rate == pytest.approx(10 / 4)
    assert summary.itl is not None
    assert summary.itl.n == pytest.approx(7.5)
    assert summary.itl.mean == pytest.approx(1 / 2.5)
    assert summarize(run([one], (0.0, 2.0))).output_rate == pytest.approx(5 / 2)


def test_a_chunk_without_tokens_leaves_its_time_to_the_next() -> None:
    one = request(0, 0.0, [(1.0, 1), (1.5, 0), (2.0, 2)], 2.0)
    summary = summarize(run([one], (0.0, 2.0)))
    assert summary.itl is not None
    assert (summary.itl.n, summary.itl.mean) == (2, 0.5)
    assert summary.icl is not None
    assert (summary.icl.n, summary.icl.mean) == (2, 0.5)


# ------------------------------------------------------------------- against plain lists

moments = st.integers(0, 400).map(lambda n: n / 8)  # exact in binary
gaps = st.integers(0, 40).map(lambda n: n / 8)


@st.composite
def requests(draw: st.DrawFn) -> RequestRecord:
    sent = draw(moments)
    chunks = []
    now = sent
    for gap in draw(st.lists(gaps, max_size=6)):
        now += gap
        chunks.append((now, draw(st.integers(1, 4))))
    known = draw(st.booleans())
    tokens = sum(n for _, n in chunks)
    accepted = draw(st.integers(0, tokens)) if known else None
    return request(
        0,
        sent,
        chunks,
        now + draw(gaps),
        outcome=draw(st.sampled_from(["ok", "ok", "cancelled", "error"])),
        prompt_tokens=draw(st.none() | st.integers(1, 50)),
        drafted=None if accepted is None else accepted + draw(st.integers(0, 9)),
        accepted=accepted,
    )


@st.composite
def runs(draw: st.DrawFn) -> RunRecord:
    begin = draw(moments)
    window = begin, begin + draw(st.integers(1, 160)) / 8
    return run(draw(st.lists(requests(), max_size=12)), window, {"ttft": 2.0, "tpot": 0.5})


def check(found: Distribution | None, values: list[float]) -> None:
    if not values:
        assert found is None
        return
    assert found is not None
    assert found.n == pytest.approx(len(values))
    expected = {
        "mean": np.mean(values),
        "std": np.std(values),
        "minimum": min(values),
        "median": np.median(values),
        "p90": np.percentile(values, 90),
        "p99": np.percentile(values, 99),
        "maximum": max(values),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


@given(runs())
def test_figures_are_those_of_plain_lists(record: RunRecord) -> None:
    begin, end = record.window
    summary = summarize(record)
    sent = [r for r in record.requests if begin <= r.sent <= end]
    ok = [r for r in sent if r.outcome == "ok"]
    check(summary.ttft, [r.chunks[0][0] - r.sent for r in ok if r.chunks])
    each = [
        (r.chunks[-1][0] - r.chunks[0][0]) / (r.output_tokens - 1)
        for r in ok
        if r.output_tokens > 1
    ]
    check(summary.tpot, each)
    check(summary.e2e, [r.ended - r.sent for r in ok])
    icl, itl = [], []
    for r in record.requests:
        for (before, _), (after, tokens) in itertools.pairwise(r.chunks):
            if begin <= after <= end:
                icl.append(after - before)
                itl += [(after - before) / tokens] * tokens
    check(summary.icl, icl)
    check(summary.itl, itl)
    seconds = end - begin
    in_window = [
        (r, tokens) for r in record.requests for at, tokens in r.chunks if begin <= at <= end
    ]
    assert summary.output_rate == pytest.approx(sum(n for _, n in in_window) / seconds)
    good = sum(n for r, n in in_window if meets(r, record.slo))
    assert summary.goodput_tokens == pytest.approx(good / seconds)
    ended = [r for r in record.requests if r.outcome == "ok" and begin <= r.ended <= end]
    assert summary.request_rate == pytest.approx(len(ended) / seconds)
    kept = sum(meets(r, record.slo) for r in ended)
    assert summary.goodput_requests == pytest.approx(kept / seconds)
    assert summary.ok + summary.cancelled + summary.failed == summary.sent == len(sent)
    drafts = [(r.accepted, r.drafted) for r in ok if r.accepted is not None]
    drafted = sum(n for _, n in drafts if n is not None)
    if drafted:
        accepted = sum(n for n, _ in drafts if n is not None)
        assert summary.acceptance_rate == pytest.approx(accepted / drafted)
    else:
        assert summary.acceptance_rate is None


@given(runs())
def test_concurrency_is_how_many_are_under_way_at_each_moment(record: RunRecord) -> None:
    begin, end = record.window
    summary = summarize(record)
    quarters = np.arange(int(begin * 16), int(end * 16)) / 16 + 1 / 32  # between all moments
    levels = [sum(r.sent < q < r.ended for r in record.requests) for q in quarters]
    assert summary.mean_concurrency == pytest.approx(np.mean(levels))
    at_end = sum(r.sent <= end < r.ended for r in record.requests)
    assert summary.peak_concurrency == max(*levels, at_end)


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 4)), min_size=1), st.floats(0, 1))
def test_a_weighted_quantile_is_that_of_repeated_values(
    pairs: list[tuple[int, int]], share: float
) -> None:
    values = np.array([float(value) for value, _ in pairs])
    weights = np.array([float(weight) for _, weight in pairs])
    repeated = np.repeat(values, weights.astype(int))
    if len(repeated):
        found = Weighted.of(values, weights).quantile(share)
        assert found == pytest.approx(np.quantile(repeated, share), abs=1e-9)
    else:
        assert distribution(values, weights) is None


def test_groups_by_acceptance_hold_each_request_once_and_equal_ones_together() -> None:
    record = simulated_run(n=300)
    summary = summarize(record)
    groups = summary.by_acceptance
    begin, end = record.window
    ok = [r for r in record.requests if r.outcome == "ok" and begin <= r.sent <= end]
    lengths = [(r.output_tokens / r.steps, r) for r in ok if r.steps]
    for group in groups:
        own = [r for length, r in lengths if group.least <= length <= group.most]
        assert group.n == len(own)
        assert 0.2 * len(ok) < len(own) < 0.3 * len(ok)
        each = [t for r in own if (t := tpot(r)) is not None]
        assert group.tpot == pytest.approx(np.median(each))
        waits = [b[0] - a[0] for r in own for a, b in itertools.pairwise(r.chunks)]
        assert group.icl == pytest.approx(np.median(waits))
    assert len(groups) == 4
    assert sum(group.n for group in groups) == len(ok)


def test_where_most_are_alike_there_are_fewer_groups() -> None:
    alike = [request(i, i / 8, [(i / 8, 1), (i / 8 + 1, 1)], i / 8 + 1, steps=2) for i in range(8)]
    better = request(8, 1.0, [(2.0, 2)], 2.0, steps=1)
    groups = summarize(run([*alike, better], (0.0, 9.0))).by_acceptance
    assert [(group.least, group.most, group.n) for group in groups] == [(1, 1, 8), (2, 2, 1)]


def test_a_request_of_no_chunks_has_no_first_token() -> None:
    assert ttft(request(0, 0.0, [], 1.0)) is None
    assert math.isclose(ttft(request(0, 0.5, [(1.0, 1)], 1.0)) or 0.0, 0.5)
