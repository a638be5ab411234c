"""Which plots a report shows: of one run, of several on top of each other, and of sweeps."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from mtpbatch.loadtest.records import RequestRecord, RunRecord, SweepRecord
from mtpbatch.loadtest.report.plots import N_SERIES, Axis, Numbers, Plot, round_step
from mtpbatch.loadtest.report.tables import Table, number, seconds
from mtpbatch.loadtest.summary import (
    LATENCIES,
    Counted,
    Distribution,
    Summary,
    Weighted,
    acceptance_length,
    summarize,
    summarize_sweep,
    tpot,
    ttft,
)

MOST_BARS = 600  # requests in a timeline: more could not be told apart
MOST_POINTS = 2000  # requests in a scatter plot
N_BINS = 40  # of a histogram
MOST_COLUMNS = 150  # of a plot over time
SHORTEST_COLUMN = 0.01  # seconds
N_PLACES = 200  # at which a distribution's curve is drawn


class Chart(Struct, frozen=True, kw_only=True):
    """A plot with what is written around it."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """Style and text."""
    note: str = ""
    wide: bool = False
    table: Table | None = None
    """The same as figures."""


class Shown(Struct, frozen=True):
    """A run, its label, and what was worked out of it."""

    label: str
    run: RunRecord
    counted: Counted
    summary: Summary

    @classmethod
    def of(cls, run: RunRecord, label: str | None = None) -> Shown:
        counted = Counted(run)
        return cls(label or run.name, run, counted, summarize(run, counted))


def series(place: int) -> str:
    """The style of the run at a place."""
    return f"s{place % N_SERIES}"


def run_charts(shown: Sequence[Shown]) -> list[Chart]:
    """All plots of a run; of several, those that can lie on top of each other."""
    charts = [_distribution(shown, name) for name in LATENCIES]
    charts.append(_output_over_time(shown))
    charts.append(_concurrency_over_time(shown))
    charts.append(_acceptance(shown))
    if len(shown) == 1:
        charts.append(_timeline(shown[0].run))
    return [chart for chart in charts if chart is not None]


# -------------------------------------------------------------------------- distributions

_PLACES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def _distribution(shown: Sequence[Shown], name: str) -> Chart | None:
    """How many took how long at most; of a single run also where its values lie."""
    found = []
    for place, each in enumerate(shown):
        samples = each.counted.latencies[name]
        weighted = Weighted.of(samples.values, samples.weights)
        if len(weighted.values):
            found.append((series(place), each, weighted))
    if not found:
        return None
    title = LATENCIES[name]
    x = Axis.spread(np.concatenate([w.values for _, _, w in found]), label=title)
    y = Axis(label="took at most", low=0.0, high=1.0, unit="percent")
    words = [
        f"{each.label}: median {seconds(w.quantile(0.5))}, p90 {seconds(w.quantile(0.9))}, "
        f"p99 {seconds(w.quantile(0.99))}"
        for _, each, w in found
    ]
    plot = Plot(x, y, alt=f"Distribution of {title}. {'; '.join(words)}.")
    if len(shown) == 1:
        ((_, _, only),) = found
        edges = x.edges(N_BINS)
        heights, _ = np.histogram(only.values.clip(x.low, x.high), edges, weights=only.weights)
        plot.columns(edges, 0.9 * heights / heights.max(), "s0")
    shares = np.linspace(0.0, 1.0, N_PLACES)
    for style, _, weighted in found:
        curve = np.array([weighted.quantile(share) for share in shares])
        plot.line(curve, shares, style)
    if len(shown) == 1:
        # Texts where the curve is not.
        for share, text, level in ((0.5, "median", 0), (0.9, "p90", 4), (0.99, "p99", 5)):
            plot.down(only.quantile(share), "guide", text, level=level)
    for limit in {each.run.slo[name] for each in shown if name in each.run.slo}:
        plot.down(limit, "limit", "SLO", level=7)
    rows = [
        (f"{100 * share:g} %", *(seconds(w.quantile(share)) for _, _, w in found))
        for share in _PLACES
    ]
    return Chart(
        title=title,
        svg=plot.svg(),
        legend=_legend(shown),
        note="Bars: where the values lie." if len(shown) == 1 else "",
        table=Table(
            title=f"{title}, at most",
            head=("of them", *(each.label for _, each, _ in found)),
            rows=tuple(rows),
        ),
    )


def _legend(shown: Sequence[Shown]) -> tuple[tuple[str, str], ...]:
    if len(shown) == 1:
        return ()
    return tuple((series(i), each.label) for i, each in enumerate(shown))


# ------------------------------------------------------------------------------ over time


def _bins(shown: Sequence[Shown]) -> Numbers:
    """Edges of equal pieces of time, of a round length, that hold all runs."""
    longest = max((max((r.ended for r in s.run.requests), default=0.0) for s in shown), default=0.0)
    size = round_step(max(longest / MOST_COLUMNS, SHORTEST_COLUMN))
    return size * np.arange(int(longest / size) + 2.0)


def _middles(edges: Numbers) -> Numbers:
    return (edges[:-1] + edges[1:]) / 2


def _time_axis(edges: Numbers) -> Axis:
    return Axis(label="seconds since the begin", low=0.0, high=float(edges[-1]))


def _shade(plot: Plot, shown: Sequence[Shown], edges: Numbers) -> str:
    """What lies outside the window, of a single run."""
    if len(shown) > 1:
        return ""
    begin, end = shown[0].run.window
    plot.shade(0.0, begin)
    plot.shade(end, float(edges[-1]))
    return " Grey: ramp-up and drain, which do not count."


def _output_over_time(shown: Sequence[Shown]) -> Chart:
    edges = _bins(shown)
    size = float(edges[1])
    rates = [
        np.histogram(s.counted.chunk_times, edges, weights=s.counted.chunk_tokens)[0] / size
        for s in shown
    ]
    y = Axis.around((float(r.max(initial=0)) for r in rates), label="tokens/s")
    words = [
        f"{s.label}: {number(s.summary.output_rate)} tokens per second in its window" for s in shown
    ]
    plot = Plot(_time_axis(edges), y, alt=f"Output tokens per second. {'; '.join(words)}.")
    note = _shade(plot, shown, edges)
    for i, (each, rate) in enumerate(zip(shown, rates, strict=True)):
        if len(shown) == 1:
            plot.area(_middles(edges), rate, series(i))
        plot.line(_middles(edges), rate, series(i))
        if len(shown) == 1 and each.summary.output_rate is not None:
            plot.across(each.summary.output_rate, "guide", "mean of the window")
    return Chart(
        title="Output tokens per second",
        svg=plot.svg(),
        legend=_legend(shown),
        note=f"Each point: {seconds(size)}.{note}",
        table=_over_time("tokens/s", shown, edges, rates),
    )


def _under_way(spans: Sequence[tuple[float, float]], edges: Numbers) -> Numbers:
    """How many spans cover each bin, on average over its length."""
    both = np.array(spans, dtype=np.float64).reshape(-1, 2)
    begins, lengths = both[:, 0], both[:, 1] - both[:, 0]
    passed = np.array([np.clip(edge - begins, 0.0, lengths).sum() for edge in edges])
    return np.diff(passed) / np.diff(edges)


def _first(request: RequestRecord) -> float:
    return request.chunks[0][0] if request.chunks else request.ended


def _concurrency_over_time(shown: Sequence[Shown]) -> Chart:
    edges = _bins(shown)
    levels = [_under_way([(r.sent, r.ended) for r in s.run.requests], edges) for s in shown]
    waits = [_under_way([(r.sent, _first(r)) for r in s.run.requests], edges) for s in shown]
    y = Axis.around((float(r.max(initial=0)) for r in levels), label="requests")
    words = [f"{s.label}: at most {s.summary.peak_concurrency} in its window" for s in shown]
    plot = Plot(_time_axis(edges), y, alt=f"Requests under way. {'; '.join(words)}.")
    note = _shade(plot, shown, edges)
    for i, (level, wait) in enumerate(zip(levels, waits, strict=True)):
        if len(shown) == 1:
            plot.area(_middles(edges), level, "s0")
            plot.area(_middles(edges), wait, "s1")
            plot.line(_middles(edges), wait, "s1")
        plot.line(_middles(edges), level, series(i))
    legend = _legend(shown)
    if len(shown) == 1:
        legend = (("s0", "under way"), ("s1", "of these, before their first chunk"))
    return Chart(
        title="Requests under way",
        svg=plot.svg(),
        legend=legend,
        note=f"Each point: the mean of {seconds(float(edges[1]))}.{note}",
        table=_over_time("under way", shown, edges, levels),
    )


def _over_time(
    unit: str, shown: Sequence[Shown], edges: Numbers, values: Sequence[Numbers]
) -> Table:
    head = ("from second", *(f"{each.label}, {unit}" for each in shown))
    rows = zip(edges[:-1].tolist(), *(v.tolist() for v in values), strict=True)
    return Table(
        title=unit,
        head=head,
        rows=tuple((f"{begin:g}", *map(number, figures)) for begin, *figures in rows),
    )


# ------------------------------------------------------------------------------- requests


def _acceptance(shown: Sequence[Shown]) -> Chart | None:
    """Each request by how many tokens a step gave it and how long a token took it."""
    found = []
    for place, each in enumerate(shown):
        both = [(acceptance_length(r), tpot(r)) for r in each.counted.ok]
        known = np.array([pair for pair in both if None not in pair], dtype=np.float64)
        if len(known):
            found.append((series(place), each, known[:: -(-len(known) // MOST_POINTS)]))
    if not found:
        return None
    together = np.concatenate([known for *_, known in found])
    high = float(together[:, 0].max())
    x = Axis(label="tokens per step", low=1.0, high=max(1.05 * high, 2.0))
    y = Axis.around(together[:, 1].tolist(), label="", unit="seconds")
    words = [
        f"{s.label}: {number(s.summary.acceptance_length)} tokens per step, median TPOT "
        f"{seconds(_part('tpot', 'median')(s.summary))}"
        for _, s, _ in found
    ]
    plot = Plot(x, y, alt=f"Acceptance against latency. {'; '.join(words)}.")
    for style, _, known in found:
        plot.points(known[:, 0], known[:, 1], style)
    for limit in {s.run.slo["tpot"] for s in shown if "tpot" in s.run.slo}:
        plot.across(limit, "limit", "SLO")
    n = sum(len(known) for *_, known in found)
    n_all = sum(len(s.counted.ok) for _, s, _ in found)
    return Chart(
        title="TPOT by tokens per step",
        svg=plot.svg(),
        legend=_legend(shown),
        note=f"Each point is a request; {n} of {n_all} are shown.",
    )


def _timeline(run: RunRecord) -> Chart | None:
    """Each request a bar, in the uppermost row that is free."""
    requests, words = _slice(run)
    if not requests:
        return None
    rows = _rows(requests)
    begin = min(min(r.scheduled, r.sent) for r in requests)
    end = max(r.ended for r in requests)
    n_rows = max(rows) + 1
    plot = Plot(
        Axis(label="seconds since the begin", low=begin, high=max(end, begin + 1e-6)),
        Axis(label="requests under way", low=0.0, high=float(n_rows), bare=True),
        alt=f"Timeline of {len(requests)} requests, at most {n_rows} at once.",
        wide=True,
        height=min(max(9.0 * n_rows, 120.0), 900.0),
    )
    plot.shade(begin, run.window[0])
    plot.shade(run.window[1], end)
    for request, row in zip(requests, rows, strict=True):
        times = (min(request.scheduled, request.sent), request.sent, _first(request), request.ended)
        last = request.outcome if request.outcome != "ok" else "decode"
        names = ("queued", "prefill", last)
        if request.outcome == "error" and not request.chunks:
            names = ("queued", "error", "error")
        plot.bars(row, times, names, _bar_title(request))
    return Chart(
        title="Timeline",
        svg=plot.svg(),
        legend=(
            ("queued", "due, not sent yet"),
            ("prefill", "sent, until the first chunk"),
            ("decode", "until the end"),
            ("cancelled", "cancelled"),
            ("error", "failed"),
        ),
        note=f"{words} Grey: ramp-up and drain.",
        wide=True,
    )


def _slice(run: RunRecord) -> tuple[list[RequestRecord], str]:
    """All requests; if they are too many, those around the middle of the window."""
    requests = sorted(run.requests, key=lambda r: r.sent)
    if len(requests) <= MOST_BARS:
        return requests, f"All {len(requests)} requests."
    middle = sum(run.window) / 2
    place = sum(r.sent < middle for r in requests)
    first = min(max(place - MOST_BARS // 2, 0), len(requests) - MOST_BARS)
    chosen = requests[first : first + MOST_BARS]
    words = (
        f"{MOST_BARS} of {len(requests)} requests, sent from second {chosen[0].sent:.1f} to "
        f"{chosen[-1].sent:.1f}; earlier ones that still ran are left out. "
        f"requests.csv has them all."
    )
    return chosen, words


def _rows(requests: Sequence[RequestRecord]) -> list[int]:
    """A row for each, so that bars in the same one do not overlap."""
    free: list[int] = []
    ends: list[tuple[float, int]] = []
    rows = []
    n_rows = 0
    for request in requests:
        begin = min(request.scheduled, request.sent)
        while ends and ends[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(ends)[1])
        if not free:
            heapq.heappush(free, n_rows)
            n_rows += 1
        rows.append(heapq.heappop(free))
        heapq.heappush(ends, (request.ended, rows[-1]))
    return rows


def _bar_title(request: RequestRecord) -> str:
    end = request.error or request.finish_reason or request.outcome
    return (
        f"request {request.index}, sent at {request.sent:.2f} s: first chunk after "
        f"{seconds(ttft(request))}, {request.output_tokens} tokens in "
        f"{seconds(request.ended - request.sent)}, {end}"
    )


# --------------------------------------------------------------------------------- sweeps


class Sweep(Struct, frozen=True):
    """A sweep, its label, and the figures of its runs, in ascending order of the parameter."""

    label: str
    record: SweepRecord
    values: tuple[float, ...]
    summaries: tuple[Summary, ...]

    @classmethod
    def of(cls, record: SweepRecord, label: str | None = None) -> Sweep:
        return cls(label or record.name, record, *summarize_sweep(record))


_Figure = Callable[[Summary], float | None]


def _part(name: str, part: str) -> _Figure:
    def figure(summary: Summary) -> float | None:
        found: Distribution | None = getattr(summary, name)
        return None if found is None else getattr(found, part)

    return figure


def sweep_charts(sweeps: Sequence[Sweep]) -> list[Chart]:
    """Throughput, latencies and acceptance by what was swept, with the SLO and the capacity."""
    slo = any(sweep.record.slo for sweep in sweeps)
    good: list[tuple[str, str, _Figure]] = [
        ("", "kept the SLO", lambda s: s.goodput_requests),
        ("dashed", "all", lambda s: s.request_rate),
    ]
    tokens: list[tuple[str, str, _Figure]] = [
        ("", "of requests that kept the SLO", lambda s: s.goodput_tokens),
        ("dashed", "all", lambda s: s.output_rate),
    ]
    charts = [
        _over_load(sweeps, "Requests per second", good if slo else [("", "", good[1][2])]),
        _over_load(sweeps, "Output tokens per second", tokens if slo else [("", "", tokens[1][2])]),
    ]
    for name, title in LATENCIES.items():
        lines = [("", "median", _part(name, "median")), ("dashed", "p99", _part(name, "p99"))]
        charts.append(_over_load(sweeps, title, lines, slo=name))
    charts.append(_over_load(sweeps, "Tokens per step", [("", "", lambda s: s.acceptance_length)]))
    return [chart for chart in charts if chart is not None]


def _over_load(
    sweeps: Sequence[Sweep],
    title: str,
    lines: Sequence[tuple[str, str, _Figure]],
    *,
    slo: str | None = None,
) -> Chart | None:
    found = [
        (i, sweep, style, words, [figure(summary) for summary in sweep.summaries])
        for i, sweep in enumerate(sweeps)
        for style, words, figure in lines
    ]
    known = [v for *_, values in found for v in values if v is not None]
    if not known:
        return None
    parameter = sweeps[0].record.parameter
    label = {"rate": "requests/s asked for", "concurrency": "requests at once"}[parameter]
    limits = {limit for sweep in sweeps for name, limit in sweep.record.slo.items() if name == slo}
    every = [value for sweep in sweeps for value in sweep.values]
    plot = Plot(
        Axis.around(every, label=label),
        _load_axis([*known, *limits], is_time=slo is not None),
        alt=f"{title} by {label}. The figures are in the table.",
    )
    for limit in limits:
        plot.across(limit, "limit", "SLO")
    for i, sweep in enumerate(sweeps):
        if sweep.record.capacity is not None:
            plot.down(sweep.record.capacity, f"{series(i)} fine")
    for i, sweep, style, _, values in found:
        pairs = [p for p in zip(sweep.values, values, strict=True) if p[1] is not None]
        both = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        plot.line(both[:, 0], both[:, 1], f"{series(i)} {style}")
        plot.points(both[:, 0], both[:, 1], f"{series(i)} large")
    legend = [(f"{series(i)} {style}", sweep, words) for i, sweep, style, words, _ in found]
    legend += [
        (f"{series(i)} fine", sweep, f"capacity {sweep.record.capacity:g}")
        for i, sweep in enumerate(sweeps)
        if sweep.record.capacity is not None
    ]
    named = tuple(
        (style, f"{sweep.label} {words}" if len(sweeps) > 1 else words)
        for style, sweep, words in legend
        if words or len(sweeps) > 1
    )
    return Chart(title=title, svg=plot.svg(), legend=named)


def _load_axis(values: list[float], *, is_time: bool) -> Axis:
    """Latencies explode beyond the capacity: then a logarithmic axis shows both sides of it."""
    if not is_time:
        return Axis.around(values, label="")
    some = [v for v in values if v > 0]
    if some and max(some) > 20 * min(some):
        low, high = min(some) / 1.3, max(some) * 1.3
        return Axis(label="", low=low, high=high, unit="seconds", log=True)
    return Axis.around(values, label="", unit="seconds")
