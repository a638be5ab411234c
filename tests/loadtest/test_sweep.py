"""A sweep finds the capacity that there is, and does not try more than it must."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpbatch.loadtest.sweep import capacity, next_value


def swept(
    limit: float, low: float, high: float, precision: float, *, whole: bool
) -> dict[float, bool]:
    """All loads tried on a target that can take as much as ``limit``."""
    tried: dict[float, bool] = {}
    while (load := next_value(tried, low, high, precision=precision, whole=whole)) is not None:
        assert load not in tried
        tried[load] = load <= limit
        assert len(tried) < 100
    return tried


def test_loads_double_and_then_close_in() -> None:
    assert list(swept(21, 1, 64, 0.1, whole=True)) == [1, 2, 4, 8, 16, 32, 24, 20, 22]
    assert list(swept(3.3, 0.5, 8, 0.1, whole=False)) == [0.5, 1, 2, 4, 3, 3.5, 3.25]


def test_a_target_that_can_take_everything_is_not_asked_for_more() -> None:
    assert list(swept(math.inf, 1, 48, 0.1, whole=True)) == [1, 2, 4, 8, 16, 32, 48]


def test_a_target_that_cannot_take_the_least_has_no_capacity() -> None:
    tried = swept(0, 1, 64, 0.1, whole=True)
    assert list(tried) == [1]
    assert capacity(tried) is None


@given(
    limit=st.floats(0.5, 1000),
    low=st.floats(0.1, 10),
    more=st.floats(1, 100),
    precision=st.floats(0.01, 0.5),
)
def test_the_capacity_is_found_within_the_precision(
    limit: float, low: float, more: float, precision: float
) -> None:
    high = low * more
    found = capacity(swept(limit, low, high, precision, whole=False))
    if limit < low:
        assert found is None
    else:
        assert found is not None
        assert found <= limit
        assert found == high or limit <= found * (1 + precision) * (1 + 1e-9)


@given(limit=st.integers(1, 300), high=st.integers(1, 256))
def test_whole_loads_are_found_exactly(limit: int, high: int) -> None:
    tried = swept(limit, 1, high, 0.0, whole=True)
    assert capacity(tried) == min(limit, high)
    assert all(load == int(load) for load in tried)


def test_the_capacity_ends_where_the_first_load_was_too_much() -> None:
    assert capacity({1: True, 2: True, 4: False, 8: True}) == 2
    assert capacity({}) is None


@pytest.mark.parametrize("load", [2, 3])
def test_a_load_that_was_too_much_by_chance_does_not_confuse_the_search(load: float) -> None:
    tried = {1: True, 2: True, 4: False, 3: True}
    assert next_value(tried | {load: True}, 1, 64, precision=0.1, whole=True) is None
