"""When a native part is taken for stuck or started again, on time handed in."""

from __future__ import annotations

import pytest

from mtpbatch.restarts import FIRST, LONGEST_LOOK, MOST, WELL, Restarts, Watchdog


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


def test_silence_is_added_up_until_it_is_too_long() -> None:
    watchdog = Watchdog(3.0)
    looks = [watchdog.look(10.0 + n, silent=True) for n in range(6)]
    assert looks == [False, False, False, False, True, True]


def test_a_result_ends_the_silence_and_so_does_having_nothing_to_do() -> None:
    watchdog = Watchdog(3.0)
    for now in range(4):
        assert not watchdog.look(float(now), silent=True)
    assert not watchdog.look(4.0, silent=False)
    for now in range(5, 8):
        assert not watchdog.look(float(now), silent=True)
    assert watchdog.look(8.0, silent=True)


def test_a_program_that_stood_still_itself_has_not_been_waiting() -> None:
    watchdog = Watchdog(3.0)
    watchdog.look(0.0, silent=True)
    assert not watchdog.look(3600.0, silent=True)
    assert not watchdog.look(3600.0 + 3.0 - LONGEST_LOOK, silent=True)
    assert watchdog.look(3600.0 + 3.0 - LONGEST_LOOK + 0.1, silent=True)
