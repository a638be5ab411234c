"""What a load test observed, whole: every request and every chunk. Pure.

Nothing is left out or summed up here. Which requests count, and what they amount to, is worked out
from these records (:mod:`mtpbatch.loadtest.summary`), today or later.

All times are seconds of a monotonic clock since the run began.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from msgspec import Struct

FORMAT: Final = 1
"""The version of what is written here. A reader refuses versions that it does not know."""

Outcome: TypeAlias = Literal["ok", "cancelled", "error"]
SloName: TypeAlias = Literal["ttft", "tpot", "e2e"]
Slo: TypeAlias = dict[SloName, float]
"""The most seconds that a good request may take: to its first token, per token after that, and
altogether. What is not named has no limit."""
Facts: TypeAlias = dict[str, str | int | float | bool | None]
"""Settings, by name."""


class RequestRecord(Struct, frozen=True, kw_only=True):
    """One request."""

    index: int
    scheduled: float
    """When it should have been sent."""
    sent: float
    prompt_tokens: int | None
    """As the server counted, else as the dataset knew. None: unknown."""
    cached_tokens: int | None = None
    """Tokens of the prompt that the server did not compute again. None: unknown."""
    output_tokens: int
    """Those that were received."""
    chunks: tuple[tuple[float, int], ...]
    """Time and tokens of each chunk with content. Where a server does not tell how many tokens a
    chunk has, 1."""
    ended: float
    outcome: Outcome
    finish_reason: str | None = None
    error: str | None = None
    """Its kind: "connect", "http 429", "http 500", "timeout", "broken stream", "overloaded", …"""
    drafted: int | None = None
    accepted: int | None = None
    """Of the drafted tokens. None, for both: unknown."""
    steps: int | None = None
    """Decodes that gave it tokens. None: unknown."""


class ClientOverhead(Struct, frozen=True, kw_only=True):
    """What the client itself cost."""

    cpu_seconds: float
    wall_seconds: float
    loop_lag_p50: float
    """Seconds by which the client's event loop was late."""
    loop_lag_p99: float
    send_late_p99: float
    """Seconds from when a request should have been sent to when it was."""


class RunRecord(Struct, frozen=True, kw_only=True, tag_field="kind", tag="run"):
    """One run under one load."""

    version: int = FORMAT
    name: str
    """What was measured, as a label: "mtpbatch", "llama-server"."""
    started_at: str
    """ISO 8601, UTC."""
    target: Facts
    """URL or engine settings, and the model."""
    load: Facts
    """Arrivals, dataset, lengths, seed, command line."""
    environment: dict[str, str | int]
    """Machine, CPUs, Python, versions."""
    window: tuple[float, float]
    """Begin and end of the steady state; ramp-up lies before it and drain after."""
    requests: tuple[RequestRecord, ...]
    overhead: ClientOverhead | None = None
    samples: tuple[tuple[float, int, int], ...] = ()
    """Time, and how many requests ran and waited, about twice a second."""
    slo: Slo = {}


class SweepRecord(Struct, frozen=True, kw_only=True, tag_field="kind", tag="sweep"):
    """Runs that differ in how much load they make."""

    version: int = FORMAT
    name: str
    parameter: Literal["rate", "concurrency"]
    """What differs: requests per second, or requests at once."""
    runs: tuple[tuple[float, RunRecord], ...]
    """Each with its value of the parameter, in the order in which they were made."""
    slo: Slo
    capacity: float | None
    """The greatest value of the parameter at which the SLO was kept. None: none did."""


Record: TypeAlias = RunRecord | SweepRecord


def values_of(record: Record) -> list[tuple[float | None, RunRecord]]:
    """Its runs, each with its value of a sweep's parameter."""
    return [(None, record)] if isinstance(record, RunRecord) else [*record.runs]


def runs_of(record: Record) -> list[RunRecord]:
    """Its runs."""
    return [run for _, run in values_of(record)]
