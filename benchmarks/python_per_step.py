"""What Python costs per step, and what of that the model has to wait for.

    python -m benchmarks.python_per_step [GGUF] [--sequences 64]

Steps run on a native thread; the engine's thread takes in results and delivers them, and the
event loop hands them to whoever waits. The processor time of both threads over the steps is what
Python costs; the gap between steps is what of it the model waits for.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

import anyio

import mtpbatch
from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch import SamplingOptions

_WARM_UP = 16  # tokens
_PROMPTS = ("In the beginning", "def read(path):\n", "And the king said", "class Queue:\n")


async def measure(
    engine: mtpbatch.Engine, n_sequences: int, depth: int, n_tokens: int, streaming: bool
) -> Sequence[float]:
    """Run one request per sequence from start to end; steps, and microseconds of each by step."""

    async def run(prompt: str, tokens: int) -> None:
        params: SamplingOptions = {"max_tokens": tokens, "ignore_eos": True, "speculation": depth}
        if not streaming:
            await engine.generate(prompt, **params)
            return
        async with engine.stream(prompt, **params) as deltas:
            async for _ in deltas:
                pass

    async def run_all(tokens: int) -> None:
        async with anyio.create_task_group() as group:
            for i in range(n_sequences):
                group.start_soon(run, _PROMPTS[i % len(_PROMPTS)], tokens)

    [engine_thread] = [t for t in threading.enumerate() if t.name == "mtpbatch-engine"]
    assert engine_thread.ident is not None
    engine_clock = time.pthread_getcpuclockid(engine_thread.ident)
    loop_clock = time.pthread_getcpuclockid(threading.get_ident())
    await run_all(_WARM_UP)
    before = engine.stats()
    cpu = [time.clock_gettime(clock) for clock in (engine_clock, loop_clock)]
    begin = time.perf_counter()
    await run_all(n_tokens)
    seconds = time.perf_counter() - begin
    engine_cpu, loop_cpu = (
        time.clock_gettime(clock) - since
        for clock, since in zip((engine_clock, loop_clock), cpu, strict=True)
    )
    after = engine.stats()
    steps = after.steps - before.steps
    per_step = [engine_cpu, loop_cpu, after.gap_time - before.gap_time, seconds]
    return [steps, *(1e6 * value / steps for value in per_step)]


async def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "model", nargs="?", type=command_line.existing_file, help="the demo model if left out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="per sequence")
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    figures: dict[tuple[int, bool], list[Sequence[float]]] = {}
    async with mtpbatch.Engine.open(options.model, n_seq=options.sequences, n_ctx=512) as engine:
        cases = list(itertools.product((0, engine.config.n_draft_max), (False, True)))
        for _, (depth, streaming) in itertools.product(range(options.rounds), cases):
            figures.setdefault((depth, streaming), []).append(
                await measure(engine, options.sequences, depth, options.tokens, streaming)
            )
    rows = [
        [str(depth), "stream" if streaming else "generate", *map(spread, zip(*runs, strict=True))]
        for (depth, streaming), runs in figures.items()
    ]
    header = ["depth", "requests", "steps", "engine µs", "loop µs", "gap µs", "step µs"]
    print(table(header, rows))


if __name__ == "__main__":
    anyio.run(main)
