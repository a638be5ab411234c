"""Plots: where things lie, and what axes say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpbatch.loadtest.report.plots import Axis, Plot

highs = st.floats(1e-6, 1e7)


@given(high=highs, unit=st.sampled_from(["seconds", "number"]))
def test_a_linear_axis_has_a_few_round_ticks_that_differ(high: float, unit: str) -> None:
    axis = Axis(label="", low=0.0, high=high, unit="seconds" if unit == "seconds" else "number")
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 8
    values = [value for value, _ in ticks]
    assert values[0] == 0
    assert values[-1] <= high < values[-1] + 1.01 * (values[1] - values[0])
    assert f"{values[1]:.0e}"[0] in "125"
    assert len({text for _, text in ticks}) == len(ticks)


@given(low=st.floats(1e-6, 10), decades=st.floats(0.6, 6))
def test_a_logarithmic_axis_has_ticks_within_that_say_their_value(
    low: float, decades: float
) -> None:
    axis = Axis(label="", low=low, high=low * 10**decades, unit="seconds", log=True)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 10
    sizes = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    for value, text in ticks:
        assert low <= value <= axis.high
        figure, unit = text.split()
        assert float(figure) * sizes[unit] == pytest.approx(value)


@given(st.lists(st.floats(1e-4, 1e3), min_size=1), st.booleans())
def test_an_axis_of_a_distribution_holds_its_values_in_their_order(
    values: list[float], tail: bool
) -> None:
    several = np.sort(np.array(values + ([20 * max(values)] * tail)))
    axis = Axis.spread(several, label="")
    places = axis.place(several)
    assert ((places >= 0) & (places <= 1)).all()
    assert (np.diff(places) >= 0).all()
    assert np.histogram(several.clip(axis.low, axis.high), axis.edges(40))[0].sum() == len(several)


def test_marks_lie_where_their_values_are() -> None:
    """A line through the corners of the axes goes from corner to corner of the plot."""
    plot = Plot(Axis(label="x", low=2.0, high=4.0), Axis(label="y", low=0.0, high=10.0), alt="a")
    plot.line(np.array([2.0, 3.0, 4.0]), np.array([0.0, 5.0, 10.0]), "s0")
    (shape,) = re.findall(r'd="(M[^"]+)" class="line s0"', plot.svg())
    (left, low), (middle, half), (right, high) = (
        map(float, point.split()) for point in shape[1:].split("L")
    )
    assert (left, high) == (0.0, 0.0)
    assert (middle, half) == (right / 2, low / 2)


def test_texts_are_escaped_and_the_plot_says_what_it_shows() -> None:
    plot = Plot(
        Axis.around([1.0], label="<b>"), Axis.around([1.0], label="&"), alt='"a" < <script>'
    )
    plot.bars(0, (0.0, 0.5), ("decode",), "<script>")
    root = ElementTree.fromstring(plot.svg())
    assert root.get("aria-label") == '"a" < <script>'
    assert root.get("role") == "img"
    texts = {element.text for element in root.iter()}
    assert {"<b>", "&", "<script>"} <= texts
    assert "<script>" not in plot.svg()


def test_a_distribution_without_values_or_spread_can_be_drawn() -> None:
    for values in (np.array([]), np.array([0.0, 0.0]), np.array([0.5])):
        axis = Axis.spread(values, label="x")
        assert axis.low < axis.high
        assert axis.ticks()
