"""What metrics cost per step.

    python -m benchmarks.metrics_overhead [GGUF] [--sequences 64]

The same load with and without ``mtpbatch.metrics``, one after the other, so that the machine is
the same for both: the processor time of the engine's thread per step, what of that metrics add, and
their share of a step. Nobody scrapes meanwhile; what that takes is measured by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence

import anyio
from prometheus_client import CollectorRegistry, generate_latest

import mtpbatch
from benchmarks import command_line
from benchmarks.python_per_step import measure
from benchmarks.report import spread, table
from mtpbatch.metrics import EngineMetrics


async def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "model", nargs="?", type=command_line.existing_file, help="the demo model if left out"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="per sequence")
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    figures: dict[tuple[int, bool], list[Sequence[float]]] = {}
    async with mtpbatch.Engine.open(options.model, n_seq=options.sequences, n_ctx=512) as engine:
        registry = CollectorRegistry()
        cases = list(itertools.product((0, engine.config.n_draft_max), (False, True)))
        for turn, (depth, streaming) in itertools.product(range(options.rounds), cases):
            per_step: dict[bool, Sequence[float]] = {}
            for with_metrics in (False, True) if turn % 2 else (True, False):
                watching = EngineMetrics(engine, registry) if with_metrics else None
                with watching or contextlib.nullcontext():
                    per_step[with_metrics] = await measure(
                        engine, options.sequences, depth, options.tokens, streaming
                    )
            (_, without, *_, step), (_, engine_cpu, *_) = per_step[False], per_step[True]
            added = engine_cpu - without
            figures.setdefault((depth, streaming), []).append(
                [without, engine_cpu, added, step, 100 * added / step]
            )
        with EngineMetrics(engine, registry):
            begin = time.thread_time()
            generate_latest(registry)
            scrape = time.thread_time() - begin
    rows = [
        [str(depth), "stream" if streaming else "generate", *map(_spread, zip(*runs, strict=True))]
        for (depth, streaming), runs in figures.items()
    ]
    header = ["depth", "requests", "without µs", "with µs", "added µs", "step µs", "added, %"]
    print(table(header, rows))
    print(f"\nA scrape takes {1e3 * scrape:.1f} ms.")


def _spread(values: Sequence[float]) -> str:
    return spread(values) if max(map(abs, values)) > 10 else spread(values, 2)


if __name__ == "__main__":
    anyio.run(main)
