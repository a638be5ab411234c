"""What it costs to have the model in a process of its own: ``isolation="process"``.

    python tools/widen_model.py wide.gguf
    python -m benchmarks.isolation wide.gguf

Two engines on the same model, one of either kind, take turns: A B A B and so on, each with fresh
generations of the same prompts in a closed loop of so many clients, so that a round's two figures
are seconds apart. The idle engine sleeps. A ratio is of one round. Clients stream, which is what
costs most: each step's tokens cross to the app as they come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import spread, table
from benchmarks.workload import PROMPTS
from mtpbatch.machine import available_cpus

_WAYS: Final = ("none", "process")


class Case(Struct, frozen=True):
    """What is asked for."""

    clients: int
    depth: int


async def tokens_per_second(engine: mtpbatch.Engine, case: Case, n_tokens: int) -> float:
    """Of so many streams at once, prompts included."""

    async def follow(prompt: str) -> None:
        async with engine.stream(
            prompt,
            max_tokens=n_tokens,
            ignore_eos=True,
            speculation=case.depth,
            reuse_prefix=False,
        ) as deltas:
            async for _ in deltas:
                pass

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(case.clients):
            group.start_soon(follow, PROMPTS[number % len(PROMPTS)])
    return case.clients * n_tokens / (time.perf_counter() - begin)


async def measure(
    model: Path, cases: Sequence[Case], *, rounds: int, n_tokens: int, threads: int
) -> dict[Case, list[tuple[float, float]]]:
    """Both ways' tokens per second in every round of each case."""
    found: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    open_engine = partial(
        mtpbatch.Engine.open,
        model,
        n_seq=max(case.clients for case in cases),
        n_ctx=512,
        n_draft_max=max(case.depth for case in cases),
        n_threads=threads,
    )
    async with open_engine(isolation=_WAYS[0]) as a, open_engine(isolation=_WAYS[1]) as b:
        for engine in (a, b):  # the first steps are slower
            await tokens_per_second(engine, cases[0], min(8, n_tokens))
        for turn in range(rounds):
            for case in cases:
                speeds = tuple([await tokens_per_second(e, case, n_tokens) for e in (a, b)])
                found[case].append((speeds[0], speeds[1]))
                print(f"round {turn + 1}: {case} {speeds}", file=sys.stderr)
    return found


def comparison(found: dict[Case, list[tuple[float, float]]]) -> str:
    """Medians over rounds, and of the ratios within each."""
    head = ["at once", "depth", "in the app, tokens/s", "in a process, tokens/s", "ratio"]
    rows = [
        [
            str(case.clients),
            str(case.depth),
            spread([a for a, _ in pairs]),
            spread([b for _, b in pairs]),
            spread([b / a for a, b in pairs], 3),
        ]
        for case, pairs in found.items()
    ]
    return table(head, rows)


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of two turns for each line")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 3], metavar="N")
    command_line.add_threads(parser, available_cpus())
    parser.add_argument(
        "--quick", action="store_true", help="a try-out: --rounds 1 --tokens 8, whatever is said"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 1, 8

    cases = [Case(n, depth) for n in options.concurrency for depth in options.depths]
    print(f"{command_line.in_one_line(command_line.conditions())}; threads: {options.threads}")
    print(f"medians of {options.rounds} rounds, {options.tokens} tokens a stream")
    for model in options.models:
        run = partial(
            measure,
            model,
            cases,
            rounds=options.rounds,
            n_tokens=options.tokens,
            threads=options.threads,
        )
        print(f"\n## {model.name}\n\n{comparison(anyio.run(run))}")


if __name__ == "__main__":
    main()
