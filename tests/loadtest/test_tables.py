"""Tables: figures in words, and on terminals with and without rich."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.simulated_runs import simulated_run, simulated_sweep
from mtpbatch import InvalidParameterError
from mtpbatch.cli import bench_results
from mtpbatch.loadtest import results
from mtpbatch.loadtest.records import Record
from mtpbatch.loadtest.report.tables import Table, number, plain, print_record, seconds
from terminal import screen_of

SIZES = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


@given(st.floats(1e-6, 1e6))
def test_seconds_keep_two_digits_or_more_in_their_unit(value: float) -> None:
    figure, unit = seconds(value).split()
    assert float(figure.replace(",", "")) * SIZES[unit] == pytest.approx(value, rel=0.006)
    assert unit == "s" or float(figure.replace(",", "")) < 1000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((None, "-"), (0.0, "0 s"), (0.0125, "12.5 ms"), (0.9999, "1.00 s"), (83.0, "83.0 s")),
        *((0.000012, "12.0 µs"), (1234.5, "1,234 s")),
    ],
)
def test_seconds_in_words(value: float | None, words: str) -> None:
    assert seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (0.0123, "0.012"),
        (1.005e-4, "0.0001"),
        (1.234, "1.23"),
        (99.96, "100"),
    ],
)
def test_numbers_in_words(value: float | None, words: str) -> None:
    assert number(value) == words


def test_a_table_too_wide_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(title="T", head=("", "one", "two", "three"), rows=(("a", "1", "2", "3"),))
    monkeypatch.setenv("COLUMNS", "80")
    assert plain(table).split("\n") == ["T", "     one  two  three", "  a    1    2      3"]
    monkeypatch.setenv("COLUMNS", "12")
    assert plain(table).split("\n") == ["T", "         a", "  one    1", "  two    2", "  three  3"]


@pytest.mark.parametrize("record", [simulated_run(), simulated_sweep()], ids=["run", "sweep"])
def test_without_a_terminal_figures_are_plain(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    print_record(record)
    text = out.getvalue()
    assert text.startswith("mtpbatch\n")
    assert "TTFT" in text
    assert "\x1b" not in text
    assert "None" not in text


def test_on_a_terminal_figures_are_drawn(tmp_path: Path) -> None:
    results.save(simulated_run(n=40), tmp_path)
    program = (
        "import sys; from pathlib import Path; "
        "from mtpbatch.loadtest import results; from mtpbatch.loadtest.report import tables; "
        "tables.print_record(results.load(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "result.json")]
    text = screen_of(command, os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"})
    assert "\x1b[1m" in text
    assert "End to end" in text


# ------------------------------------------------------------------------ on a command line


def command(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    bench_results.add_parsers(parser.add_subparsers(dest="bench_command"))
    bench_results.run(parser.parse_args([str(argument) for argument in arguments]))


def test_report_writes_beside_the_result_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, requests, page = results.save(simulated_run(n=40), tmp_path)
    written = page.read_bytes()
    requests.unlink()
    page.unlink()
    command("report", result)
    assert page.read_bytes() == written
    assert capsys.readouterr().out.splitlines()[-2:] == [str(requests), str(page)]
    command("report", result, "--out", tmp_path / "there")
    assert (tmp_path / "there" / "report.html").read_bytes() == written


def test_compare_prints_ratios_and_writes_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [results.save(simulated_run(n=n), tmp_path / str(n))[0] for n in (40, 60)]
    command("compare", *paths, "--out", tmp_path / "page.html")
    shown = capsys.readouterr()
    first, second = (f"mtpbatch ({path})" for path in paths)  # of the same name: told apart
    assert shown.out.splitlines()[0] == f"{first} · {second}"
    assert "requests: 40, 60" in shown.err
    assert second in (tmp_path / "page.html").read_text()


def test_compare_refuses_what_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InvalidParameterError, match=r"a\.json is no result"):
        command("compare", tmp_path / "a.json", tmp_path / "b.json")
