"""When a native part that died is started again, on time handed in."""

from __future__ import annotations

import pytest

from mtpbatch.restarts import FIRST, MOST, WELL, Restarts


def test_each_pause_is_twice_the_one_before_until_it_is_given_up() -> None:
    restarts = Restarts()
    now, pauses = 100.0, []
    while (pause := restarts.died(now)) is not None:
        pauses.append(pause)
        now += pause
        restarts.up(now)
        now += WELL / 2  # it runs, but not for long
    assert pauses == [FIRST * 2**n for n in range(MOST)] == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_start_that_fails_counts_as_a_death() -> None:
    restarts = Restarts()
    assert [restarts.died(float(n)) for n in range(MOST + 1)] == [1.0, 2.0, 4.0, 8.0, 16.0, None]


@pytest.mark.parametrize(("lived", "pause"), [(WELL, FIRST), (WELL - 0.5, 4 * FIRST)])
def test_who_has_run_long_enough_has_recovered(lived: float, pause: float) -> None:
    restarts = Restarts()
    restarts.died(0.0)
    restarts.died(1.0)
    restarts.up(3.0)
    assert restarts.died(3.0 + lived) == pause


def test_time_without_a_native_part_is_no_time_in_which_it_ran() -> None:
    restarts = Restarts()
    restarts.up(0.0)
    restarts.died(WELL)
    assert restarts.died(3 * WELL) == 2 * FIRST
