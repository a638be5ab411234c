"""mtpbatch as one side of :mod:`benchmarks.side_by_side`, in a process of its own.

Engine and clients share it, as they do in an app. It writes a line when the engine is open, so
that its start-up can be timed, and one with what was measured.
"""

from __future__ import annotations

import os
import sys
import time

import anyio
import msgspec
from msgspec import Struct

import mtpbatch
from benchmarks.report import Depth
from benchmarks.workload import N_CTX, Answer, FirstToken, Generate, Measured, measure, peak_memory


class Task(Struct, frozen=True):
    """What to measure; the process gets it as JSON in its one argument."""

    model: str
    depth: Depth
    n_draft_max: int
    kv_unified: bool
    threads: int
    concurrency: list[int]
    tokens: int


class Outcome(Struct, frozen=True):
    """What the process writes at its end."""

    measured: Measured
    peak_memory: float


def generate_with(engine: mtpbatch.Engine, depth: Depth) -> Generate:
    """Serve requests at a draft depth."""

    async def generate(prompt: str, tokens: int) -> Answer:
        done = await engine.generate(prompt, max_tokens=tokens, ignore_eos=True, speculation=depth)
        return Answer(
            prompt_tokens=len(done.prompt_token_ids),
            tokens=len(done.token_ids),
            drafted=done.drafted,
            accepted=done.accepted,
        )

    return generate


def first_token_with(engine: mtpbatch.Engine, depth: Depth) -> FirstToken:
    """Serve requests as streams."""

    async def first_token(prompt: str, tokens: int) -> float:
        generation = engine.submit(prompt, max_tokens=tokens, ignore_eos=True, speculation=depth)
        came = None
        async for delta in generation:
            if came is None and delta.token_ids:
                came = time.perf_counter()
        if came is None:
            raise RuntimeError("a stream without tokens")
        return came

    return first_token


def spent(stats: mtpbatch.EngineStats) -> dict[str, float]:
    """Seconds in native code so far, by what it did."""
    return {
        "target": stats.target_time,
        "draft": stats.draft_time,
        "sampling": stats.sample_time,
        "gaps": stats.gap_time,
    }


async def run(task: Task) -> Outcome:
    async with mtpbatch.Engine.open(
        task.model,
        n_seq=max(task.concurrency),
        n_ctx=N_CTX,
        n_draft_max=task.n_draft_max,
        n_threads=task.threads,
        kv_unified=task.kv_unified,
    ) as engine:
        print("open", flush=True)
        measured = await measure(
            generate_with(engine, task.depth),
            first_token_with(engine, task.depth),
            task.concurrency,
            task.tokens,
            lambda: spent(engine.stats()),
        )
        return Outcome(measured, peak_memory(os.getpid()))


if __name__ == "__main__":
    outcome = anyio.run(run, msgspec.json.decode(sys.argv[1], type=Task))
    print(msgspec.json.encode(outcome).decode())
