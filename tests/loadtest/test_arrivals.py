"""When requests come: by the distributions they are named after, and the same for the same seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from mtpbatch import InvalidParameterError
from mtpbatch.loadtest.arrivals import ClosedLoop, Level, OpenLoop, Replay

N = 4000


def gaps(arrivals: OpenLoop, seed: int = 1) -> list[float]:
    times = itertools.islice(arrivals.times(random.Random(seed)), N + 1)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def kolmogorov(values: list[float], cdf: Callable[[float], float]) -> float:
    """The greatest distance of the values' distribution from ``cdf``, times sqrt(n)."""
    expected = np.array([cdf(value) for value in sorted(values)])
    steps = np.arange(len(values) + 1) / len(values)
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    return float(distance * math.sqrt(len(values)))


# Distribution functions of gamma distributed gaps with mean 1, where they are elementary.
GAMMA: dict[float, Callable[[float], float]] = {
    0.5: lambda x: math.erf(math.sqrt(x / 2)),
    1.0: lambda x: 1 - math.exp(-x),
    2.0: lambda x: 1 - (1 + 2 * x) * math.exp(-2 * x),
}


@pytest.mark.parametrize("burstiness", GAMMA)
def test_gaps_are_gamma_distributed_with_the_burstiness_as_their_shape(burstiness: float) -> None:
    drawn = gaps(OpenLoop(Level(20, 20), burstiness))
    unit = [20 * gap for gap in drawn]
    assert kolmogorov(unit, GAMMA[burstiness]) < 1.63  # the 99 % quantile
    for other in GAMMA.keys() - {burstiness}:
        assert kolmogorov(unit, GAMMA[other]) > 3  # it would notice


def test_a_constant_rate_is_even() -> None:
    assert gaps(OpenLoop(Level(4, 4), math.inf)) == pytest.approx([0.25] * N)


def test_bursts_come_at_one_moment_and_keep_the_rate() -> None:
    times = OpenLoop(Level(10, 10), math.inf, together=5).times(random.Random())
    first = list(itertools.islice(times, 15))
    assert first == pytest.approx([0.0] * 5 + [0.5] * 5 + [1.0] * 5)


def test_an_infinite_rate_is_all_at_once() -> None:
    times = OpenLoop(Level(math.inf, math.inf)).times(random.Random())
    assert list(itertools.islice(times, 100)) == [0.0] * 100


@pytest.mark.parametrize(("begin", "end"), [(0, 40), (5, 50), (60, 10), (30, 0)])
def test_a_ramp_has_at_each_time_as_many_as_its_rate_says(begin: float, end: float) -> None:
    seconds = 100.0
    times = np.array(
        list(
            itertools.takewhile(
                lambda time: time < seconds,
                OpenLoop(Level(begin, end, seconds)).times(random.Random(3)),
            )
        )
    )
    edges = np.linspace(0, seconds, 21)
    counts, _ = np.histogram(times, edges)
    # The rate is linear: its mean over an interval is that of the middle.
    expected = (begin + (end - begin) * (edges[:-1] + edges[1:]) / 2 / seconds) * seconds / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 37.6  # the 99 % quantile of 20 degrees of freedom


def test_a_rate_that_falls_to_nothing_ends() -> None:
    times = list(OpenLoop(Level(10, 0, 8), math.inf).times(random.Random()))
    assert len(times) == pytest.approx(10 / 2 * 8, abs=1)
    assert times[-1] <= 8


def test_a_rate_goes_on_as_the_ramp_ends() -> None:
    times = OpenLoop(Level(0, 10, 2), math.inf).times(random.Random())
    later = [time for time in itertools.islice(times, 60) if time > 2]
    assert np.diff(later) == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_times_and_another_seed_others() -> None:
    arrivals = OpenLoop(Level(3, 9, 5), 0.7)
    assert gaps(arrivals, 1) == gaps(arrivals, 1)
    assert gaps(arrivals, 1) != gaps(arrivals, 2)


def test_a_trace_is_replayed_as_it_was() -> None:
    assert list(Replay((0.0, 0.5, 0.5, 7.0)).times(random.Random())) == [0.0, 0.5, 0.5, 7.0]


@pytest.mark.parametrize(("begin", "end"), [(8, 8), (2, 8), (8, 2), (0, 5), (1, 64)])
def test_there_are_as_many_clients_as_the_level_says(begin: float, end: float) -> None:
    loop = ClosedLoop(Level(begin, end, 10))
    for time in (0.0, 2.6, 5.1, 9.9, 30.0):
        level = begin + (end - begin) * min(time / 10, 1)
        there = [
            client
            for client in range(loop.most)
            if loop.joins(client) <= time and not loop.leaves(client, time)
        ]
        assert there == list(range(math.floor(level + 1e-6)))


def test_who_joins_does_not_leave_at_that_moment() -> None:
    loop = ClosedLoop(Level(1, 97, 7.3))
    for client in range(loop.most):
        assert not loop.leaves(client, loop.joins(client))


@pytest.mark.parametrize("values", [(-1, 5, 1), (0, 0, 1), (1, 1, -1), (math.nan, 1, 1)])
def test_a_level_that_is_none_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(InvalidParameterError, match="level"):
        Level(*values)


def test_burstiness_and_burst_size_are_checked() -> None:
    with pytest.raises(InvalidParameterError, match="burstiness"):
        OpenLoop(Level(1, 1), 0.0)
    with pytest.raises(InvalidParameterError, match="burst_size"):
        OpenLoop(Level(1, 1), 1.0, 0)
