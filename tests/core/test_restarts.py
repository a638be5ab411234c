"""When a native part is taken for stuck or started again, on time handed in."""

from __future__ import annotations

import pytest

from mtpbatch.restarts import FIRST, LONGEST_GAP, MOST, WELL, Restarts, Watchdog


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


def test_who_was_stuck_after_a_minute_has_not_recovered() -> None:
    restarts = Restarts()
    now, pauses = 0.0, []
    while (pause := restarts.died(now, silence=2 * WELL)) is not None:
        pauses.append(pause)
        restarts.up(now + pause)
        now += pause + 2 * WELL + 1.0
    assert len(pauses) == MOST


def test_who_was_stuck_after_a_minute_of_work_has_recovered() -> None:
    restarts = Restarts()
    restarts.died(0.0)
    restarts.up(1.0)
    assert restarts.died(1.0 + WELL + 30.0, silence=30.0) == FIRST


def test_silence_is_added_up() -> None:
    watchdog = Watchdog()
    silences = []
    for now in range(10, 14):
        watchdog.look(float(now), silent=True)
        silences.append(watchdog.silence)
    assert silences == [0.0, 1.0, 2.0, 3.0]


def test_a_result_ends_the_silence_and_so_does_having_nothing_to_do() -> None:
    watchdog = Watchdog()
    for now in range(4):
        watchdog.look(float(now), silent=True)
    watchdog.look(4.0, silent=False)
    assert watchdog.silence == 0.0
    watchdog.look(5.0, silent=True)
    assert watchdog.silence == 1.0


def test_a_program_that_stood_still_itself_has_not_been_waiting() -> None:
    watchdog = Watchdog()
    watchdog.look(0.0, silent=True)
    watchdog.look(3600.0, silent=True)
    assert watchdog.silence == LONGEST_GAP
