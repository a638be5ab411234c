"""What the client itself costs, so that nobody takes it for the server."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import anyio

from mtpbatch.loadtest.records import ClientOverhead

_PERIOD: Final = 0.02  # seconds between looks at the event loop
_MOST_LAG: Final = 0.010  # seconds
_MOST_LATE: Final = 0.010  # seconds
_MOST_CPU: Final = 0.8  # of one CPU: an event loop has no more than that


def quantile(figures: Sequence[float], share: float) -> float:
    """The least figure that at least this share of them does not exceed; 0 of none."""
    if not figures:
        return 0.0
    return sorted(figures)[max(0, math.ceil(share * len(figures)) - 1)]


class Overhead:
    """Watches the event loop it runs on, and the thread that this runs on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._cpu = time.thread_time()
        self._lags = array("d")

    async def watch(self) -> None:
        """Look how late the event loop wakes up, until cancelled."""
        while True:
            due = self._clock() + _PERIOD
            await anyio.sleep(_PERIOD)
            self._lags.append(max(0.0, self._clock() - due))

    def measured(self, lateness: Iterable[float]) -> ClientOverhead:
        """All of it until now; ``lateness`` is by how much each request was sent late."""
        return ClientOverhead(
            cpu_seconds=time.thread_time() - self._cpu,
            wall_seconds=self._clock() - self._began,
            loop_lag_p50=quantile(self._lags, 0.5),
            loop_lag_p99=quantile(self._lags, 0.99),
            send_late_p99=quantile(list(lateness), 0.99),
        )


def doubts(overhead: ClientOverhead) -> list[str]:
    """Why the figures may be the client's rather than the server's; nothing if they are not."""
    found = []
    if overhead.loop_lag_p99 > _MOST_LAG:
        found.append(
            f"its event loop was {overhead.loop_lag_p99 * 1000:.0f} ms late (p99), and so were the "
            f"times of chunks"
        )
    if overhead.send_late_p99 > _MOST_LATE:
        found.append(f"requests were sent {overhead.send_late_p99 * 1000:.0f} ms late (p99)")
    if overhead.cpu_seconds > _MOST_CPU * overhead.wall_seconds:
        share = overhead.cpu_seconds / overhead.wall_seconds
        found.append(f"its event loop used {share:.0%} of a CPU")
    return found
