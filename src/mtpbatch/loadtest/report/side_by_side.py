"""Results beside each other: tables with ratios, plots on top of each other, and what differs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.loadtest.records import Record, RunRecord, SweepRecord, runs_of
from mtpbatch.loadtest.report.charts import Chart, Shown, Sweep, run_charts, sweep_charts
from mtpbatch.loadtest.report.comparison import (
    Figure,
    Ratio,
    differences,
    figures,
    ratio,
    surroundings,
)
from mtpbatch.loadtest.report.html import Page, Section, render, settings_tables
from mtpbatch.loadtest.report.tables import UNKNOWN, Table, number, percent, seconds, sweep_table

_SHOWN = {"seconds": seconds, "number": number, "percent": percent}
_OF_SWEEPS = ("Output tokens/s", "Goodput, requests/s", "TTFT, median", "TPOT, median")
"""The figures by which sweeps are compared at each value of what was swept."""
_INTERVALS = (
    "Ratios are to the first, with where they may lie (95 %) by how the runs themselves went up "
    "and down. Better and worse stand where that leaves no doubt; a p99 needs 1,000 requests for "
    "it. What differs from one run to the next is not in it: measure twice, and compare a run "
    "with its like."
)


class Comparison(Struct, frozen=True, kw_only=True):
    """What a terminal and a page show."""

    title: str
    warnings: list[str]
    tables: list[Table]
    charts: list[Chart]
    settings: list[tuple[str, list[Table]]]
    """How each was measured."""

    def page(self) -> str:
        """As HTML."""
        return render(
            Page(
                title=self.title,
                subtitle="Load tests beside each other",
                warnings=self.warnings,
                sections=(
                    Section(title="Figures", tables=self.tables),
                    Section(title="Plots", charts=self.charts),
                    *(
                        Section(title=f"Settings of {label}", tables=tables, folded=True)
                        for label, tables in self.settings
                    ),
                ),
            )
        )


def labels(records: Sequence[Record], paths: Sequence[Path]) -> list[str]:
    """Their names; with the file where several have the same."""
    times = Counter(record.name for record in records)
    return [
        record.name if times[record.name] == 1 else f"{record.name} ({path})"
        for record, path in zip(records, paths, strict=True)
    ]


def compare(records: Sequence[Record], labels: Sequence[str]) -> Comparison:
    """Compare two or more runs, or sweeps, with the first of them.

    Raises :class:`~mtpbatch.InvalidParameterError` if there are both, or sweeps over different
    things.
    """
    runs = [record for record in records if isinstance(record, RunRecord)]
    sweeps = [record for record in records if isinstance(record, SweepRecord)]
    if runs and sweeps:
        raise InvalidParameterError(
            "file", "runs and sweeps cannot be compared: give results of one kind"
        )
    if len({sweep.parameter for sweep in sweeps}) > 1:
        raise InvalidParameterError(
            "file",
            "sweeps over rate and over concurrency cannot be compared: give those of one kind",
        )
    of_each = [runs_of(record) for record in records]
    first = [each[0] for each in of_each if each]
    return Comparison(
        title=" · ".join(labels),
        warnings=_warnings(first, sweeps),
        tables=_run_tables(runs, labels) if runs else _sweep_tables(sweeps, labels),
        charts=(
            run_charts([Shown.of(run, label) for run, label in zip(runs, labels, strict=True)])
            if runs
            else sweep_charts([Sweep.of(s, label) for s, label in zip(sweeps, labels, strict=True)])
        ),
        settings=[
            (label, settings_tables(each[0]))
            for label, each in zip(labels, of_each, strict=True)
            if each
        ],
    )


def _warnings(runs: Sequence[RunRecord], sweeps: Sequence[SweepRecord]) -> list[str]:
    loads = differences(runs, {sweep.parameter for sweep in sweeps})
    found = [f"Not the same load, so that ratios may mean nothing: {each}." for each in loads]
    return found + [f"Not the same surroundings: {each}." for each in surroundings(runs)]


# ----------------------------------------------------------------------------------- runs


def _run_tables(runs: Sequence[RunRecord], labels: Sequence[str]) -> list[Table]:
    of_each = [figures(run) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(of_each))
    rows = [(name, *_cells([each.get(name) for each in of_each])) for name in names]
    head = ["", labels[0]]
    for label in labels[1:]:
        head += [label, f"/ {labels[0]}", ""]
    return [
        Table(title="Comparison", wide=True, head=tuple(head), rows=tuple(rows), note=_INTERVALS)
    ]


def _cells(of_each: Sequence[Figure | None]) -> list[str]:
    base, *others = of_each
    cells = [_shown(base)]
    for other in others:
        found = ratio(other, base) if other is not None and base is not None else None
        cells += [_shown(other), *_words(found)]
    return cells


def _shown(figure: Figure | None) -> str:
    return UNKNOWN if figure is None else _SHOWN[figure.unit](figure.value)


def _words(found: Ratio | None) -> tuple[str, str]:
    """A ratio, and what to think of it."""
    if found is None:
        return UNKNOWN, ""
    words = number(found.value)
    if found.interval is not None:
        low, high = map(number, found.interval)
        words += f" ({low} to {high})"
    return words, {None: "", True: "better", False: "worse"}[found.better]


# --------------------------------------------------------------------------------- sweeps


def _sweep_tables(sweeps: Sequence[SweepRecord], labels: Sequence[str]) -> list[Table]:
    tables = [_capacities(sweeps, labels)] if any(sweep.slo for sweep in sweeps) else []
    base, *others = ({value: figures(run) for value, run in sweep.runs} for sweep in sweeps)
    for label, other in zip(labels[1:], others, strict=True):
        common = sorted(base.keys() & other.keys())
        rows = [
            (f"{value:g}", *itertools.chain.from_iterable(_ratios(base[value], other[value])))
            for value in common
        ]
        if rows:
            tables.append(
                Table(
                    wide=True,
                    title=f"{label} / {labels[0]}, at each {sweeps[0].parameter} that both have",
                    head=("", *itertools.chain.from_iterable((name, "") for name in _OF_SWEEPS)),
                    rows=tuple(rows),
                    note=_INTERVALS,
                )
            )
    for sweep in map(Sweep.of, sweeps, labels):
        tables.append(sweep_table(sweep.record, sweep.label, sweep.values, sweep.summaries))
    return tables


def _ratios(base: dict[str, Figure], other: dict[str, Figure]) -> list[tuple[str, str]]:
    return [
        _words(ratio(other[name], base[name]) if name in base and name in other else None)
        for name in _OF_SWEEPS
    ]


def _capacities(sweeps: Sequence[SweepRecord], labels: Sequence[str]) -> Table:
    first = sweeps[0].capacity
    rows = []
    for sweep, label in zip(sweeps, labels, strict=True):
        if sweep.capacity is None:
            rows.append((label, UNKNOWN, UNKNOWN))
        else:
            times = number(sweep.capacity / first) if first else UNKNOWN
            rows.append((label, f"{sweep.capacity:g}", times))
    return Table(
        title=f"Capacity: the greatest {sweeps[0].parameter} that keeps the SLO",
        head=("", sweeps[0].parameter, f"/ {labels[0]}"),
        rows=tuple(rows),
    )
