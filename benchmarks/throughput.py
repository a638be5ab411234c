"""Tokens per second by concurrency and draft depth, beside llama-cpp-python's own loop.

    python tools/widen_model.py wide.gguf          # a model whose cost is like a real one's
    python -m benchmarks.throughput wide.gguf

Closed loop: each of C clients sends its next request when its last one ends. All variants run in
every round, one after another, so that a machine whose speed drifts hurts them alike; what counts
is the median over rounds, and only ratios travel to other machines. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio

import mtpbatch
from benchmarks import command_line
from benchmarks.engine_process import generate_with
from benchmarks.report import spread, table
from benchmarks.workload import N_CTX, closed_loop

_ALONE = "Llama"


def one_by_one(options: argparse.Namespace) -> float:
    """Tokens per second of llama-cpp-python's ``Llama``, in a process of its own.

    In one process with the engine each would slow the other down even while idle: OpenMP stops
    spinning, and sleeps at every barrier, once its teams have more threads than there are CPUs.
    """
    command = [sys.executable, "-m", "benchmarks.llama_alone", options.model]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def name(clients: int, depth: int) -> str:
    """What a variant is called among the figures."""
    return f"{clients} at once, depth {depth}"


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Figures of each variant, one per round."""
    figures: dict[str, list[float]] = {}
    async with mtpbatch.Engine.open(
        options.model,
        n_seq=max(options.concurrency),
        n_ctx=N_CTX,
        n_draft_max=max(options.depths),
        n_threads=options.threads,
    ) as engine:

        def note(variant: str, figure: float) -> None:
            figures.setdefault(variant, []).append(figure)
            print(f"  {variant:<24} {figure:8.1f} tokens/s", file=sys.stderr)

        for turn in range(options.rounds + 1):
            print("warm-up" if turn == 0 else f"round {turn}", file=sys.stderr)
            note(_ALONE, one_by_one(options))
            for clients in options.concurrency:
                for depth in options.depths:
                    load = await closed_loop(generate_with(engine, depth), clients, options.tokens)
                    note(name(clients, depth), load.speed)
            if turn == 0:
                figures.clear()
    return figures


def comparison(
    figures: dict[str, list[float]], concurrency: Sequence[int], depths: Sequence[int]
) -> str:
    """Medians, and the best of ours over the alternatives."""
    medians = {variant: statistics.median(speeds) for variant, speeds in figures.items()}
    rows = []
    for clients in concurrency:
        ours = [name(clients, depth) for depth in depths]
        best = max(medians[variant] for variant in ours)
        rows.append(
            [
                str(clients),
                spread(figures[_ALONE]),
                *(spread(figures[variant]) for variant in ours),
                f"{best / medians[ours[0]]:.2f}",
                f"{best / medians[_ALONE]:.2f}",
            ]
        )
    head = ["at once", "Llama, one by one", *(f"depth {depth}" for depth in depths)]
    return table([*head, f"best / depth {depths[0]}", "best / Llama"], rows)


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("model", type=command_line.existing_file)
    command_line.add_work(parser, rounds=5, concurrency=[1, 4, 16])
    command_line.add_threads(parser)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[0, 1, 3], metavar="N", help="tokens drafted"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()

    facts = command_line.conditions() | {"threads": str(options.threads)}
    figures = anyio.run(measure, options)
    if options.json:
        options.json.write_text(json.dumps({"conditions": facts, "figures": figures}, indent=1))
    print(f"{command_line.in_one_line(facts)}; {options.tokens} tokens a request")
    print(f"\ntokens/s, medians of {options.rounds} rounds (least to greatest)\n")
    print(comparison(figures, options.concurrency, options.depths))


if __name__ == "__main__":
    main()
