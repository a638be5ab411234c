"""Where a load test ran: figures of another machine, or of a busy one, are not comparable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from mtpbatch.machine import available_cpus


def environment() -> dict[str, str | int]:
    """The client's machine and versions, and what else was running before."""
    return {
        "machine": _cpu(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": available_cpus(),
        "load_average": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "mtpbatch": importlib.metadata.version("mtpbatch"),
        "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not on Linux
        pass
    return platform.processor() or platform.machine()
