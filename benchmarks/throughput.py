"""Tokens per second by concurrency and draft depth, beside llama-cpp-python's own loop.

    python tools/widen_model.py wide.gguf          # a model whose cost is like a real one's
    python benchmarks/throughput.py wide.gguf

Closed loop: each of C clients sends its next request when its last one ends. All variants run in
every round, one after another, so that a machine whose speed drifts hurts them alike; what counts
is the median over rounds, and only ratios travel to other machines. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import llama_cpp

import mtpbatch
from mtpbatch.machine import available_cpus

PROMPTS = (
    "And it came to pass in those days, that",
    "And the LORD said unto Moses,",
    "In the beginning God created the heaven and the earth.",
    "def __init__(self, name, value):\n        self.name = name\n",
    "import os\nimport sys\n\ndef main():\n    ",
    "class Queue:\n    def put(self, item):\n        ",
)
N_SEQ = 16
N_CTX = 512


async def closed_loop(
    engine: mtpbatch.Engine, clients: int, requests_each: int, depth: int, tokens: int
) -> float:
    """Tokens per second of ``clients`` at once."""

    async def client(number: int) -> None:
        for turn in range(requests_each):
            prompt = PROMPTS[(number + turn) % len(PROMPTS)]
            await engine.generate(prompt, max_tokens=tokens, ignore_eos=True, speculation=depth)

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(clients):
            group.start_soon(client, number)
    return clients * requests_each * tokens / (time.perf_counter() - begin)


def one_by_one(llm: llama_cpp.Llama, requests: int, tokens: int) -> float:
    """Tokens per second of llama-cpp-python's ``Llama``, which runs one sequence at a time."""
    begin = time.perf_counter()
    for turn in range(requests):
        prompt = llm.tokenize(PROMPTS[turn % len(PROMPTS)].encode())
        for produced, _ in enumerate(llm.generate(prompt, temp=0.0), 1):
            if produced == tokens:
                break
    return requests * tokens / (time.perf_counter() - begin)


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Figures of each variant, one per round."""
    figures: dict[str, list[float]] = {}
    llm = llama_cpp.Llama(
        str(options.model), n_ctx=N_CTX, n_threads=options.threads,
        n_threads_batch=options.threads, verbose=False,
    )  # fmt: skip
    async with mtpbatch.Engine.open(
        options.model,
        n_seq=N_SEQ,
        n_ctx=N_CTX,
        n_draft_max=max(options.depths),
        n_threads=options.threads,
    ) as engine:

        def note(name: str, figure: float) -> None:
            figures.setdefault(name, []).append(figure)
            print(f"  {name:<24} {figure:8.1f} tokens/s", file=sys.stderr)

        for turn in range(options.rounds + 1):
            print("warm-up" if turn == 0 else f"round {turn}", file=sys.stderr)
            note("Llama", one_by_one(llm, 2, options.tokens))
            for clients in options.concurrency:
                for depth in options.depths:
                    figure = await closed_loop(engine, clients, 2, depth, options.tokens)
                    note(f"{clients} at once, depth {depth}", figure)
            if turn == 0:
                figures.clear()
    return figures


def table(
    figures: dict[str, list[float]], concurrency: Sequence[int], depths: Sequence[int]
) -> str:
    """Medians, and the best of ours over the alternatives."""
    median: Callable[[str], float] = lambda name: statistics.median(figures[name])  # noqa: E731
    alone = median("Llama")
    lines = [
        "| at once | Llama, one by one | " + " | ".join(f"depth {d}" for d in depths)
        + " | best / depth 0 | best / Llama |",
        "|---" * (len(depths) + 4) + "|",
    ]  # fmt: skip
    for clients in concurrency:
        ours = [median(f"{clients} at once, depth {depth}") for depth in depths]
        lines.append(
            f"| {clients} | {alone:.0f} | "
            + " | ".join(f"{figure:.0f}" for figure in ours)
            + f" | {max(ours) / ours[0]:.2f} | {max(ours) / alone:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="per request")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()

    figures = anyio.run(measure, options)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "mtpbatch": importlib.metadata.version("mtpbatch"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
        "model": options.model.name,
        "tokens": options.tokens,
        "rounds": options.rounds,
    }
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\ntokens/s, medians of {options.rounds} rounds\n")
    print(table(figures, options.concurrency, options.depths))


if __name__ == "__main__":
    main()
