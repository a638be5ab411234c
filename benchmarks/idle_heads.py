"""What MTP heads cost while nobody drafts.

    python -m benchmarks.idle_heads src/mtpbatch/models/demo.gguf wide.gguf

Two engines on the same model take turns, one opened without heads (n_draft_max=0) and one with
them, in which no request drafts (speculation=0). Closed loop; a round's ratios are those of its two
runs: of tokens per second, and of the time that llama.cpp takes to decode. On models with recurrent
layers the second keeps states to take drafts back to, for which llama.cpp builds a larger graph
whether anybody drafts or not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import anyio

import mtpbatch
from benchmarks import command_line
from benchmarks.engine_process import generate_with, spent
from benchmarks.report import spread, table
from benchmarks.workload import N_CTX, Load, closed_loop


async def loads(model: Path, n_draft_max: int, options: argparse.Namespace) -> dict[int, Load]:
    """What clients got, by their number."""
    async with mtpbatch.Engine.open(
        model,
        n_seq=max(options.concurrency),
        n_ctx=N_CTX,
        n_draft_max=n_draft_max,
        n_threads=options.threads,
    ) as engine:
        generate = generate_with(engine, 0)
        await closed_loop(generate, max(options.concurrency), 8)

        def parts() -> dict[str, float]:
            return spent(engine.stats())

        return {
            clients: await closed_loop(generate, clients, options.tokens, parts)
            for clients in options.concurrency
        }


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    command_line.add_work(parser, rounds=9, concurrency=[1, 4, 16])
    command_line.add_threads(parser)
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}; threads: {options.threads}\n")
    rows = []
    for model in options.models:
        without: list[dict[int, Load]] = []
        idle: list[dict[int, Load]] = []
        for turn in range(options.rounds):
            print(f"{model.name}, round {turn + 1} of {options.rounds}", file=sys.stderr)
            runs = [(0, without), (3, idle)]
            for n_draft_max, of_depth in runs if turn % 2 == 0 else reversed(runs):
                of_depth.append(anyio.run(loads, model, n_draft_max, options))
        for clients in options.concurrency:
            pairs = [(a[clients], b[clients]) for a, b in zip(without, idle, strict=True)]
            rows.append(
                [
                    *(model.name, str(clients)),
                    *(spread([load.speed for load in side]) for side in zip(*pairs, strict=True)),
                    spread([b.speed / a.speed for a, b in pairs], 3),
                    spread([b.parts["target"] / a.parts["target"] for a, b in pairs], 3),
                ]
            )
    head = ["model", "at once", "without heads, tokens/s", "idle heads", "ratio", "decoding: ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
