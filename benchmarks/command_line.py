"""What the benchmarks' command lines share, and the conditions that their figures depend on."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

from mtpbatch.machine import available_cpus


class _Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and every default."""


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=_Format)


def existing_file(text: str) -> Path:
    """An argument that must name a file: a slip is noticed before anything has run."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def add_models(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "models", type=existing_file, nargs="+", metavar="GGUF", help="model files, one by one"
    )


def add_work(
    to: argparse.ArgumentParser, *, rounds: int, concurrency: list[int], tokens: int = 96
) -> None:
    """How much is measured."""
    to.add_argument("--rounds", type=int, default=rounds, help="each variant runs once in each")
    to.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=concurrency,
        metavar="N",
        help="clients at once, one number after the other",
    )
    to.add_argument("--tokens", type=int, default=tokens, help="to generate per request")


def add_threads(to: argparse.ArgumentParser, default: int | None = None) -> None:
    cpus = available_cpus()
    to.add_argument(
        "--threads", type=int, default=default or cpus, help=f"of the model; {cpus} CPUs are here"
    )


def conditions() -> dict[str, str]:
    """What figures depend on besides the command: machine, versions, what else is running."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} x {_cpu()}, {platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "Python": platform.python_version(),
        "mtpbatch": importlib.metadata.version("mtpbatch"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
    }


def in_one_line(facts: dict[str, str]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
