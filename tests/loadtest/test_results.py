"""Results as files."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest

from loadtest.simulated_runs import simulated_run, simulated_sweep
from mtpbatch import InvalidParameterError
from mtpbatch.loadtest import results
from mtpbatch.loadtest.records import Record


@pytest.mark.parametrize("record", [simulated_run(n=40), simulated_sweep()])
def test_a_result_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    paths = results.save(record, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["result.json", "requests.csv", "report.html"]
    assert results.load(paths[0]) == record


def test_a_result_begins_with_the_figures(tmp_path: Path) -> None:
    """For people who look at its beginning, and for scripts that want no more."""
    run = simulated_run(n=200)
    content = results.save(run, tmp_path)[0].read_bytes()
    assert content.startswith(b'{"summaries":[{"seconds":')
    (summary,) = msgspec.json.decode(content)["summaries"]
    begin, end = run.window
    ended = [r for r in run.requests if r.outcome == "ok" and begin <= r.ended <= end]
    assert summary["request_rate"] == pytest.approx(len(ended) / (end - begin))


def test_the_csv_has_a_line_for_each_request(tmp_path: Path) -> None:
    run = simulated_run(n=200)
    path = results.save(run, tmp_path)[1]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["index"]) for line in lines] == [r.index for r in run.requests]
    assert [line["outcome"] for line in lines] == [r.outcome for r in run.requests]
    for line, request in zip(lines, run.requests, strict=True):
        assert float(line["e2e"]) == request.ended - request.sent
        assert (line["ttft"] == "") == (not request.chunks)
        assert (line["counted"] == "True") == (run.window[0] <= request.sent <= run.window[1])
    assert {line["value"] for line in lines} == {""}


def test_the_csv_of_a_sweep_tells_the_runs_apart(tmp_path: Path) -> None:
    sweep = simulated_sweep()
    with results.save(sweep, tmp_path)[1].open(newline="") as file:
        values = [float(line["value"]) for line in csv.DictReader(file)]
    assert values == [value for value, run in sweep.runs for _ in run.requests]


def test_a_report_is_written_anew_from_a_result(tmp_path: Path) -> None:
    paths = results.save(simulated_run(n=40), tmp_path / "first")
    again = results.save_report(results.load(paths[0]), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[1:]]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"record": 3}', b"index,sent\n0,1\n", b"\xff"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InvalidParameterError, match=r"result\.json is no result of a load test"):
        results.load(path)


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    """Even if nothing else in it can be understood."""
    path = tmp_path / "result.json"
    path.write_bytes(b'{"record": {"kind": "movie", "version": 2}}')
    with pytest.raises(InvalidParameterError, match="has version 2 of the format"):
        results.load(path)
