"""What a forward pass takes longer that has another number of rows than the one before.

    python -m benchmarks.changing_rows src/mtpbatch/models/demo.gguf wide.gguf

llama.cpp takes the graph of its last pass again if the next one has as many rows, and builds
another one otherwise. Drafts of a fixed length always have as many; those that stop where they no
longer pay do not. Passes of one sequence with always so many rows, and with two numbers of them in
turn, follow each other within a round. Keep the machine quiet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch.native import Batch, Context, Model

ROWS = (1, 2, 4)
N_PASSES = 60
N_WARM_UP = 8


def milliseconds(context: Context, rows: tuple[int, ...]) -> dict[int, float]:
    """Of a pass, by its rows: the median of those that have so many, in turn."""
    context.truncate(0, 0)
    batch = Batch()
    times: dict[int, list[float]] = {n: [] for n in rows}
    for _ in range(N_WARM_UP + N_PASSES):
        for n in rows:
            batch.clear()
            batch.add_sequence([40] * n, position=context.length(0), seq_id=0, outputs="all")
            begun = time.perf_counter()
            context.decode(batch)
            times[n].append(1e3 * (time.perf_counter() - begun))
    return {n: statistics.median(some[N_WARM_UP:]) for n, some in times.items()}


def measure(path: Path, threads: int, rounds: int) -> list[list[str]]:
    """A row of the table for each number of rows and each other one that comes between."""
    n_ctx = 2 * max(ROWS) * (N_WARM_UP + N_PASSES)
    alone: dict[int, list[float]] = {n: [] for n in ROWS}
    in_turn: dict[tuple[int, int], list[float]] = {
        pair: [] for pair in itertools.permutations(ROWS, 2)
    }
    with Model(path) as model, Context(model, n_ctx=n_ctx, n_threads=threads) as context:
        for _ in range(rounds):
            for n in ROWS:
                alone[n].append(milliseconds(context, (n,))[n])
            for pair in itertools.combinations(ROWS, 2):
                for n, took in milliseconds(context, pair).items():
                    other = pair[0] if n == pair[1] else pair[1]
                    in_turn[n, other].append(took)
    return [
        [
            *(path.name, str(n), str(other)),
            spread(alone[n], 2),
            spread(some, 2),
            spread([two - one for one, two in zip(alone[n], some, strict=True)], 2),
        ]
        for (n, other), some in in_turn.items()
    ]


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    command_line.add_threads(parser)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}; threads: {options.threads}\n")
    rows = [
        row for path in options.models for row in measure(path, options.threads, options.rounds)
    ]
    head = ["model", "rows", "rows of the passes between"]
    print(table([*head, "always as many, ms", "in turn, ms", "more, ms"], rows))


if __name__ == "__main__":
    main()
