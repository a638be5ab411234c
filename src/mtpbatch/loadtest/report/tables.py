"""Figures as tables: the same on a terminal and in a report."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from mtpbatch.loadtest.records import Record, RunRecord, Slo, SweepRecord
from mtpbatch.loadtest.summary import LATENCIES, Distribution, Summary, summarize, summarize_sweep

if TYPE_CHECKING:
    from rich.console import Console

UNKNOWN = "-"


class Table(Struct, frozen=True, kw_only=True):
    """Cells as text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    wide: bool = False
    """Whether it wants a page's whole width."""


# ------------------------------------------------------------------------------- figures


def seconds(value: float | None) -> str:
    """Three digits, in the unit that suits."""
    if value is None:
        return UNKNOWN
    if not value:
        return "0 s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= 0.9995 * size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-6)} µs"


def number(value: float | None) -> str:
    """Three digits, small ones two; whole numbers from a hundred on."""
    if value is None:
        return UNKNOWN
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.0995 or not value else f"{value:.2g}"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def slo_words(slo: Slo) -> str:
    """ "TTFT ≤ 500 ms, TPOT ≤ 50 ms"."""
    return ", ".join(f"{LATENCIES[name]} ≤ {seconds(limit)}" for name, limit in slo.items())


# --------------------------------------------------------------------------------- a run


def run_tables(run: RunRecord, summary: Summary) -> list[Table]:
    """All figures of a run."""
    tables = [_latency(summary), _throughput(run, summary), _requests(summary)]
    if summary.acceptance_length is not None:
        tables.append(_acceptance(summary))
    if run.overhead is not None:
        tables.append(_client(summary))
    return tables


def _latency(summary: Summary) -> Table:
    def cells(each: Distribution | None) -> tuple[str, ...]:
        if each is None:
            return (UNKNOWN,) * 7
        figures = (each.mean, each.median, each.p90, each.p99)
        return tuple(map(seconds, (*figures, each.std, each.minimum, each.maximum)))

    return Table(
        title="Latency",
        wide=True,
        head=("", "mean", "median", "p90", "p99", "std", "min", "max"),
        rows=tuple((words, *cells(getattr(summary, name))) for name, words in LATENCIES.items()),
    )


def _throughput(run: RunRecord, summary: Summary) -> Table:
    rows = [
        ("requests/s", number(summary.request_rate)),
        ("output tokens/s", number(summary.output_rate)),
        ("input tokens/s", number(summary.input_rate)),
    ]
    if run.slo:
        rows += [
            ("goodput, requests/s", number(summary.goodput_requests)),
            ("goodput, output tokens/s", number(summary.goodput_tokens)),
            ("requests that kept the SLO", percent(summary.slo_share)),
        ]
    rows += [
        ("concurrency, mean", number(summary.mean_concurrency)),
        ("concurrency, peak", f"{summary.peak_concurrency}"),
    ]
    note = f"SLO: {slo_words(run.slo)}" if run.slo else ""
    return Table(title="Throughput", head=("", "steady state"), rows=tuple(rows), note=note)


def _requests(summary: Summary) -> Table:
    rows = [
        ("sent in the window", f"{summary.sent} of {summary.requests}"),
        ("ended well", f"{summary.ok}"),
        ("cancelled", f"{summary.cancelled}"),
        ("failed", f"{summary.failed}"),
        *((f"  {kind}", f"{n}") for kind, n in summary.errors.items()),
        *((f"finish reason {reason}", f"{n}") for reason, n in summary.finish_reasons.items()),
    ]
    for name, lengths in (("prompt", summary.prompt_tokens), ("output", summary.output_tokens)):
        if lengths is not None:
            words = f"{number(lengths.mean)} ({lengths.minimum:.0f} to {lengths.maximum:.0f})"
            rows.append((f"{name} tokens, mean", words))
    if summary.cached_share is not None:
        rows.append(("prompt tokens from the cache", percent(summary.cached_share)))
    return Table(title="Requests", head=("", "steady state"), rows=tuple(rows))


def _median(found: Distribution | None) -> str:
    return seconds(found.median if found else None)


def _acceptance(summary: Summary) -> Table:
    every = (
        f"{number(summary.acceptance_length)} (all)",
        f"{summary.ok}",
        _median(summary.tpot),
        _median(summary.icl),
        _median(summary.e2e),
    )
    groups = (
        (
            f"{group.least:.2f} to {group.most:.2f}",
            f"{group.n}",
            seconds(group.tpot),
            seconds(group.icl),
            seconds(group.e2e),
        )
        for group in (summary.by_acceptance if len(summary.by_acceptance) > 1 else ())
    )
    note = "Latencies are medians."
    if summary.acceptance_rate is not None:
        note = f"{percent(summary.acceptance_rate)} of the drafted tokens were accepted. {note}"
    return Table(
        title="Acceptance beside latency",
        head=("tokens per step", "requests", "TPOT", "ICL", "end to end"),
        rows=(every, *groups),
        note=note,
    )


def _client(summary: Summary) -> Table:
    client = summary.overhead
    assert client is not None
    return Table(
        title="The client itself",
        head=("", "whole run"),
        rows=(
            ("CPU time", f"{percent(client.cpu_seconds / max(client.wall_seconds, 1e-9))} of one"),
            ("event loop late, median", seconds(client.loop_lag_p50)),
            ("event loop late, p99", seconds(client.loop_lag_p99)),
            ("requests sent late, p99", seconds(client.send_late_p99)),
        ),
    )


# ------------------------------------------------------------------------------- a sweep


def sweep_table(
    sweep: SweepRecord, label: str, values: Sequence[float], summaries: Sequence[Summary]
) -> Table:
    """A row for each value of the parameter."""

    def cells(summary: Summary) -> tuple[str, ...]:
        def of(name: str, part: str) -> str:
            found = getattr(summary, name)
            return seconds(found and getattr(found, part))

        return (
            number(summary.request_rate),
            number(summary.output_rate),
            number(summary.goodput_requests),
            percent(summary.slo_share),
            *(of(name, part) for name in ("ttft", "tpot", "e2e") for part in ("median", "p99")),
            number(summary.acceptance_length),
            f"{summary.failed}",
        )

    unit = {"rate": "requests/s asked", "concurrency": "at once"}[sweep.parameter]
    rows = [
        (f"{value:g}", *cells(summary)) for value, summary in zip(values, summaries, strict=True)
    ]
    capacity = "nowhere" if sweep.capacity is None else f"up to {sweep.capacity:g}"
    return Table(
        title=f"{label}: sweep over {sweep.parameter}",
        wide=True,
        head=(
            *(unit, "requests/s", "tokens/s", "goodput, requests/s", "SLO kept"),
            *("TTFT", "TTFT p99", "TPOT", "TPOT p99", "end to end", "end to end p99"),
            *("tokens per step", "failed"),
        ),
        rows=tuple(rows),
        note=f"SLO ({slo_words(sweep.slo)}) kept: {capacity}." if sweep.slo else "",
    )


# -------------------------------------------------------------------------- on a terminal


def print_record(record: Record) -> None:
    """Write a run's or a sweep's figures to stdout."""
    if isinstance(record, RunRecord):
        tables = run_tables(record, summarize(record))
    else:
        values, summaries = summarize_sweep(record)
        tables = [sweep_table(record, record.name, values, summaries)]
    print_tables(record.name, tables)


def print_tables(title: str, tables: Iterable[Table]) -> None:
    """With rich on a terminal that has it, plain otherwise."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            _print_rich(Console(), title, tables)
            return
    print(title)
    for table in tables:
        print(f"\n{plain(table)}")


def _print_rich(console: Console, title: str, tables: Iterable[Table]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    console.rule(f"[bold]{escape(title)}[/]", align="left")
    for table in tables:
        shown = RichTable(
            title=f"[bold]{escape(table.title)}[/]",
            caption=escape(table.note) or None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, name in enumerate(table.head):
            shown.add_column(escape(name), justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)


def plain(table: Table) -> str:
    """Columns of text; one too wide for the terminal is turned, a column for each row."""
    head, rows = table.head, list(table.rows)
    width = shutil.get_terminal_size().columns
    if _width(head, rows) > width and len(rows) < len(head):
        head, *rows = zip(head, *rows, strict=True)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    note = textwrap.wrap(table.note, width)
    return "\n".join([table.title, *(f"  {line}" for line in lines), *note])


def _width(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> int:
    return sum(2 + max(map(len, column)) for column in zip(head, *rows, strict=True))
