"""The benchmarks compare like with like."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import anyio
import pytest

import measure_page
import mtpbatch
from mtpbatch.loadtest import mock
from mtpbatch.loadtest.mock import Pace
from mtpbatch.native import Model

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "mtpbatch" / "models" / "demo.gguf"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which(os.environ.get("CXX", "c++")),
    reason="needs a C++ compiler",
)
def test_the_native_ideal_does_the_work_of_the_engine(tmp_path: Path) -> None:
    from benchmarks import native_ideal
    from benchmarks.engine_process import generate_with
    from benchmarks.workload import N_CTX, Load, closed_loop

    async def engine_load() -> Load:
        async with mtpbatch.Engine.open(DEMO, n_seq=1, n_ctx=N_CTX, n_draft_max=3) as engine:
            return await closed_loop(generate_with(engine, 3), 1, 16)

    program = native_ideal.build(tmp_path)
    ideal = native_ideal.run(program, DEMO, n_seq=1, depth=3, kv="unified", threads=1, tokens=16)
    engine = anyio.run(engine_load)
    assert ideal.accepted > 0
    assert (ideal.tokens, ideal.drafted, ideal.accepted) == (
        engine.tokens,
        engine.drafted,
        engine.accepted,
    )


def test_ratios_are_taken_within_a_round() -> None:
    from benchmarks.report import Comparison, Record, Side, Variant
    from benchmarks.workload import Load

    def record(side: Side, turn: int, speed: int) -> Record:
        load = Load(tokens=speed, seconds=1, drafted=0, accepted=0)
        return Record(Variant(side, 0, "unified"), turn, {4: load})

    # The machine is twice as fast in the second round.
    speeds = {Side.MTPBATCH: 30, Side.LLAMA_SERVER: 20, Side.IDEAL: 40}
    records = [record(side, turn, turn * speeds[side]) for turn in (1, 2) for side in speeds]
    comparison = Comparison(records)
    assert (
        "| best fixed mtpbatch / best llama-server | 1.50 (1.50 to 1.50) |" in comparison.ratios()
    )
    assert "| mtpbatch, no MTP, unified cache | 45 (30 to 60) |" in comparison.speeds()


def test_a_hogs_ratio_is_that_of_its_round() -> None:
    from benchmarks.gil_hog import Case, Triple, comparison

    case = Case(clients=4, depth=3, stop=True)
    text = comparison({case: [Triple(100, 80, 40), Triple(200, 160, 80), Triple(400, 160, 80)]})
    assert "| 0.80 (0.40 to 0.80) | 0.40 (0.20 to 0.40) | 0.50 (0.50 to 0.50) |" in text


def test_every_window_of_the_hogs_benchmark_is_measured() -> None:
    from benchmarks.gil_hog import Case, measure

    cases = [Case(clients=2, depth=3, stop=False), Case(clients=1, depth=0, stop=True)]
    triples = anyio.run(partial(measure, DEMO, cases, rounds=2, seconds=0.05, threads=1))
    assert {case: len(of_case) for case, of_case in triples.items()} == dict.fromkeys(cases, 2)


def test_a_window_that_outlasts_its_generations_is_refused() -> None:
    from benchmarks.gil_hog import Case, window
    from benchmarks.workload import PROMPTS

    async def one_token() -> None:
        with Model(DEMO) as model:
            n_ctx = len(model.tokenize(PROMPTS[0])) + 1
        async with mtpbatch.Engine.open(DEMO, n_seq=1, n_ctx=n_ctx, n_threads=1) as engine:
            await window(engine, Case(clients=1, depth=0, stop=False), 0.05)

    with pytest.raises(RuntimeError, match="--window"):
        anyio.run(one_token)


def test_what_a_process_costs_is_a_ratio_of_one_round() -> None:
    from benchmarks.isolation import Case, comparison

    text = comparison({Case(clients=8, depth=3): [(100, 90), (200, 160), (400, 380)]})
    assert "| 8 | 3 | 200 (100 to 400) | 160 (90 to 380) | 0.900 (0.800 to 0.950) |" in text


def test_both_ways_to_run_a_model_are_measured_in_every_round() -> None:
    from benchmarks.isolation import Case, measure

    cases = [Case(clients=2, depth=3), Case(clients=1, depth=0)]
    found = anyio.run(partial(measure, DEMO, cases, rounds=2, n_tokens=4, threads=1))
    assert {case: len(pairs) for case, pairs in found.items()} == dict.fromkeys(cases, 2)
    assert all(speed > 0 for pairs in found.values() for pair in pairs for speed in pair)


@pytest.mark.parametrize(
    ("arguments", "plots"),
    [
        (["policies", "--rates", "0.5", "--sequences", "4", "--requests", "20"], ["policies"]),
        (["changes", "--seconds", "60"], ["ramp", "square_wave"]),
        (["replicas", "--engines", "2", "--requests", "200", "--rate", "9"], ["replicas"]),
        (["million", "--requests", "200"], []),
    ],
)
def test_every_study_of_the_simulator_runs(
    arguments: list[str], plots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import simulate

    command = [*arguments, "--depths", "0", "auto"]
    simulate.main(command)
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4, "a head, the line below it, and one row for each depth"
    if plots:
        pytest.importorskip("matplotlib")
        simulate.main([*command, "--plots", str(tmp_path)])
        assert capsys.readouterr().out == text, "the same figures every time"
    assert sorted(path.stem for path in tmp_path.iterdir()) == plots


def test_each_kind_of_text_is_played_by_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import simulate

    simulate.main(["texts", "--clients", "1", "--turns", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(("repetitive", "prose", "sampled", "poor", "mixed"))


def tables(*command: str) -> list[str]:
    """The rows that a benchmark prints, heads among them."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return [line for line in done.stdout.splitlines() if line.startswith("| ")]


def test_the_adaptive_depth_is_measured_beside_others() -> None:
    work = ["--texts", "poor", "--concurrency", "2", "--depths", "0", "--rounds", "1"]
    work += ["--turns", "1", "--least", "2", "--tokens", "4", "--stage", "0.05", "--threads", "1"]
    _, _, steady, _, _, ramp, wave = tables("benchmarks.adaptive", str(DEMO), *work)
    assert steady.startswith("| poor | 2 | ")
    assert ramp.startswith("| 1 to 2 to 1 | ")
    assert wave.startswith("| 2 and 2 in turn | ")


@pytest.mark.parametrize(
    ("promise", "n_rows"), [("smooth", 1), ("churn", 2), ("overcommit", 2), ("predict", 5)]
)
def test_the_schedulers_promises_are_measured(promise: str, n_rows: int) -> None:
    """But for the prefix cache, whose 64 long prompts take too long for a test."""
    found = tables("benchmarks.scheduling", promise, str(DEMO), "--rounds", "1", "--threads", "1")
    assert len(found) == 2 + n_rows


PAGE = """\
```sh title="several"
pip install '.[bench]'
python -m benchmarks.simulate million --requests 20 --depths 0
python -m benchmarks.simulate texts --clients 1 --turns 1
```

<!-- printed -->

measured before

<!-- end -->

| a table | of nobody's |

<!-- printed -->
<!-- end -->

The rest.
"""


def test_what_a_command_prints_goes_into_its_place_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure_page", str(page), "texts"])
    measure_page.main()
    measure_page.main()
    text = page.read_text(encoding="utf-8")
    before, after = PAGE.split("<!-- printed -->\n<!-- end -->\n")
    printed = text.removeprefix(before + "<!-- printed -->\n\n| text | 1 clients |\n")
    assert printed.removesuffix("\n\n<!-- end -->\n" + after).count("\n") == 5
    assert len(printed) < len(text) - len(before), "all before the place is as it was"
    assert text.endswith(after)

    monkeypatch.setattr(sys, "argv", ["measure_page", str(page)])
    measure_page.main()
    text = page.read_text(encoding="utf-8")
    assert "measured before" not in text
    assert "| 0 | 20 |" in text


def test_a_page_with_no_place_for_an_output_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("<!-- end -->", "", 1), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure_page", str(page)])
    with pytest.raises(SystemExit):
        measure_page.main()
    assert "2 benchmarks are followed by 1 places" in capsys.readouterr().err


def test_every_measurement_of_the_scheduler_has_its_place() -> None:
    text = (ROOT / "docs" / "scheduling.md").read_text(encoding="utf-8")
    assert len(measure_page.places(text)) == text.count("<!-- printed -->") > 0


def test_the_scheduler_is_measured_with_and_without_a_queue() -> None:
    from benchmarks.scheduler_cost import measure

    alone, crowded = measure(n_sequences=4, n_waiting=20, n_steps=5, followed=True)
    assert len(alone) == len(crowded) == 5
    assert min(*alone, *crowded) > 0


def test_the_loops_pauses_are_measured_for_every_kind_of_call() -> None:
    from benchmarks.loop_pauses import measure

    run = partial(measure, DEMO, n_chars=5000, rounds=2, threads=1, whole=True)
    pauses = anyio.run(run)
    assert len(pauses) == 7
    for of_one in pauses.values():
        assert len(of_one) == 2
        assert all(pause.longest > 0 and pause.total > 0 for pause in of_one)


def test_passes_of_changing_rows_are_measured_beside_those_of_as_many() -> None:
    from benchmarks.changing_rows import measure

    rows = measure(DEMO, threads=1, rounds=1)
    assert [row[:3] for row in rows] == [
        ["demo.gguf", str(n), str(other)]
        for n, other in ((1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2))
    ]
    for *_, in_a_row, in_turn, more in rows:
        assert float(in_turn) - float(in_a_row) == pytest.approx(float(more), abs=0.011)


def test_each_depth_is_measured_with_poor_texts_and_then_good_ones() -> None:
    from benchmarks.changing_texts import Work, answers, rows
    from benchmarks.report import Depth

    work = Work(n_prompt=20, n_poor=2, n_good=7, tokens=8)
    depths: tuple[Depth, ...] = (0, 3, "auto")
    of_round = {depth: anyio.run(answers, DEMO, depth, 1, work) for depth in depths}
    for some in of_round.values():
        assert [answer.tokens for answer in some] == 2 * [4] + 7 * [8]
    assert not any(answer.drafted for answer in of_round[0])
    assert all(answer.drafted for answer in of_round[3])
    table = list(rows([of_round], work))
    assert [row[:2] for row in table] == [
        ["20", "poor"],
        ["20", "good, 1 to 6"],
        ["20", "good, 7 to 7"],
    ]


def test_a_loop_that_is_held_up_is_noticed() -> None:
    from benchmarks.loop_pauses import watch

    async def hold_up() -> None:
        end = time.perf_counter() + 0.03
        while time.perf_counter() < end:
            pass

    assert anyio.run(watch, hold_up).longest >= 0.03


def test_what_is_compared_with_guidellm_is_what_the_mock_does(tmp_path: Path) -> None:
    from benchmarks.guidellm import Traffic, by_mtpbatch

    with mock.running(Pace(ttft=0.05, itl=0.01)) as url:
        figures = by_mtpbatch(url, Traffic(["one", "two", "three"], 1, 8), tmp_path)
    assert figures.ttft >= 50
    assert figures.itl >= 9
    assert figures.throughput <= 8 / (0.05 + 7 * 0.01) * 1.5, "it may begin within an answer"


def test_the_load_client_is_measured_by_what_the_mock_did() -> None:
    from benchmarks.load_client import pace_row, row

    sent, received, *figures = row(streams=4, tokens=5, rate=None)
    assert (sent, float(received) > 0, len(figures)) == ("at once", True, 4)
    figures_of_mock, ttft, tpot = pace_row(0.02, 0.005, tokens=5)
    assert figures_of_mock == "20, 5"
    assert float(ttft) >= 20
    assert float(ttft) + 4 * float(tpot) > 39.9, "the last token comes after 40 ms"


def test_metrics_work_while_it_is_measured_what_they_cost() -> None:
    from benchmarks.metrics_overhead import between_steps

    rounds = anyio.run(partial(between_steps, followed=True), 4, 5, 2)
    assert len(rounds) == 2
    assert all(time > 0 for pair in rounds for time in pair)
