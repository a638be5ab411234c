"""The engine keeps its promises in any order of what may happen to it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from engine_machine import EngineMachine


def test_any_order_of_requests_loops_and_faults_keeps_every_promise() -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            derandomize=True,  # tools/soak.py draws anew
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
