"""A local Ray cluster for these tests, which leaves no processes behind."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ |= {  # before Ray is imported, which reads some of them then
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not this cluster's alone
    # Autoscaling that notices at once, and patience with a busy machine.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    pytest.importorskip("ray.serve", reason="pip install 'mtpbatch[ray]'")

import ray
from ray import serve


def pytest_configure(config: pytest.Config) -> None:
    """What Ray itself is to be warned of."""
    for warning in (
        r"ignore:.*subprocess \d+ is still running:ResourceWarning",
        # It compares with a setting that is deprecated; the interval is the one above.
        "ignore:`look_back_period_s`:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture
def anyio_backend() -> str:
    """Ray is at home on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of Serve on a cluster of one node, whose CPUs are a number and no more."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder,
    ):
        patch.setenv("OMP_WAIT_POLICY", "passive")  # the replicas share the CPUs
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for ray_replicas
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                num_cpus=8,
                include_dashboard=False,
                object_store_memory=80 << 20,
                log_to_driver=False,
                _temp_dir=folder,
            )
            try:
                serve.start(http_options={"host": "127.0.0.1", "port": port})
                yield f"http://127.0.0.1:{port}"
            finally:
                serve.shutdown()
                ray.shutdown()
        left = [process for process in Path("/proc").glob("[0-9]*") if _names(process, folder)]
        assert not left


def _names(process: Path, folder: str) -> bool:
    try:
        return folder.encode() in (process / "cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return False
