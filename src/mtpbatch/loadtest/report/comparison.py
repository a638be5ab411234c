"""Runs beside each other: what differs in how they were made, and ratios with their noise. Pure.

A ratio's interval is by a jackknife over time. A run's window is cut into a few equal parts, and
each figure is worked out again without each of them: how much it moves tells how far the run could
have come out otherwise. Requests of one moment share a queue and a batch, so that they are no
independent observations; long parts nearly are. It tells of the noise within runs. What differs
from one run to the next, such as a warm cache or another tenant, it cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Final, Literal, TypeAlias

import numpy as np
from msgspec import Struct

from mtpbatch.loadtest.records import RunRecord
from mtpbatch.loadtest.summary import LATENCIES, Counted, Floats, Ints, Weighted, meets, steps

N_PARTS: Final = 5  # of a window: more would be shorter than what makes requests alike
STUDENT: Final = 2.776  # of N_PARTS - 1 degrees of freedom: intervals hold 95 %
FEW: Final = 1000  # requests, of which a p99 has ten beyond it: with fewer it is no evidence
NOT_SETTINGS: Final = {"slo", "load_average"}
"""What is compared by its limits and not by its text, and what is never the same."""

Unit: TypeAlias = Literal["seconds", "number", "percent"]
Better: TypeAlias = Literal["more", "less"]


# --------------------------------------------------------------------------- differences


def differences(runs: Sequence[RunRecord], swept: Set[str] = frozenset()) -> list[str]:
    """Settings of the load that are not the same in all runs, but for what was swept.

    Each with its values.
    """
    found = _differences([run.load for run in runs], NOT_SETTINGS | swept)
    return found + _differences([{"slo": dict(run.slo)} for run in runs], frozenset())


def surroundings(runs: Sequence[RunRecord]) -> list[str]:
    """The same of the environment."""
    return _differences([run.environment for run in runs], NOT_SETTINGS)


def _differences(settings: Sequence[Mapping[str, object]], ignored: Set[str]) -> list[str]:
    names = dict.fromkeys(name for each in settings for name in each if name not in ignored)
    found = []
    for name in names:
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            found.append(f"{name}: {', '.join(map(str, values))}")
    return found


# -------------------------------------------------------------------------------- figures


class Figure(Struct, frozen=True, kw_only=True):
    """A figure of one run."""

    name: str
    unit: Unit
    better: Better
    value: float
    without: Floats
    """The same without each part of the run."""
    firm: bool = True
    """Whether there is enough of the run to settle anything by it."""

    @property
    def variance(self) -> float | None:
        """Of its logarithm. None: cannot be told."""
        if not (np.isfinite(self.without).all() and (self.without > 0).all()):
            return None
        return float(np.log(self.without).var() * (N_PARTS - 1))


class Ratio(Struct, frozen=True, kw_only=True):
    """One run's figure / another's."""

    value: float
    interval: tuple[float, float] | None
    """Where it may lie. None: cannot be told."""
    better: bool | None
    """None: it may be noise."""


def ratio(other: Figure, base: Figure) -> Ratio | None:
    """None where nothing can be divided."""
    if base.value <= 0 or other.value <= 0:
        return None
    value = other.value / base.value
    above, below = other.variance, base.variance
    if above is None or below is None:
        return Ratio(value=value, interval=None, better=None)
    reach = math.exp(STUDENT * math.sqrt(above + below))
    low, high = value / reach, value * reach
    better = None
    if other.firm and base.firm and not low <= 1 <= high:
        better = (value > 1) == (other.better == "more")
    return Ratio(value=value, interval=(low, high), better=better)


_STATISTICS: dict[str, Callable[[Weighted], float]] = {
    "mean": Weighted.mean,
    "median": lambda weighted: weighted.quantile(0.5),
    "p99": lambda weighted: weighted.quantile(0.99),
}


def figures(run: RunRecord) -> dict[str, Figure]:
    """The figures of a run by which it is compared; what it does not tell is left out."""
    counted = Counted(run)
    return _Figures(run, counted).all() if counted.seconds > 0 else {}


class _Figures:
    """Each figure several times: by how much each part of the window counts."""

    def __init__(self, run: RunRecord, counted: Counted) -> None:
        self._run, self._counted = run, counted
        whole = np.ones((1, N_PARTS))
        without = 1 - np.eye(N_PARTS)
        self._weights: Floats = np.concatenate([whole, without])
        self._figures: dict[str, Figure] = {}

    def all(self) -> dict[str, Figure]:
        self._rates()
        for name, words in LATENCIES.items():
            self._latency(name, words)
        self._shares()
        return self._figures

    def _parts(self, times: Floats) -> Ints:
        """In which part of the window each moment lies."""
        places = (times - self._counted.begin) / self._counted.seconds * N_PARTS
        parts: Ints = np.clip(places.astype(np.int64), 0, N_PARTS - 1)
        return parts

    def _sums(self, times: Floats, amounts: Floats) -> Floats:
        """Of what happened in the window, by each weighting."""
        inside = self._counted.events(times)
        parts = np.bincount(self._parts(times[inside]), amounts[inside], minlength=N_PARTS)
        sums: Floats = self._weights @ parts
        return sums

    def _add(
        self, name: str, values: Floats, unit: Unit, better: Better, *, firm: bool = True
    ) -> None:
        self._figures[name] = Figure(
            name=name,
            unit=unit,
            better=better,
            value=float(values[0]),
            without=values[1:],
            firm=firm,
        )

    def _rates(self) -> None:
        run, counted = self._run, self._counted
        ends = np.array([r.ended for r in run.requests], dtype=np.float64)
        ok = np.array([r.outcome == "ok" for r in run.requests], dtype=np.float64)
        good = np.array([meets(r, run.slo) for r in run.requests], dtype=np.float64)
        times, tokens = counted.chunk_times, counted.chunk_tokens
        rates = [("Requests/s", ends, ok), ("Output tokens/s", times, tokens)]
        if run.slo:
            rates += [
                ("Goodput, requests/s", ends, good),
                ("Goodput, output tokens/s", times, tokens * good[counted.owners]),
            ]
        seconds = counted.seconds * self._weights.mean(axis=1)
        for name, at, amounts in rates:
            self._add(name, self._sums(at, amounts) / seconds, "number", "more")

    def _latency(self, name: str, words: str) -> None:
        samples = self._counted.latencies[name]
        if not len(samples.values):
            return
        order = np.argsort(samples.values, kind="stable")
        values, parts = samples.values[order], self._parts(samples.at[order])
        each = np.ones(len(values)) if samples.weights is None else samples.weights[order]
        weighted = [Weighted(values, np.cumsum(each * weights[parts])) for weights in self._weights]
        for statistic, of in _STATISTICS.items():
            found = np.array([of(w) if w.upto[-1] > 0 else np.nan for w in weighted])
            firm = statistic != "p99" or len(self._counted.ok) >= FEW
            self._add(f"{words}, {statistic}", found, "seconds", "less", firm=firm)

    def _shares(self) -> None:
        sent = self._counted.sent
        if self._run.slo:
            judged = [r for r in sent if r.outcome != "cancelled"]
            good = [float(meets(r, self._run.slo)) for r in judged]
            self._share(
                "Kept the SLO", [r.sent for r in judged], good, [1.0] * len(good), "percent"
            )
        known = [(r, n) for r in self._counted.ok if (n := steps(r)) is not None]
        self._share(
            "Tokens per step",
            [r.sent for r, _ in known],
            [float(r.output_tokens) for r, _ in known],
            [float(n) for _, n in known],
            "number",
        )

    def _share(
        self,
        name: str,
        times: Sequence[float],
        above: Sequence[float],
        below: Sequence[float],
        unit: Unit,
    ) -> None:
        if not sum(below):
            return
        at = np.array(times)
        sums = self._sums(at, np.array(below))
        shares = np.divide(
            self._sums(at, np.array(above)), sums, out=np.full(len(sums), np.nan), where=sums > 0
        )
        self._add(name, shares, unit, "more")
