"""What a process really gets, by the files in which Linux says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtpbatch.machine import affine_cpus, available_cpus, cpu_quota, machine_memory

GIB = 1 << 30
MEMINFO = f"MemTotal: {64 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {48 * GIB >> 10} kB\n"
NO_LIMIT = 9223372036854771712  # what version 1 says then


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {  # a group may have less than its own limit says: those around it count as well
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/pod/app/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {  # in a container that does not see the groups which the kernel names
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
    ],
)
def test_the_quota_of_cpu_time(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    root = write(tmp_path, files)
    assert cpu_quota(root) == quota
    cpus = affine_cpus()
    expected = cpus if quota is None else max(1, min(cpus, int(quota + 0.5)))
    assert available_cpus(root) == expected


@pytest.mark.parametrize(
    ("files", "limit", "available"),
    [
        ({}, None, 48 * GIB),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None, 48 * GIB),
        (
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pod/memory.current": f"{7 * GIB}\n",
                "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
                "sys/fs/cgroup/pod/app/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/pod/app/memory.current": f"{GIB // 2}\n",
            },
            4 * GIB,
            3 * GIB,  # the pod has 8, of which 5 are taken for good
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{NO_LIMIT}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{60 * GIB}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{3 * GIB // 2}\n",
                "sys/fs/cgroup/memory/docker/abc/memory.stat": f"total_inactive_file {GIB}\n",
            },
            2 * GIB,
            3 * GIB // 2,
        ),
    ],
)
def test_the_memory_that_is_left(
    tmp_path: Path, files: dict[str, str], limit: int | None, available: int
) -> None:
    memory = machine_memory(write(tmp_path, {"proc/meminfo": MEMINFO, **files}))
    assert (memory.total, memory.limit, memory.available) == (64 * GIB, limit, available)


def test_without_the_files_of_linux_all_memory_counts(tmp_path: Path) -> None:
    memory = machine_memory(tmp_path)
    assert memory.available == memory.total > 0
    assert memory.limit is None


def test_this_machine() -> None:
    memory = machine_memory()
    assert 0 < memory.available <= memory.total
    assert 1 <= available_cpus() <= affine_cpus()
