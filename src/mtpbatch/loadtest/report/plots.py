"""Plots as SVG, for pages that bring the style: light, dark and on paper alike.

Marks and texts carry class names and no colours: ``s0`` to ``s5`` are series, ``soft`` is filled
lightly, ``dashed`` and ``fine`` are lines of a series, ``guide`` is a line that helps to read,
``limit`` an SLO, ``quiet`` what does not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Numbers: TypeAlias = npt.NDArray[np.float64]
Unit: TypeAlias = Literal["seconds", "number", "percent"]

N_SERIES = 6  # colours; more runs than that share them
N_TICKS = 6  # about
_MARGIN = {"left": 68, "right": 16, "top": 14, "bottom": 44}
_HEIGHT = 250
_CHARACTER = 8.2  # px, at most


class Axis(Struct, frozen=True, kw_only=True):
    """What one direction of a plot means."""

    label: str
    low: float
    high: float
    unit: Unit = "number"
    log: bool = False
    bare: bool = False
    """Without ticks: places on it mean nothing."""

    @classmethod
    def around(cls, values: Iterable[float], *, label: str, unit: Unit = "number") -> Axis:
        """From 0 to a little beyond the greatest."""
        high = max(values, default=0.0)
        return cls(label=label, low=0.0, high=1.06 * high if high > 0 else 1.0, unit=unit)

    @classmethod
    def spread(cls, values: Numbers, *, label: str, unit: Unit = "seconds") -> Axis:
        """Of a distribution: logarithmic if it has a long tail."""
        some = values[values > 0]
        if len(some) and some.max() > 8 * np.median(some):
            low, high = float(np.quantile(some, 0.001)), float(some.max())
            return cls(label=label, low=low / 1.1, high=high * 1.1, unit=unit, log=True)
        return cls.around(values.tolist(), label=label, unit=unit)

    def place(self, values: Numbers) -> Numbers:
        """Where values lie, 0 to 1; what is outside lies on the edge."""
        values = values.clip(self.low, self.high)
        if self.log:
            place: Numbers = np.log(values / self.low) / math.log(self.high / self.low)
            return place
        return (values - self.low) / (self.high - self.low)

    def edges(self, n: int) -> Numbers:
        """Of ``n`` bins that are equally wide on it."""
        if self.log:
            return np.geomspace(self.low, self.high, n + 1)
        return np.linspace(self.low, self.high, n + 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values, with their texts."""
        if self.bare:
            return []
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = math.log10(self.high / self.low) < 3
            values = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
        else:
            step = round_step((self.high - self.low) / N_TICKS)
            first = math.ceil(self.low / step)
            values = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(v, self._text(v)) for v in values if self.low <= v <= self.high]

    def _text(self, value: float) -> str:
        if self.unit == "percent":
            return f"{value:.0%}"
        if self.unit == "number" or value == 0:
            return f"{value:,.10g}"
        # One unit for an axis reads best, unless it spans decades.
        scale = value if self.log else self.high
        unit, size = next(
            ((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if scale >= s), ("µs", 1e-6)
        )
        return f"{value / size:.6g} {unit}"


def round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    size = 10.0 ** math.floor(math.log10(least))
    return next(m * size for m in (1, 2, 5, 10) if m * size >= least * (1 - 1e-9))


class Plot:
    """One coordinate system. ``alt`` says in words what is seen.

    Marks are drawn in the order of the calls, later ones on top.
    """

    def __init__(
        self, x: Axis, y: Axis, *, alt: str, wide: bool = False, height: float = _HEIGHT
    ) -> None:
        self.x, self.y = x, y
        self._width = (1120 if wide else 540) - _MARGIN["left"] - _MARGIN["right"]
        self._height = height
        box = f"0 0 {1120 if wide else 540} {height + _MARGIN['top'] + _MARGIN['bottom']:g}"
        self._root = ElementTree.Element(
            "svg", {"viewBox": box, "role": "img", "aria-label": alt, "class": "plot"}
        )
        shift = f"translate({_MARGIN['left']} {_MARGIN['top']})"
        inner = ElementTree.SubElement(self._root, "g", {"transform": shift})
        self._grid = ElementTree.SubElement(inner, "g")
        self._marks = ElementTree.SubElement(inner, "g")
        self._draw_axes()

    def svg(self) -> str:
        """The element, to be put into a page."""
        return ElementTree.tostring(self._root, encoding="unicode")

    # ------------------------------------------------------------------------- marks

    def line(self, xs: Numbers, ys: Numbers, style: str) -> None:
        self._path(self._through(xs, ys), f"line {style}")

    def area(self, xs: Numbers, ys: Numbers, style: str) -> None:
        """Down to the lower edge."""
        if len(xs):
            left, right = (f"{p:.1f}" for p in self._right(xs[[0, -1]]))
            low = f"{self._height:g}"
            self._path(f"M{left} {low}L{self._through(xs, ys)[1:]}L{right} {low}Z", f"soft {style}")

    def columns(self, edges: Numbers, shares: Numbers, style: str) -> None:
        """Bars side by side, each so much of the plot's height."""
        rights = self._right(edges)
        low = f"{self._height:g}"
        parts = [
            f"M{left + 0.5:.1f} {low}V{self._height * (1 - share):.1f}H{right - 0.5:.1f}V{low}Z"
            for (left, right), share in zip(itertools.pairwise(rights), shares, strict=True)
            if share > 0
        ]
        self._path("".join(parts), f"soft {style}")

    def points(self, xs: Numbers, ys: Numbers, style: str) -> None:
        downs = self._down(ys)
        parts = [f"M{x:.1f} {y:.1f}h0" for x, y in zip(self._right(xs), downs, strict=True)]
        self._path("".join(parts), f"points {style}")

    def bars(self, row: int, edges: Sequence[float], styles: Sequence[str], title: str) -> None:
        """One thing with a title in a row of y: bars from edge to edge."""
        thing = ElementTree.SubElement(self._marks, "g")
        ElementTree.SubElement(thing, "title").text = title
        height = self._height / (self.y.high - self.y.low)
        top = row * height
        for (left, right), style in zip(
            itertools.pairwise(self._right(np.array(edges))), styles, strict=True
        ):
            if right > left:
                across = f"h{max(right - left, 0.6):.1f}v{0.8 * height:.1f}H{left:.1f}Z"
                shape = f"M{left:.1f} {top:.1f}{across}"
                ElementTree.SubElement(thing, "path", {"d": shape, "class": f"bar {style}"})

    def across(self, y: float, style: str, text: str = "") -> None:
        """A line at a y, with a text at its right end."""
        if self.y.low <= y <= self.y.high:
            down = self._down(np.array([y]))[0]
            self._path(f"M0 {down:.1f}H{self._width:g}", f"line {style}")
            self._text(text, self._width - 4, down - 5, f"mark {style}", "end")

    def down(self, x: float, style: str, text: str = "", *, level: int = 0) -> None:
        """A line at an x, with a text beside its upper end, so many lines further down."""
        if self.x.low <= x <= self.x.high:
            right = self._right(np.array([x]))[0]
            self._path(f"M{right:.1f} 0V{self._height:g}", f"line {style}")
            after = right + _CHARACTER * len(text) + 8 < self._width
            place, anchor = (right + 4, "start") if after else (right - 4, "end")
            self._text(text, place, 10 + 14 * level, f"mark {style}", anchor)

    def shade(self, begin: float, end: float) -> None:
        """What does not count."""
        left, right = self._right(np.array([begin, end]))
        if right > left:
            self._path(f"M{left:.1f} 0H{right:.1f}V{self._height:g}H{left:.1f}Z", "quiet")

    # ------------------------------------------------------------------------- places

    def _right(self, xs: Numbers) -> Numbers:
        return self.x.place(xs) * self._width

    def _down(self, ys: Numbers) -> Numbers:
        return (1 - self.y.place(ys)) * self._height

    def _through(self, xs: Numbers, ys: Numbers) -> str:
        places = zip(self._right(xs), self._down(ys), strict=True)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if len(xs) else ""

    def _path(self, shape: str, style: str) -> None:
        if shape:
            ElementTree.SubElement(self._marks, "path", {"d": shape, "class": style})

    def _text(
        self, text: str, x: float, y: float, style: str, anchor: str, turn: str | None = None
    ) -> None:
        if text:
            place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": style, "text-anchor": anchor}
            if turn:
                place["transform"] = turn
            ElementTree.SubElement(self._marks, "text", place).text = text

    def _draw_axes(self) -> None:
        free = -math.inf
        for value, text in self.x.ticks():
            right = self._right(np.array([value]))[0]
            self._rule(f"M{right:.1f} 0V{self._height:g}")
            if right - _CHARACTER * len(text) / 2 > free:
                self._text(text, right, self._height + 17, "tick", "middle")
                free = right + _CHARACTER * len(text) / 2 + 4
        for value, text in self.y.ticks():
            down = self._down(np.array([value]))[0]
            self._rule(f"M0 {down:.1f}H{self._width:g}")
            self._text(text, -7, down + 4, "tick", "end")
        self._text(self.x.label, self._width / 2, self._height + 37, "label", "middle")
        middle = self._height / 2
        place = -_MARGIN["left"] + 13
        self._text(
            self.y.label, place, middle, "label", "middle", f"rotate(-90 {place} {middle:g})"
        )

    def _rule(self, shape: str) -> None:
        ElementTree.SubElement(self._grid, "path", {"d": shape, "class": "grid"})
