"""How a run stands is said while it runs."""

from __future__ import annotations

import os
import subprocess
import sys

from mtpbatch.loadtest import mock
from mtpbatch.loadtest.answer import Tally
from mtpbatch.loadtest.arrivals import ClosedLoop, Level
from mtpbatch.loadtest.driver import Load
from mtpbatch.loadtest.mock import Pace
from mtpbatch.loadtest.progress import Progress
from terminal import screen_of


def test_a_line_says_what_is_done_and_what_is_left() -> None:
    load = Load(arrivals=ClosedLoop(Level(4, 4)), n_requests=40, seconds=None, timeout=9)
    tally = Tally()
    tally.sent, tally.begun, tally.ended, tally.tokens = 14, 13, 10, 500
    tally.first_chunks.extend([0.020, 0.030, 0.090])
    tally.fail("http 500", "oh")
    progress = Progress(tally, load)
    assert progress.line(5.0).split("  ") == [
        *("5 s", "done 10/40", "running 3", "waiting 1", "errors 1", "100 tok/s"),
        *("TTFT p50/p99 30/90 ms", "ETA 15 s"),
    ]
    tally.tokens = 900
    assert "200 tok/s" in progress.line(7.0)  # since the last line


def test_before_anything_has_come_nothing_is_made_up() -> None:
    load = Load(arrivals=ClosedLoop(Level(4, 4)), n_requests=40, seconds=None, timeout=9)
    assert Progress(Tally(), load).line(0.0).endswith("0 tok/s  TTFT p50/p99 ?  ETA ?")


def bench(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mtpbatch", "bench", *arguments]


ENVIRONMENT = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}


def test_on_a_terminal_one_line_changes_and_is_gone_at_the_end() -> None:
    with mock.running(Pace(ttft=0.3)) as url:
        command = bench("--target", url, "--requests", "32", "--output-length", "2")
        screen = screen_of(command, ENVIRONMENT)
    assert screen.count("tok/s  TTFT p50/p99") >= 2
    assert "\x1b[2K" in screen  # lines are erased
    assert screen.rindex("End to end") > screen.rindex("ETA")


def test_elsewhere_nothing_but_plain_lines_goes_to_stderr() -> None:
    with mock.running(Pace()) as url:
        done = subprocess.run(
            bench("--target", url, "--requests", "4", "--output-length", "2"),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert "\x1b" not in done.stdout + done.stderr
