"""What a handler that keeps the GIL costs the generations that run beside it.

    python -m benchmarks.gil_hog src/mtpbatch/models/demo.gguf wide.gguf

The hog is a coroutine on the engine's own event loop: a pure-Python loop without an await, which
takes all of the loop's time. One CPU is left to the app: the engine has a thread less than there
are CPUs. Still, a second busy CPU slows the first one down by what they share, whatever keeps it
busy. So there are three windows in each round, with fresh generations at the same places of the
same texts: alone, beside a busy process, which has a GIL of its own, and beside the hog. What the
GIL costs is the last against the second. The engine counts the tokens itself, so that nothing has
to come through the loop that is blocked.

Python alone knows texts; requests with a stop text are measured as well.
"""

from __future__ import annotations

import enum
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import anyio
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import spread, table
from benchmarks.workload import PROMPTS
from mtpbatch.machine import available_cpus

_STOP = "\N{SNOWMAN}"  # which the models measured never write


class Case(Struct, frozen=True):
    """What runs beside the hog."""

    clients: int
    depth: int
    stop: bool
    """Whether the requests have a stop text."""


class Beside(enum.StrEnum):
    """What runs beside the generations."""

    NOTHING = "nothing"
    PROCESS = "a process"
    HOG = "the hog"


class Triple(Struct, frozen=True):
    """Tokens per second of three windows, one right after the other."""

    alone: float
    beside_process: float
    beside_hog: float


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep a CPU busy, and nobody's GIL."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


async def window(
    engine: mtpbatch.Engine, case: Case, seconds: float, beside: Beside = Beside.NOTHING
) -> float:
    """Tokens per second of ``case.clients`` generations that run all through the window."""
    generations = [
        engine.submit(
            PROMPTS[number % len(PROMPTS)],
            max_tokens=engine.model.n_ctx,
            ignore_eos=True,
            speculation=case.depth,
            stop=_STOP if case.stop else (),
        )
        for number in range(case.clients)
    ]
    try:
        for generation in generations:
            await anext(generation)  # its prompt is done
        tokens, begin = engine.stats().generated_tokens, time.perf_counter()
        if beside is Beside.HOG:
            while time.perf_counter() - begin < seconds:
                pass
        else:
            with busy_process() if beside is Beside.PROCESS else nullcontext():
                await anyio.sleep(seconds)
        stats, end = engine.stats(), time.perf_counter()
        if stats.running < case.clients:
            raise RuntimeError(
                f"generations ended within the window of {seconds} s: the context of "
                f"{engine.model.n_ctx} tokens is full; choose a shorter --window"
            )
        return (stats.generated_tokens - tokens) / (end - begin)
    finally:
        for generation in generations:
            generation.cancel()
        for generation in generations:
            await generation


async def measure(
    model: Path, cases: Sequence[Case], *, rounds: int, seconds: float, threads: int
) -> dict[Case, list[Triple]]:
    """Three windows of each case in every round."""
    triples: dict[Case, list[Triple]] = {case: [] for case in cases}
    async with mtpbatch.Engine.open(
        model,
        n_seq=max(case.clients for case in cases),
        n_draft_max=max(case.depth for case in cases),
        n_threads=threads,
    ) as engine:
        for turn, case in itertools.product(range(rounds), cases):
            speeds = {}
            for beside in list(Beside) if turn % 2 == 0 else reversed(Beside):
                speeds[beside] = await window(engine, case, seconds, beside)
            triple = Triple(*(speeds[beside] for beside in Beside))
            triples[case].append(triple)
            print(f"round {turn + 1}: {case} {triple}", file=sys.stderr)
    return triples


def comparison(triples: Mapping[Case, Sequence[Triple]]) -> str:
    """Medians over rounds, and of the ratios within each."""
    head = ["at once", "depth", "stop text", "alone, tokens/s"]
    head += ["a busy process / alone", "the hog / alone", "the hog / a busy process"]
    rows = [
        [
            str(case.clients),
            str(case.depth),
            "yes" if case.stop else "no",
            spread([t.alone for t in of_case]),
            spread([t.beside_process / t.alone for t in of_case], 2),
            spread([t.beside_hog / t.alone for t in of_case], 2),
            spread([t.beside_hog / t.beside_process for t in of_case], 2),
        ]
        for case, of_case in triples.items()
    ]
    return table(head, rows)


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of three windows for each line")
    parser.add_argument("--window", type=float, default=1.0, metavar="SECONDS", help="its length")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 3], metavar="N")
    command_line.add_threads(parser, max(1, available_cpus() - 1))
    parser.add_argument(
        "--quick", action="store_true", help="a try-out: --rounds 1 --window 0.3, whatever is said"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.window = 1, 0.3

    cases = [
        Case(clients, depth, stop)
        for clients in options.concurrency
        for depth in options.depths
        for stop in (False, True)
    ]
    print(f"{command_line.in_one_line(command_line.conditions())}; threads: {options.threads}")
    print(f"medians of {options.rounds} rounds of three windows of {options.window} s")
    for model in options.models:
        run = partial(
            measure,
            model,
            cases,
            rounds=options.rounds,
            seconds=options.window,
            threads=options.threads,
        )
        print(f"\n## {model.name}\n\n{comparison(anyio.run(run))}")


if __name__ == "__main__":
    main()
