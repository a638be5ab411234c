"""How long the event loop stands still while texts are long.

    python -m benchmarks.loop_pauses src/mtpbatch/models/demo.gguf

A task on the loop does nothing but look at the clock, over and over: the longest time between two
looks is the longest pause. What pauses there are without any work is the first line: they are the
machine's. Texts differ from round to round, so that every prompt is computed as a whole.

What holds the loop up is the GIL: one call in C keeps it to its end, and Python code on another
thread until somebody has waited for ``sys.getswitchinterval()``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import spread, table
from benchmarks.workload import PROMPTS
from mtpbatch.machine import available_cpus


class Pause(Struct, frozen=True):
    """Of one call. Seconds."""

    longest: float
    """The loop's longest pause meanwhile."""
    total: float
    """What the call took."""


async def watch(call: Callable[[], Awaitable[object]]) -> Pause:
    """Make the call, and look at the clock meanwhile."""
    longest = 0.0

    async def look() -> None:
        nonlocal longest
        before = time.perf_counter()
        while True:
            await anyio.lowlevel.checkpoint()
            now = time.perf_counter()
            longest = max(longest, now - before)
            before = now

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        await anyio.lowlevel.checkpoint()
        begin = time.perf_counter()
        await call()
        total = time.perf_counter() - begin
        await anyio.lowlevel.checkpoint()  # for the last look
        group.cancel_scope.cancel()
    return Pause(longest, total)


def long_text(n_chars: int, turn: int) -> str:
    """The usual prompts, over and over."""
    once = f"{turn}. " + "\n".join(PROMPTS) + "\n"
    return (once * (n_chars // len(once) + 1))[:n_chars]


async def first_step(engine: mtpbatch.Engine, prompt: str | list[int]) -> None:
    """Submit a prompt, and cancel it when the first step of it has ended."""
    n_tokens = engine.stats().prompt_tokens
    generation = engine.submit(prompt)
    while engine.stats().prompt_tokens == n_tokens:  # noqa: ASYNC110 (of steps nobody is told)
        await anyio.sleep(0.001)
    generation.cancel()
    await generation


async def measure(
    model: Path, *, n_chars: int, rounds: int, threads: int, whole: bool
) -> Mapping[str, Sequence[Pause]]:
    """The pauses of each kind of call, one of each in every round."""
    pauses: dict[str, list[Pause]] = {}
    async with mtpbatch.Engine.open(model, n_seq=1, n_ctx=n_chars, n_threads=threads) as engine:

        async def take(what: str, call: Callable[[], Awaitable[object]]) -> None:
            pauses.setdefault(what, []).append(await watch(call))
            print(f"{what}: {pauses[what][-1]}", file=sys.stderr)

        for turn in range(rounds):
            text = long_text(n_chars, turn)
            ids = await engine.tokenize(text)
            await take("nothing", partial(anyio.sleep, 1))
            await take("tokenize", partial(engine.tokenize, text))
            await take("detokenize", partial(engine.detokenize, ids))
            await take("a short prompt's first step", partial(first_step, engine, "In the"))
            await take("the text's first step", partial(first_step, engine, text))
            await take("its tokens' first step", partial(first_step, engine, ids))
            if whole:
                await take("generate", partial(engine.generate, text, max_tokens=1))
    print(f"{len(ids)} tokens in {n_chars} characters")
    return pauses


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chars", type=int, default=200_000, help="in a long text")
    parser.add_argument(
        "--whole", action="store_true", help="also generate a token, which may take minutes"
    )
    command_line.add_threads(parser, max(1, available_cpus() - 1))
    options = parser.parse_args()
    print(command_line.in_one_line(command_line.conditions()))
    print(f"sys.getswitchinterval() is {1e3 * sys.getswitchinterval():.0f} ms")
    for model in options.models:
        pauses = anyio.run(
            partial(
                measure,
                model,
                n_chars=options.chars,
                rounds=options.rounds,
                threads=options.threads,
                whole=options.whole,
            )
        )
        head = ["the app awaits", "longest pause of the loop, ms", "takes, s"]
        rows = [
            [
                what,
                spread([1e3 * pause.longest for pause in of_one], 2),
                spread([pause.total for pause in of_one], 2),
            ]
            for what, of_one in pauses.items()
        ]
        print(f"\n## {model.name}\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
