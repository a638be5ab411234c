"""Load damaged model files, in processes of their own, and count what becomes of it.

    python tools/fuzz_gguf.py [MODEL.gguf ...] [--places 500] [--seed 0] [--keep FOLDER]

Each model is cut off, or has one bit turned over, at so many places: half of them in the
header, where there is most to get wrong, half anywhere. Every file is loaded and generates a few
tokens, as by `mtpbatch.probe_model`. It works, is refused with an error, ends the process, or
takes too long. The last two are what the process is there for; FOLDER is for files that did it, and
the status is then 1.

Without models: the demo model and a random tiny one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import gguf
import msgspec

import random_model
from mtpbatch.probing import command, environment, how_it_ended
from mtpbatch.probing.messages import Found, Probe

Outcome = Literal["works", "error", "died", "late"]

_MEMORY = 4 << 30


@dataclass(frozen=True)
class Damage:
    """A place in a file, and what is done there."""

    offset: int
    bit: int | None
    """The bit that is turned over; ``None``: the file ends there."""

    def __str__(self) -> str:
        return f"cut-{self.offset}" if self.bit is None else f"flip-{self.offset}-{self.bit}"

    def of(self, data: bytes) -> bytes:
        if self.bit is None:
            return data[: self.offset]
        damaged = bytearray(data)
        damaged[self.offset] ^= 1 << self.bit
        return bytes(damaged)


@dataclass(frozen=True)
class Result:
    damage: Damage
    outcome: Outcome
    words: str


def places(path: Path, n: int, seed: int) -> list[Damage]:
    """Where to damage a file, at random."""
    size, header = path.stat().st_size, gguf.GGUFReader(path).data_offset
    draw = random.Random(seed)
    found: list[Damage] = []
    for i in range(n):
        offset = draw.randrange(4, header if i % 2 else size)  # behind the magic number
        found.append(Damage(offset, None if i % 5 == 0 else draw.randrange(8)))
    return found


class Prober:
    """Has files tried out in a process, and starts another one when it dies."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._log: IO[bytes]

    def probe(self, path: Path) -> tuple[Outcome, str]:
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Probe(str(path))) + b"\n")
        process.stdin.flush()
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            return "late", f"no answer within {self._timeout:g} s"
        if not line:
            status = process.wait()
            self._log.seek(0)
            words = how_it_ended(status, self._log.read().decode("utf-8", "replace"))
            self.close()
            return "died", words
        found = msgspec.json.decode(line, type=Found)
        return ("works", "") if found.error is None else ("error", found.error)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process, self._log:
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = process = subprocess.Popen(
            command(sys.executable, _MEMORY),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(),
        )
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lines = lines  # those of this process

        def read() -> None:
            assert process.stdout is not None
            with contextlib.suppress(ValueError):  # it was closed
                for line in process.stdout:
                    lines.put(line)
            lines.put(b"")

        threading.Thread(target=read, daemon=True).start()
        return process


def fuzz(
    path: Path, damages: list[Damage], folder: Path, *, timeout: float = 60.0
) -> Iterator[Result]:
    """Try each damage out, on copies of the file in the folder."""
    data = path.read_bytes()
    prober = Prober(timeout)
    try:
        outcome, words = prober.probe(path)
        if outcome != "works":
            raise SystemExit(f"{path} itself: {words}")
        for damage in damages:
            copy = folder / f"{path.stem}-{damage}.gguf"
            copy.write_bytes(damage.of(data))
            outcome, words = prober.probe(copy)
            if outcome in ("works", "error"):
                copy.unlink()
            yield Result(damage, outcome, words)
    finally:
        prober.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--places", type=int, default=500, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each file")
    parser.add_argument("--keep", type=Path, help="folder for files that end the process")
    asked = parser.parse_args()
    n_findings = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for path in asked.models or [random_model.DEMO_MODEL, tiny_model(Path(scratch))]:
            print(f"{path.name}:")
            counts: Counter[Outcome] = Counter()
            for result in fuzz(
                path, places(path, asked.places, asked.seed), folder, timeout=asked.timeout
            ):
                counts[result.outcome] += 1
                if result.outcome in ("died", "late"):
                    print(f"  {result.damage}: {result.words}", flush=True)
            print("  " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()), flush=True)
            n_findings += counts["died"] + counts["late"]
    sys.exit(n_findings > 0)


def tiny_model(folder: Path) -> Path:
    """A random model with an MTP head, written there."""
    path = folder / "tiny.gguf"
    shape = dataclasses.replace(random_model.RANDOM_SHAPE, vocab=300, width=64, ff=64, layers=2)
    random_model.write_random(path, shape, mix=0.3, seed=1)
    return path


if __name__ == "__main__":
    main()
