"""The parts of ``tools/soak.py``, each for some seconds; the tool itself goes on for an hour.

What requests leave in memory shows after thousands of them, and what slow readers do to others'
latency on a quiet machine: not here.
"""

from __future__ import annotations

import random
from pathlib import Path

import anyio
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import soak


def clock() -> soak.Clock:
    """One that begins now, however long the tests before took."""
    return soak.Clock(minutes=5)


def test_rules_of_all_state_machines_are_counted_and_none_is_violated() -> None:
    part = soak.machines(600, seed=3, clock=clock())
    assert part.passed, part
    assert sum(v for v in part.figures.values() if isinstance(v, int)) == part.done >= 400
    assert part.figures.keys() == {"SchedulerMachine", "EngineMachine", "ServerMachine"}


def test_a_machine_that_breaks_a_promise_is_reported_with_its_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(RuleBasedStateMachine):
        @rule(n=st.integers(0, 9))
        def lose(self, n: int) -> None:
            assert n < 9, "a request is lost"

    monkeypatch.setattr(soak, "MACHINES", (Broken,))
    part = soak.machines(1000, seed=3, clock=clock())
    assert not part.passed
    assert part.violations[0].startswith("Broken, seed 3: AssertionError('a request is lost")
    assert "lose(n=9)" in part.violations[0]


async def load(model: Path, n: int) -> soak.Part:
    return await soak.load(model, n, seed=3, clock=clock())


def test_nothing_is_lost_under_load(demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few requests do not fill what they may, and say nothing about memory.
    monkeypatch.setattr(soak, "GROWTH_BY_REQUESTS", 1 << 30)
    part = anyio.run(load, demo_f32_path, 60)
    assert part.passed, part
    assert part.done == 60
    assert part.figures["ended by abort"]


def test_a_wrong_answer_under_load_is_reported(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = soak.questions

    async def other(model: Path, n: int, chance: random.Random) -> list[soak.Question]:
        asked = await questions(model, n, chance)
        return [soak.Question(q.prompt, (*q.answer[:-1], -1)) for q in asked]

    monkeypatch.setattr(soak, "questions", other)
    monkeypatch.setattr(soak, "MOST_TOKENS", 2)
    part = anyio.run(load, demo_f32_path, 20)
    assert not part.passed
    assert "instead of" in part.violations[0]


def test_engines_that_come_and_go_leave_nothing_behind(demo_path: Path) -> None:
    async def openings() -> soak.Part:
        return await soak.openings(demo_path, 10, seed=3, clock=clock())

    part = anyio.run(openings)
    assert part.passed, part


def test_the_report_says_what_was_left_undone() -> None:
    parts = [
        soak.Part("load", 9, 10, 1.0, {"preemptions": 3}),
        soak.Part("openings", 5, 5, 1.0, {}, ("it grew",)),
        soak.Part("slow readers", 5, 5, 1.0, {"ratio": 1.0}),
    ]
    report = soak.markdown(parts, seed=3, share=0.5)
    assert "## load: FAILED\n\n9 of 10 in 1 s, 0 violations" in report
    assert "| preemptions | 3 |" in report
    assert "## openings: FAILED" in report
    assert "    it grew" in report
    assert "## slow readers: passed" in report
