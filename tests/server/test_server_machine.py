"""The server keeps its promises in any order of what may happen to it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from engine_machine import shorter_prompts_matter
from server_machine import ServerMachine


def test_any_order_of_clients_and_faults_keeps_every_promise() -> None:
    with shorter_prompts_matter():
        run_state_machine_as_test(
            ServerMachine,
            settings=settings(
                max_examples=40,
                derandomize=True,  # tools/soak.py draws others
                stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
            ),
        )
