"""Reports as one HTML page each, which needs nothing else: no network, no script."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe
from msgspec import Struct

from mtpbatch.loadtest.overhead import doubts
from mtpbatch.loadtest.records import Record, RunRecord, SweepRecord
from mtpbatch.loadtest.report.charts import Chart, Shown, Sweep, run_charts, sweep_charts
from mtpbatch.loadtest.report.tables import (
    Table,
    number,
    percent,
    run_tables,
    seconds,
    slo_words,
    sweep_table,
)
from mtpbatch.loadtest.summary import LATENCIES, Summary

UNREACHED = "none"
FEW = 100
"""Requests that say little of a p99."""


class Section(Struct, frozen=True, kw_only=True):
    """A part of a page."""

    title: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    folded: bool = False
    """Whether it is to be opened first."""


class Page(Struct, frozen=True, kw_only=True):
    """What the template shows."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]] = ()
    """The figures that matter most: name, figure, what else is to be said."""
    warnings: Sequence[str] = ()
    sections: Sequence[Section]


def report(record: Record) -> str:
    """The page of a run or of a sweep."""
    return render(_run(record) if isinstance(record, RunRecord) else _sweep(record))


def render(page: Page) -> str:
    """The page as text."""
    return _template().render(page=page)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mtpbatch.loadtest.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = markupsafe.Markup  # ours, escaped by ElementTree
    return environment.get_template("report.html")


def _run(run: RunRecord) -> Page:
    shown = Shown.of(run)
    return Page(
        title=run.name,
        subtitle=f"Load test of {run.started_at}, steady for {seconds(shown.summary.seconds)}",
        tiles=_tiles(run, shown.summary),
        warnings=warnings(run, shown.summary),
        sections=(
            Section(title="Figures", tables=run_tables(run, shown.summary)),
            Section(title="Plots", charts=run_charts([shown])),
            Section(title="Settings", tables=settings_tables(run)),
        ),
    )


def _sweep(sweep: SweepRecord) -> Page:
    shown = Sweep.of(sweep)
    table = sweep_table(sweep, shown.label, shown.values, shown.summaries)
    runs = sorted(sweep.runs, key=lambda each: each[0])
    words = "no SLO was given"
    if sweep.slo:
        words = f"SLO: {slo_words(sweep.slo)}"
    capacity = UNREACHED if sweep.capacity is None else f"{sweep.capacity:g}"
    unit = {"rate": "requests/s", "concurrency": "requests at once"}[sweep.parameter]
    return Page(
        title=sweep.name,
        subtitle=f"Sweep over {sweep.parameter}, {len(runs)} runs, {words}",
        tiles=[(f"Capacity, {unit}", capacity, words)] if sweep.slo else (),
        warnings=sweep_warnings(shown),
        sections=(
            Section(title="Figures", tables=[table]),
            Section(title="Plots", charts=sweep_charts([shown])),
            *(
                Section(
                    title=f"At {value:g}",
                    tables=[*run_tables(run, summary), *settings_tables(run)],
                    folded=True,
                )
                for (value, run), summary in zip(runs, shown.summaries, strict=True)
            ),
        ),
    )


def _tiles(run: RunRecord, summary: Summary) -> list[tuple[str, str, str]]:
    """The few figures that somebody in a hurry reads."""
    tiles = [
        (
            "Output tokens/s",
            number(summary.output_rate),
            f"{number(summary.request_rate)} requests/s",
        )
    ]
    for name in ("ttft", "tpot", "e2e"):
        each = getattr(summary, name)
        if each is not None:
            title = f"{LATENCIES[name]}, median"
            tiles.append((title, seconds(each.median), f"p99 {seconds(each.p99)}"))
    if run.slo:
        goodput = f"goodput {number(summary.goodput_requests)} requests/s"
        tiles.append(("Kept the SLO", percent(summary.slo_share), goodput))
    if summary.acceptance_length is not None:
        rate = summary.acceptance_rate
        words = f"{percent(rate)} of drafts accepted" if rate is not None else ""
        tiles.append(("Tokens per step", number(summary.acceptance_length), words))
    return tiles


def warnings(run: RunRecord, summary: Summary) -> list[str]:
    """What a reader should know before the figures."""
    found = []
    if run.load.get("interrupted"):
        found.append("The run was interrupted: these are the figures of what there was by then.")
    if summary.seconds <= 0 or not summary.ok:
        found.append("No request was sent in the steady state and ended well: measure for longer.")
    elif summary.ok < FEW:
        found.append(
            f"Only {summary.ok} requests count: a p99 of these is little more than the slowest one."
        )
    if summary.failed:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in summary.errors.items())
        found.append(
            f"{summary.failed} of {summary.sent} requests failed: {kinds}. Latencies are those of "
            f"the others."
        )
    if run.overhead is not None:
        found += [f"The client may be the bottleneck: {doubt}." for doubt in doubts(run.overhead)]
    return found


def sweep_warnings(sweep: Sweep) -> list[str]:
    """The same of a sweep."""
    found = []
    pairs = list(zip(sweep.values, sweep.summaries, strict=True))
    few = [f"{value:g}" for value, summary in pairs if summary.ok < FEW]
    if few:
        found.append(
            f"Fewer than {FEW} requests count at {', '.join(few)}: p99 is uncertain there."
        )
    failed = [f"{summary.failed} at {value:g}" for value, summary in pairs if summary.failed]
    if failed:
        found.append(f"Requests failed: {', '.join(failed)}. Latencies are those of the others.")
    late = [
        f"{value:g}"
        for value, summary in pairs
        if summary.overhead is not None and doubts(summary.overhead)
    ]
    if late:
        found.append(f"The client may be the bottleneck at {', '.join(late)}; see its figures.")
    return found


def settings_tables(run: RunRecord) -> list[Table]:
    """How it was measured."""
    parts: tuple[tuple[str, Mapping[str, object]], ...] = (
        ("Target", run.target),
        ("Load", run.load),
        ("Environment", run.environment),
    )
    return [
        Table(
            title=title,
            head=("", ""),
            rows=tuple((name, "none" if v is None else str(v)) for name, v in values.items()),
        )
        for title, values in parts
        if values
    ]
