"""Rows sampled per second: llama.cpp's chain on all candidates, and ours.

    python -m benchmarks.sampling

One step of 64 sequences of a model with Qwen3.5's vocabulary. The plain chain runs as in
llama.cpp's own loops, compiled, on one thread. Both are given the same seed and must pick the same
tokens. All variants run in every round, one after another; keep the machine quiet. The logits are
random, but shaped like a language model's: a bulk of unlikely tokens, normal with a deviation of
2.5, and 200 likely ones that stand out from it, by 4 (the least certain row) to 16.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch.machine import available_cpus
from mtpbatch.native import Sampler

Logits = npt.NDArray[np.float32]

N_VOCAB = 248_320
N_ROWS = 64
SEED = 1


class Mix(TypedDict, total=False):
    """Parameters of a sampler."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


MIXES: dict[str, Mix] = {
    "greedy": {},
    "top_k 40, top_p 0.95, temperature 0.8": {"top_k": 40, "top_p": 0.95, "temperature": 0.8},
    "top_p 0.95, temperature 0.8": {"top_p": 0.95, "temperature": 0.8},
    "min_p 0.05, temperature 0.8": {"min_p": 0.05, "temperature": 0.8},
    "temperature 0.8": {"temperature": 0.8},
}


def make_logits() -> Logits:
    rng = np.random.default_rng(SEED)
    logits = rng.normal(0, 2.5, (N_ROWS, N_VOCAB)).astype(np.float32)
    for row, distance in zip(logits, np.linspace(4, 16, N_ROWS), strict=True):
        likely = rng.choice(N_VOCAB, 200, replace=False)
        row[likely] = row.max() + distance - np.cumsum(rng.exponential(0.15, 200))
    return logits


def build(build_dir: Path) -> ctypes.CDLL:
    """``plain_sampling.cpp``, compiled as llama.cpp itself is."""
    root = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("")))
    library = build_dir / "plain_sampling.so"
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            *("-std=c++17", "-O3", "-DNDEBUG", "-shared", "-fPIC"),
            *("-isystem", root / "include"),
            Path(__file__).parent / "plain_sampling.cpp",
            *("-o", library),
            *("-L", root / "llama_cpp" / "lib", "-lllama"),
            f"-Wl,-rpath,{root / 'llama_cpp' / 'lib'}",
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def plain_chain(mix: Mix) -> Any:
    """llama.cpp's samplers for a mix."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if not mix:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    for sampler in (
        llama_cpp.llama_sampler_init_top_k(mix.get("top_k", 0)),
        llama_cpp.llama_sampler_init_top_p(mix.get("top_p", 1), 1),
        llama_cpp.llama_sampler_init_min_p(mix.get("min_p", 0), 1),
        llama_cpp.llama_sampler_init_temp(mix["temperature"]),
        llama_cpp.llama_sampler_init_dist(SEED),
    ):
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    return chain


def variants(
    plain: ctypes.CDLL, mix: Mix, logits: Logits, threads: list[int]
) -> dict[str, Callable[[], list[int]]]:
    """What is measured: each samples all rows."""
    chain = plain_chain(mix)
    tokens = np.empty(N_ROWS, np.int32)

    def sample_plainly() -> list[int]:
        source, target = (ctypes.c_void_p(array.ctypes.data) for array in (logits, tokens))
        plain.plain_sample(chain, source, N_ROWS, N_VOCAB, target)
        found: list[int] = tokens.tolist()
        return found

    def sample_with(sampler: Sampler) -> Callable[[], list[int]]:
        return lambda: sampler.sample(logits)

    return {"plain chain": sample_plainly} | {
        f"{n} thread{'s' if n > 1 else ''}": sample_with(Sampler(**mix, seed=SEED, n_threads=n))
        for n in threads
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=available_cpus(), help="besides 1")
    options = parser.parse_args()
    facts = command_line.conditions()
    threads = sorted({1, options.threads})

    logits = make_logits()
    rows = []
    head: list[str] = []
    with tempfile.TemporaryDirectory() as build_dir:
        plain = build(Path(build_dir))
    for name, mix in MIXES.items():
        samplers = variants(plain, mix, logits, threads)
        times: dict[str, list[float]] = {variant: [] for variant in samplers}
        for turn in range(options.rounds + 1):
            picked = []
            for variant, sample in samplers.items():
                start = time.perf_counter()
                picked.append(sample())
                if turn:  # the first is to warm up
                    times[variant].append((time.perf_counter() - start) / N_ROWS * 1e6)
            assert all(tokens == picked[0] for tokens in picked), f"{name}: they pick others"
        (_, base), *ours = times.items()
        ratios = [[b / t for b, t in zip(base, figures, strict=True)] for _, figures in ours]
        head = ["", *(f"{variant}, µs" for variant in times), *(f"{v}: ratio" for v, _ in ours)]
        rows.append([name, *map(spread, times.values()), *(spread(r, 1) for r in ratios)])
    print(command_line.in_one_line(facts))
    print(f"\nper row of {N_VOCAB}, {N_ROWS} rows; medians of {options.rounds} rounds\n")
    print(table(head, rows))


if __name__ == "__main__":
    main()
