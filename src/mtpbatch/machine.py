"""What the machine really gives this process."""

from __future__ import annotations

import os
from pathlib import Path


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut to the quota of its control group.

    ggml's threads spin at barriers, so that threads beyond a container's quota make every step
    slower, up to tenfold: ``os.cpu_count()`` is the wrong default there.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, int(quota + 0.5))) if quota else cpus


def _cgroup_quota() -> float | None:
    """CPUs' worth of time per period that the control group allows; None: no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:
            base = Path("/sys/fs/cgroup/cpu")  # version 1
            quota = (base / "cpu.cfs_quota_us").read_text().strip()
            period = (base / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
