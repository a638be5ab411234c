"""What is measured is what happened, as the server itself writes it down.

The mock is a process of its own and tells when it sent what, by the clock that all processes of a
machine share.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence

import anyio
import msgspec

from mtpbatch.loadtest import datasets, mock
from mtpbatch.loadtest.arrivals import ClosedLoop, Level
from mtpbatch.loadtest.driver import Load, Observed, Run
from mtpbatch.loadtest.mock import Pace, Served
from mtpbatch.loadtest.openai_target import open_server
from mtpbatch.loadtest.records import RequestRecord
from mtpbatch.testing import Fixed

N = 8


class Measured:
    """A run against a mock, and what the mock says of it."""

    def __init__(
        self, pace: Pace, *, tokens: int, cancelled: float = 0.0, n: int = N, clients: int = 4
    ) -> None:
        self.began = 0.0

        async def measure(url: str) -> Observed:
            closed = ClosedLoop(Level(clients, clients))
            load = Load(arrivals=closed, n_requests=n, seconds=None, timeout=60)
            work = datasets.work(datasets.builtin(), Fixed(tokens), 1, cancelled, seed=1)
            async with open_server(url, chat=False, model=None, api_key=None, params={}) as target:
                self.run = Run(target, load, work)
                self.began = time.monotonic()
                return await self.run()

        with mock.running(pace) as url:
            self.observed = anyio.run(measure, url)
            with urllib.request.urlopen(f"{url}/truth") as truth:
                told = msgspec.json.decode(truth.read(), type=list[Served])
        by_id = {served.request_id: served for served in told}
        self.both: list[tuple[RequestRecord, Served]] = [
            (record, by_id[f"bench-{record.index}"]) for record in self.observed.requests
        ]


def per_token(times: Sequence[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def test_a_ttft_of_50_ms_and_an_itl_of_10_ms_are_measured_as_such() -> None:
    measured = Measured(Pace(ttft=0.05, itl=0.01), tokens=40, n=16)
    late, off = [], []
    for record, served in measured.both:
        assert record.outcome == "ok"
        assert record.output_tokens == len(record.chunks) == len(served.sent) == 40
        times = [time for time, _ in record.chunks]
        # Nothing is measured shorter than it was: the mock keeps its times, or is late.
        assert times[0] - record.sent >= 0.05
        assert served.sent[0] - served.received >= 0.05
        assert record.ended - record.sent >= 0.05 + 39 * 0.01
        late.append((times[0] - record.sent) - (served.sent[0] - served.received))
        off.append(abs(per_token(times) / per_token(served.sent) - 1))
    # On a busy machine some are late. What measuring itself adds, all of them have.
    assert 0 < min(late) < 0.02
    assert min(off) < 0.02


def test_times_lie_between_those_of_the_server() -> None:
    measured = Measured(Pace(ttft=0.02), tokens=3)
    for record, served in measured.both:
        assert measured.began + record.sent < served.received
        for (received, _), sent in zip(record.chunks, served.sent, strict=True):
            # The run begins a moment after the clock was read.
            assert sent < measured.began + received + 0.005


def test_chunks_of_several_tokens_come_as_chunks() -> None:
    measured = Measured(Pace(chunk=4), tokens=10)
    for record, served in measured.both:
        assert record.output_tokens == 10
        assert len(record.chunks) == len(served.sent) == 3


def test_who_cancels_closes_the_connection_and_the_server_notices() -> None:
    measured = Measured(Pace(ttft=0.01, itl=0.01), tokens=400, cancelled=1.0)
    for record, served in measured.both:
        assert record.outcome == "cancelled"
        assert not served.whole
        assert len(served.sent) < 400


def test_a_server_that_refuses_is_an_error_by_its_status() -> None:
    measured = Measured(Pace(fail=429), tokens=3)
    assert measured.run.tally.errors == {"http 429": N}
    assert "as it was told to" in measured.run.tally.examples["http 429"]
    assert {record.error for record in measured.observed.requests} == {"http 429"}


def test_a_connection_that_breaks_is_an_error_with_what_came_before() -> None:
    measured = Measured(Pace(break_after=2, itl=0.001), tokens=9)
    for record, _ in measured.both:
        assert (record.outcome, record.error) == ("error", "broken stream")
        assert record.output_tokens == 2


def test_five_thousand_tokens_a_second_in_256_streams_are_no_burden() -> None:
    """A bound, not a figure: that of an idle machine is in docs/load-testing.md."""
    tokens, streams = 40, 256
    observed = Measured(Pace(), tokens=tokens, n=streams, clients=streams).observed
    assert sum(record.output_tokens for record in observed.requests) == streams * tokens
    # In CPU time of the client's thread, which others on the machine do not change much.
    assert streams * tokens / observed.overhead.cpu_seconds > 5000
