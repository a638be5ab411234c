"""Compiles and runs ``native_ideal.cpp`` against the installed llama-cpp-python."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.workload import N_CTX, PROMPTS, Load, turns

_HERE = Path(__file__).resolve().parent


class Outcome(Struct, frozen=True):
    """What the program writes. The three parts are within ``seconds``."""

    tokens: int
    drafted: int
    accepted: int
    seconds: float
    prefill_seconds: float
    draft_seconds: float
    target_seconds: float

    @property
    def load(self) -> Load:
        parts = {
            "target": self.target_seconds,
            "draft": self.draft_seconds,
            "prefill": self.prefill_seconds,
        }
        return Load(self.tokens, self.seconds, self.drafted, self.accepted, parts)


def build(build_dir: Path) -> Path:
    """The compiled program."""
    root = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("")))
    libraries = root / "llama_cpp" / "lib"
    program = build_dir / "native_ideal"
    build_dir.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            *("-std=c++17", "-O3", "-march=native"),
            *("-ffinite-math-only", "-fno-signed-zeros"),  # else a maximum is not vectorised
            *("-I", _HERE.parent / "csrc", "-isystem", root / "include"),
            _HERE / "native_ideal.cpp",
            *("-o", program),
            *("-L", libraries, "-lllama", "-lggml", "-lggml-base"),
            f"-Wl,-rpath,{libraries}",
            "-Wl,--allow-shlib-undefined",  # a GPU backend's own libraries are found when it runs
        ],
        check=True,
    )
    return program


def run(
    program: Path,
    model: Path,
    *,
    n_seq: int,
    depth: int,
    kv: str,
    threads: int,
    tokens: int,
) -> Outcome:
    """The work of ``n_seq`` clients of a closed loop."""
    command = [program, model, n_seq, depth, kv, threads, N_CTX, tokens, turns(n_seq), *PROMPTS]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"native_ideal ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return msgspec.json.decode(done.stdout, type=Outcome)
