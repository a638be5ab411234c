"""``mtpbatch bench``, as a person or a script runs it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from mtpbatch.cli import main
from mtpbatch.loadtest import mock, results
from mtpbatch.loadtest.mock import Pace
from mtpbatch.loadtest.records import RunRecord, SweepRecord

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"} | {
    "OMP_WAIT_POLICY": "passive",
    "COLUMNS": "100",
}
COMMAND = [sys.executable, "-m", "mtpbatch", "bench"]
SMALL = ["--n-seq", "4", "--n-ctx", "512", "--output-length", "8", "--ignore-eos"]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT | environment,
        check=False,
    )


def saved(folder: Path) -> Any:
    return results.load(folder / "result.json")


def test_a_run_on_an_engine_is_reported_and_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    load = ["--requests", "12", "--concurrency", "4", "--cancel", "0.3"]
    done = bench(*SMALL, *load, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "TTFT" in done.stdout
    assert str(out / "report.html") in done.stdout
    record = saved(out)
    assert isinstance(record, RunRecord)
    assert (record.name, record.target["n_seq"], record.load["concurrency"]) == ("mtpbatch", 4, "4")
    outcomes = [request.outcome for request in record.requests]
    assert set(outcomes) == {"ok", "cancelled"}
    assert all(r.output_tokens == 8 for r in record.requests if r.outcome == "ok")
    with (out / "requests.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_a_server_is_swept_and_compared(tmp_path: Path) -> None:
    """The mock has no limit: the least load that is tried keeps the SLO, and so does the most."""
    with mock.running(Pace(ttft=0.002, itl=0.001)) as url:
        swept = bench(
            *("sweep", "--target", url, "--concurrency", "1..4", "--requests", "12"),
            *("--slo", "e2e=60s", "--output-length", "5", "--name", "a mock"),
            *("--out", str(tmp_path / "sweep")),
        )
        one = ["--target", url, "--requests", "8", "--output-length", "5", "--rate", "200"]
        runs = [bench(*one, "--out", str(tmp_path / name)) for name in ("a", "b")]
        assert [run.returncode for run in runs] == [0, 0], runs
    assert swept.returncode == 0, swept.stderr
    assert swept.stderr.count("SLO kept by 100.0%") == 3
    record = saved(tmp_path / "sweep")
    assert isinstance(record, SweepRecord)
    assert (record.name, record.parameter, record.capacity) == ("a mock", "concurrency", 4)
    assert [value for value, _ in record.runs] == [1, 2, 4]
    seeds = [run.load["seed"] for _, run in record.runs]
    assert len(set(seeds)) == 3
    page = tmp_path / "both.html"
    files = [str(tmp_path / "a" / "result.json"), str(tmp_path / "b")]  # or its folder
    compared = bench("compare", *files, "--out", str(page))
    assert compared.returncode == 0, compared.stderr
    assert page.exists()


def test_an_slo_that_is_never_kept_gives_no_capacity(tmp_path: Path) -> None:
    with mock.running(Pace(ttft=0.02)) as url:
        swept = bench(
            *("sweep", "--target", url, "--concurrency", "1..8", "--requests", "4"),
            *("--slo", "ttft=10ms", "--out", str(tmp_path)),
        )
    assert swept.returncode == 0
    assert "too much" in swept.stderr
    assert saved(tmp_path).capacity is None


def test_ctrl_c_ends_the_run_and_reports_what_there_is(tmp_path: Path) -> None:
    with mock.running(Pace(ttft=0.001, itl=0.001)) as url:
        command = [*COMMAND, "--target", url, "--duration", "10m", "--output-length", "50"]
        with subprocess.Popen(
            [*command, "--out", str(tmp_path)],
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            whole = 0
            while whole < 10:  # answers
                assert process.poll() is None
                with urllib.request.urlopen(f"{url}/truth") as truth:
                    whole = sum(served["whole"] for served in json.load(truth))
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    record = saved(tmp_path)
    assert record.load["interrupted"] is True
    outcomes = [(request.outcome, request.error) for request in record.requests]
    assert outcomes.count(("ok", None)) >= 2  # of the ten, eight may not have been read yet
    assert set(outcomes) <= {("ok", None), ("cancelled", "interrupted")}
    assert (tmp_path / "report.html").exists()


def test_a_run_in_which_nothing_went_well_says_why_and_fails() -> None:
    with mock.running(Pace(fail=500)) as url:
        done = bench("--target", url, "--requests", "3")
    assert done.returncode == 1
    assert '3 x http 500, such as: {"error":{"message":"as it was told to"}}' in done.stderr


def test_the_api_key_comes_from_the_environment_and_is_not_written(tmp_path: Path) -> None:
    with mock.running(Pace()) as url:
        done = bench(
            *("--target", url, "--requests", "2", "--out", str(tmp_path)), OPENAI_API_KEY="sesame"
        )
        with urllib.request.urlopen(f"{url}/truth") as truth:
            keys = {served["authorization"] for served in json.load(truth)}
    assert done.returncode == 0, done.stderr
    assert keys == {"Bearer sesame"}
    assert not any("sesame" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "fast"], "mtpbatch: --rate: must be a number above 0"),
        (["--requests", "0"], "mtpbatch: --requests: must be at least 1"),
        (["--n-seq", "0"], "mtpbatch: --n-seq: must be"),
        (["-m", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--target", "localhost:1"], "mtpbatch: --target: must be a URL"),
        (["--target", "http://127.0.0.1:9"], "mtpbatch: --target: nobody answers at"),
        (["--target", "http://127.0.0.1:9", "--n-seq", "4"], "mtpbatch: --n-seq: is a setting"),
        (["sweep", "--trace", "x.jsonl"], "mtpbatch: --trace: "),
        (["sweep", "--slo-share", "2"], "mtpbatch: --slo-share: must be"),
        (["report", "nowhere.json"], "nowhere.json"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) in (1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_without_the_extra_a_server_cannot_be_measured_and_an_engine_can(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ModuleNotFoundError(name='aiohttp')")
    server = bench("--target", "http://127.0.0.1:9", PYTHONPATH=str(tmp_path))
    assert server.returncode == 2
    assert "--target: needs aiohttp: pip install 'mtpbatch[bench]'" in server.stderr
    engine = bench(*SMALL, "--requests", "2", PYTHONPATH=str(tmp_path))
    assert engine.returncode == 0, engine.stderr
