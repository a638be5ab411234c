"""What a forward pass takes longer that has another number of rows than the one before.

    python -m benchmarks.changing_rows src/mtpbatch/models/demo.gguf wide.gguf

llama.cpp takes the graph of its last pass again if the next one has as many rows, and builds
another one otherwise. Drafts of a fixed length always have as many; those that stop where they no
longer pay do not. One sequence decodes two numbers of rows, ten passes of one and ten of the other,
and then in turn: as many of each, at about the same length of context. Keep the machine quiet.
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
N_PASSES = 60  # of either number
IN_A_ROW = 10


def milliseconds(context: Context, pair: tuple[int, int], in_a_row: int) -> dict[int, float]:
    """Of a pass, by its rows: the median, where so many have the same number."""
    context.truncate(0, 0)
    batch = Batch()
    times: dict[int, list[float]] = {n: [] for n in pair}
    for n in (N_PASSES // in_a_row) * [n for n in pair for _ in range(in_a_row)]:
        batch.clear()
        batch.add_sequence([40] * n, position=context.length(0), seq_id=0, outputs="all")
        begun = time.perf_counter()
        context.decode(batch)
        times[n].append(1e3 * (time.perf_counter() - begun))
    return {n: statistics.median(some) for n, some in times.items()}


def measure(path: Path, threads: int, rounds: int) -> list[list[str]]:
    """A row of the table for each number of rows and each other one that comes between."""
    pairs = list(itertools.combinations(ROWS, 2))
    in_a_row: dict[tuple[int, int], list[dict[int, float]]] = {pair: [] for pair in pairs}
    in_turn: dict[tuple[int, int], list[dict[int, float]]] = {pair: [] for pair in pairs}
    n_ctx = 2 * max(ROWS) * N_PASSES
    with Model(path) as model, Context(model, n_ctx=n_ctx, n_threads=threads) as context:
        milliseconds(context, pairs[0], 1)  # to warm up
        for _, pair in itertools.product(range(rounds), pairs):
            in_a_row[pair].append(milliseconds(context, pair, IN_A_ROW))
            in_turn[pair].append(milliseconds(context, pair, 1))
    rows = []
    for pair in pairs:
        for n, other in (pair, pair[::-1]):
            one = [took[n] for took in in_a_row[pair]]
            two = [took[n] for took in in_turn[pair]]
            more = [b - a for a, b in zip(one, two, strict=True)]
            figures = [spread(some, 2) for some in (one, two, more)]
            rows.append([path.name, str(n), str(other), *figures])
    return rows


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
    head = ["model", "rows", "other rows", "ten in a row, ms", "in turn, ms", "more, ms"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
