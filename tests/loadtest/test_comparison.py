"""Ratios of runs: what they are, and that noise is not taken for a win."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from loadtest.simulated_runs import simulated_run, simulated_sweep
from mtpbatch import InvalidParameterError
from mtpbatch.loadtest.records import Record, RequestRecord, RunRecord
from mtpbatch.loadtest.report import side_by_side
from mtpbatch.loadtest.report.comparison import (
    N_PARTS,
    STUDENT,
    Figure,
    differences,
    figures,
    ratio,
)
from mtpbatch.loadtest.summary import summarize


def slower(run: RunRecord, times: float) -> RunRecord:
    """The same with all that a request waits for so many times as long, sent when it was."""

    def later(request: RequestRecord) -> RequestRecord:
        def at(moment: float) -> float:
            return request.sent + times * (moment - request.sent)

        chunks = tuple((at(moment), tokens) for moment, tokens in request.chunks)
        return msgspec.structs.replace(request, chunks=chunks, ended=at(request.ended))

    return msgspec.structs.replace(run, requests=tuple(map(later, run.requests)))


def test_what_is_twice_as_slow_has_twice_the_latencies_and_is_worse() -> None:
    run = simulated_run(n=1200)
    fast, slow = figures(run), figures(slower(run, 2.0))
    for name in ("TTFT", "TPOT", "End to end"):
        for statistic in ("mean", "median", "p99"):
            found = ratio(slow[f"{name}, {statistic}"], fast[f"{name}, {statistic}"])
            assert found is not None
            assert found.value == pytest.approx(2.0)
            back = ratio(fast[f"{name}, {statistic}"], slow[f"{name}, {statistic}"])
            assert back is not None
            assert back.value == pytest.approx(0.5)
            assert (found.better, back.better) in [(False, True), (None, None)]
    found = ratio(slow["TPOT, mean"], fast["TPOT, mean"])
    assert found is not None
    assert found.better is False


def test_the_figures_are_those_of_the_summary() -> None:
    run = simulated_run()
    found, summary = figures(run), summarize(run)
    assert found["Requests/s"].value == pytest.approx(summary.request_rate)
    assert found["Output tokens/s"].value == pytest.approx(summary.output_rate)
    assert found["Goodput, requests/s"].value == pytest.approx(summary.goodput_requests)
    assert found["Goodput, output tokens/s"].value == pytest.approx(summary.goodput_tokens)
    assert found["Kept the SLO"].value == pytest.approx(summary.slo_share)
    assert found["Tokens per step"].value == pytest.approx(summary.acceptance_length)
    for name, words in (("ttft", "TTFT"), ("itl", "ITL"), ("icl", "ICL"), ("e2e", "End to end")):
        for statistic in ("mean", "median", "p99"):
            expected = getattr(getattr(summary, name), statistic)
            assert found[f"{words}, {statistic}"].value == pytest.approx(expected)


def test_a_figure_without_a_part_of_the_run_is_that_of_the_others() -> None:
    run = simulated_run()
    begin, end = run.window
    size = (end - begin) / N_PARTS

    def part_of(moment: float) -> int:
        return min(int((moment - begin) / size), N_PARTS - 1)

    found = figures(run)
    for part in range(N_PARTS):
        others = [r for r in run.requests if begin <= r.sent <= end and part_of(r.sent) != part]
        waits = [r.chunks[0][0] - r.sent for r in others if r.outcome == "ok"]
        assert found["TTFT, mean"].without[part] == pytest.approx(np.mean(waits))
        assert found["TTFT, median"].without[part] == pytest.approx(np.median(waits))
        ends = [r.ended for r in run.requests if r.outcome == "ok" and begin <= r.ended <= end]
        kept = [moment for moment in ends if part_of(moment) != part]
        rate = len(kept) / (end - begin - size)
        assert found["Requests/s"].without[part] == pytest.approx(rate)


def test_the_variance_of_a_mean_is_the_jackknifes() -> None:
    """For the mean of five equal parts it is their variance / 5, to first order."""
    parts = np.array([1.00, 1.01, 0.99, 1.02, 0.98])
    without = (parts.sum() - parts) / 4
    figure = Figure(name="", unit="number", better="more", value=1.0, without=without)
    assert figure.variance == pytest.approx(parts.var(ddof=1) / 5, rel=0.01)


def test_student_is_the_quantile_of_students_distribution() -> None:
    """Of N_PARTS - 1 degrees of freedom, by integrating its density."""
    n = N_PARTS - 1
    points = np.linspace(-STUDENT, STUDENT, 100_001)
    density = (1 + points**2 / n) ** (-(n + 1) / 2)
    factor = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2))
    assert np.trapezoid(density, points) * factor == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(("n_requests", "n_pairs", "at_most"), [(300, 12, 0.1), (1500, 4, 0.05)])
def test_runs_of_the_same_kind_are_hardly_ever_better_or_worse(
    n_requests: int, n_pairs: int, at_most: float
) -> None:
    """The traffic differs, the server does not: what is better or worse is noise."""
    found = [figures(simulated_run(n=n_requests, seed=seed)) for seed in range(2 * n_pairs)]
    verdicts = [
        ratio(other[name], base[name])
        for base, other in zip(found[::2], found[1::2], strict=True)
        for name in base
    ]
    wrong = [r for r in verdicts if r is not None and r.better is not None]
    assert len(wrong) / len(verdicts) <= at_most


def test_a_p99_of_few_requests_settles_nothing() -> None:
    run = simulated_run(n=300)
    found = ratio(figures(slower(run, 5.0))["TPOT, p99"], figures(run)["TPOT, p99"])
    assert found is not None
    assert found.value == pytest.approx(5.0)
    assert found.better is None


def test_what_is_nothing_or_unsteady_has_no_ratio_or_no_interval() -> None:
    def figure(value: float, without: list[float]) -> Figure:
        return Figure(name="", unit="number", better="more", value=value, without=np.array(without))

    one = figure(1.0, [1.0] * N_PARTS)
    assert ratio(one, figure(0.0, [0.0] * N_PARTS)) is None
    gone = ratio(figure(0.2, [0.0, 0.2, 0.2, 0.2, 0.2]), one)
    assert gone is not None
    assert (gone.value, gone.interval, gone.better) == (0.2, None, None)


# --------------------------------------------------------------------------- side by side


def test_settings_that_differ_are_named_once_each() -> None:
    run = simulated_run(n=40)
    other = msgspec.structs.replace(
        run, load=run.load | {"rate": 3.0, "slo": "e2e=1s", "dataset": "x"}, slo={"e2e": 1.0}
    )
    assert differences([run, run]) == []
    names = [each.split(":")[0] for each in differences([run, other])]
    assert names == ["rate", "dataset", "slo"]
    assert "rate: 12.0, 3.0" in differences([run, other])
    assert len(differences([run, other], {"rate"})) == 2
    warnings = side_by_side.compare([run, other], ["a", "b"]).warnings
    assert sum("Not the same load" in each for each in warnings) == 3


def test_another_machine_is_named() -> None:
    run = simulated_run(n=40)
    other = msgspec.structs.replace(
        run, environment=run.environment | {"cpus": 64, "load_average": "9"}
    )
    (warning,) = side_by_side.compare([run, other], ["a", "b"]).warnings
    assert warning == "Not the same surroundings: cpus: 2, 64."


def test_a_comparison_says_of_each_figure_what_to_think_of_it() -> None:
    base = simulated_run(name="llama-server", depth=0, n=1500)
    other = simulated_run(n=1500)
    (table,) = side_by_side.compare([base, other], ["llama-server", "mtpbatch"]).tables
    assert table.head == ("", "llama-server", "mtpbatch", "/ llama-server", "")
    rows = {row[0]: row for row in table.rows}
    assert rows["TPOT, median"][4] == "better"
    assert rows["ICL, p99"][4] == "worse"
    low, high = map(float, rows["TPOT, median"][3].split("(")[1].strip(")").split(" to "))
    assert low < float(rows["TPOT, median"][3].split()[0]) < high < 1


def test_three_can_be_compared_and_what_one_does_not_tell_is_left_open() -> None:
    run = simulated_run()
    silent = msgspec.structs.replace(
        run,
        requests=tuple(
            msgspec.structs.replace(r, drafted=None, accepted=None, steps=None)
            for r in run.requests
        ),
    )
    found = side_by_side.compare([run, silent, run], ["a", "b", "c"])
    rows = {row[0]: row for row in found.tables[0].rows}
    assert rows["Tokens per step"][2:5] == ("-", "-", "")
    assert rows["Tokens per step"][6].startswith("1.00")


def test_sweeps_are_compared_where_both_have_a_value() -> None:
    base = simulated_sweep(name="a", depth=0)
    other = msgspec.structs.replace(simulated_sweep(name="b"), runs=simulated_sweep().runs[2:])
    found = side_by_side.compare([base, other], ["a", "b"])
    capacity, ratios, *curves = found.tables
    assert [row[0] for row in ratios.rows] == ["12", "16", "20", "24"]
    assert [row[1:] for row in capacity.rows] == [("4", "1.00"), ("12", "3.00")]
    assert len(curves) == 2
    assert "a capacity 4" in found.page()


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([simulated_run(n=40), simulated_sweep()], "runs and sweeps cannot be compared"),
        (
            [
                simulated_sweep(),
                msgspec.structs.replace(simulated_sweep(), parameter="concurrency"),
            ],
            "sweeps over rate and over concurrency",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(records: list[Record], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        side_by_side.compare(records, ["a", "b"])
