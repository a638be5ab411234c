"""What metrics cost per step.

    python -m benchmarks.metrics_overhead [GGUF] [--sequences 64]

First no model runs: the executor of ``mtpbatch.testing`` plays the steps, in about each of which a
request ends and another takes its place. Two schedulers have the same requests, but one of them is
watched by ``mtpbatch.metrics``. They take turns step by step, so that the machine is the same for
both. Measured is the processor time of what Python does between two steps.

Then the model runs as many sequences, with metrics and nobody who scrapes, for how long a step
takes; and a scrape is measured by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial

import anyio
from prometheus_client import CollectorRegistry, generate_latest

import mtpbatch
from benchmarks import command_line
from benchmarks.python_per_step import measure
from benchmarks.report import spread, table
from benchmarks.scheduler_cost import Subject
from mtpbatch.metrics import EngineMetrics
from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.types import ModelFacts, Plan, SamplingParams, SequenceStep, StepResult
from mtpbatch.watching import RequestEnded, Watchers

_PARAMS = SamplingParams()


class _WatchedScheduler(Scheduler):
    """A scheduler, and all that an engine does beside it for who watches."""

    def __init__(self, watchers: Watchers, facts: ModelFacts) -> None:
        super().__init__(facts)
        self._watchers = watchers
        self._context = copy_context()

    def schedule(self, now: float) -> Plan | None:
        plan = super().schedule(now)
        if plan is not None:
            self._watchers.see(self.running)
        return plan

    def update(
        self, result: StepResult, now: float, parts: list[SequenceStep] | None = None
    ) -> list[Event]:
        parts = []
        events = super().update(result, now, parts)
        self._watchers.stepped(result, parts, now)
        for event in events:
            if event.last:
                ended = RequestEnded(event.request_id, _PARAMS, event.completion, event.error)
                self._watchers.ended(ended, self._context)
        return events


async def between_steps(
    n_sequences: int, n_steps: int, rounds: int, *, followed: bool
) -> Sequence[tuple[float, float]]:
    """Microseconds between two steps, without and with metrics: the means of each round."""
    watchers = Watchers()
    async with open_scripted_engine(ScriptedBackend(n_ctx=4096)) as engine:
        with EngineMetrics(engine, CollectorRegistry()) as metrics:
            watchers.add(metrics, [])
            plain = Subject(n_sequences, 0, followed=followed)
            watched = Subject(
                n_sequences, 0, followed=followed, scheduler=partial(_WatchedScheduler, watchers)
            )
            means = []
            for _ in range(rounds):
                steps = [(plain.step(), watched.step()) for _ in range(n_steps)]
                without, with_metrics = (1e6 * statistics.mean(t) for t in zip(*steps, strict=True))
                means.append((without, with_metrics))
            if not watchers:
                raise RuntimeError("the metrics have failed")
            return means


async def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "model", nargs="?", type=command_line.existing_file, help="the demo model if left out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500, help="played in a round")
    parser.add_argument("--tokens", type=int, default=64, help="of the model, per sequence")
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    model_steps = []
    async with mtpbatch.Engine.open(options.model, n_seq=options.sequences, n_ctx=512) as engine:
        with EngineMetrics(engine, registry := CollectorRegistry()):
            for _ in range(options.rounds):
                figures = await measure(engine, options.sequences, 0, options.tokens, False)
                model_steps.append(figures[4])
            begin = time.thread_time()
            generate_latest(registry)
            scrape = time.thread_time() - begin
    step = statistics.median(model_steps)
    rows = []
    for followed in (False, True):
        means = await between_steps(
            options.sequences, options.steps, options.rounds, followed=followed
        )
        without, with_metrics = zip(*means, strict=True)
        added = [b - a for a, b in means]
        shares = [100 * us / step for us in added]
        cells = [spread(without), spread(with_metrics), spread(added), spread(shares, 2)]
        rows.append(["stream" if followed else "generate", *cells])
    print(table(["requests", "without, µs", "with, µs", "added, µs", "of a step, %"], rows))
    print(f"\nA step of the model without drafts takes {spread(model_steps)} µs.")
    print(f"A scrape takes {1e3 * scrape:.1f} ms.")


if __name__ == "__main__":
    anyio.run(main)
