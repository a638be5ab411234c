"""What the machine really gives this process.

Limits are those of its control group and of the groups around that, by version 1 or 2 of Linux's
interface: a container's own, a service's, a pod's. ``root`` is where the files are looked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

_ROOT = Path("/")


class MachineMemory(Struct, frozen=True):
    """Memory in bytes."""

    total: int
    """What the machine has."""
    limit: int | None
    """What the control group may take; None: it has no limit."""
    available: int
    """What this process can take now, without swap and before any limit is met."""


def available_cpus(root: Path = _ROOT) -> int:
    """CPUs this process may use: its affinity mask, cut to the quota of its control group.

    ggml's threads spin at barriers, so that threads beyond a container's quota make every step
    slower, up to tenfold: ``os.cpu_count()`` is the wrong default there.
    """
    quota = cpu_quota(root)
    return max(1, min(affine_cpus(), int(quota + 0.5))) if quota else affine_cpus()


def affine_cpus() -> int:
    """CPUs in this process's affinity mask."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs' worth of time that the control group allows; None: no limit."""
    quotas = []
    for group in _groups(root, "cpu"):
        limit = _words(group / "cpu.max") or (
            _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        )
        if len(limit) == 2 and limit[0] not in ("max", "-1"):
            quotas.append(int(limit[0]) / int(limit[1]))
    return min(quotas, default=None)


def machine_memory(root: Path = _ROOT) -> MachineMemory:
    """What there is and what is left. Cached files count as left: they make room."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    counts = _counts(root / "proc/meminfo")
    total = counts.get("MemTotal:", total >> 10) << 10  # in KiB there
    available = counts.get("MemAvailable:", total >> 10) << 10
    limits = []
    for group in _groups(root, "memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if not limit or not used or limit[0] == "max" or int(limit[0]) >= total:
            continue
        stat = _counts(group / "memory.stat")
        cached = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        limits.append(int(limit[0]))
        available = min(available, max(0, int(limit[0]) - int(used[0]) + cached))
    return MachineMemory(total, min(limits, default=None), available)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group, then those around it, as far as they can be seen.

    A container may see itself as the outermost one while the kernel tells its name outside: what
    is not there is passed over by who reads it.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount /= controller
        group = mount / path.lstrip("/")
        yield group
        while group != mount:
            group = group.parent
            yield group


def _counts(path: Path) -> dict[str, int]:
    """A file of lines that are a name and a number."""
    words = (line.split() for line in _lines(path))
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # there is none, or it is not for us
        return []
