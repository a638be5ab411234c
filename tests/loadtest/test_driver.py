"""A load is made as it was asked for. Time is virtual: it passes when everybody waits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import trio
import trio.testing

from mtpbatch.loadtest.answer import Answer, RequestFailed
from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop, Level, OpenLoop, Replay
from mtpbatch.loadtest.datasets import Work
from mtpbatch.loadtest.driver import Load, Observed, Run
from mtpbatch.loadtest.overhead import doubts, quantile
from mtpbatch.loadtest.records import ClientOverhead, Facts, RequestRecord
from mtpbatch.loadtest.steady import steady_window, whole_run

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    """trio alone has a clock that can be played."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Played:
    """A target that takes its time: ``ttft`` seconds, then ``itl`` for each token."""

    name = "played"

    def __init__(
        self,
        ttft: float = 0.5,
        itl: float = 0.1,
        *,
        n_seq: float = math.inf,
        fails: Callable[[int], bool] = lambda index: False,
        finish_reason: str = "length",
    ) -> None:
        self.ttft, self.itl, self.fails = ttft, itl, fails
        self.finish_reason = finish_reason
        self.room = anyio.CapacityLimiter(n_seq)
        self.facts: Facts = {}
        self.under_way = self.most = 0
        self.freed: list[int] = []

    async def ask(self, index: int, work: Work, answer: Answer) -> None:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        answer.begin()
        try:
            async with self.room:
                await anyio.sleep(self.ttft)
                for token in range(work.max_tokens):
                    if token:
                        await anyio.sleep(self.itl)
                    answer.receive(1)
                    if self.fails(index):
                        raise RequestFailed("broken stream", "as it was told to")
                answer.finish_reason = self.finish_reason
                answer.output_tokens = work.max_tokens
        finally:
            self.under_way -= 1
            self.freed.append(index)


def work(max_tokens: int = 6, cancel_after: int | None = None) -> Work:
    return Work(prompt="x", prompt_tokens=None, max_tokens=max_tokens, cancel_after=cancel_after)


def run_of(
    target: Played,
    arrivals: Arrivals,
    *works: Work,
    n_requests: int | None = None,
    seconds: float | None = None,
    timeout: float = 100.0,
) -> Run:
    load = Load(arrivals=arrivals, n_requests=n_requests, seconds=seconds, timeout=timeout)
    return Run(target, load, itertools.cycle(works or [work()]), clock=trio.current_time)


def clients(n: float, end: float | None = None, seconds: float = 0.0) -> ClosedLoop:
    return ClosedLoop(Level(n, n if end is None else end, seconds))


def evenly(rate: float) -> OpenLoop:
    return OpenLoop(Level(rate, rate), math.inf)


def figures(observed: Observed, name: str) -> list[Any]:
    return [getattr(request, name) for request in observed.requests]


# ------------------------------------------------------------------------------- sending


async def test_open_loop_requests_never_wait_for_answers() -> None:
    """The target has room for one at a time, and needs a second for each."""
    target = Played(n_seq=1)
    observed = await run_of(target, evenly(10), n_requests=30)()
    times = [index / 10 for index in range(30)]
    assert figures(observed, "scheduled") == pytest.approx(times)
    assert figures(observed, "sent") == pytest.approx(times)
    assert figures(observed, "ended") == pytest.approx([1.0 + index for index in range(30)])


async def test_a_closed_loop_has_so_many_under_way_and_no_more() -> None:
    target = Played()
    observed = await run_of(target, clients(4), n_requests=12)()
    assert target.most == 4
    assert figures(observed, "sent") == pytest.approx([0.0] * 4 + [1.0] * 4 + [2.0] * 4)
    assert figures(observed, "index") == list(range(12))


async def test_clients_become_more_and_fewer() -> None:
    rising = await run_of(Played(), clients(1, 5, 8.0), seconds=12.0)()
    falling = await run_of(Played(), clients(5, 1, 8.0), seconds=12.0)()

    def under_way(observed: Observed, time: float) -> int:
        return sum(each.sent <= time < each.ended for each in observed.requests)

    # A client that is one too many ends its request, of a second, first.
    assert [under_way(rising, time) for time in (0.5, 2.5, 4.5, 8.5)] == [1, 2, 3, 5]
    assert [under_way(falling, time) for time in (0.5, 3.5, 5.5, 9.5)] == [5, 3, 2, 1]


async def test_a_trace_ends_with_its_last_request() -> None:
    observed = await run_of(Played(), Replay((0.0, 0.25, 7.0)), n_requests=5)()
    assert figures(observed, "sent") == pytest.approx([0.0, 0.25, 7.0])


async def test_requests_are_sent_for_so_long_and_those_under_way_are_waited_for() -> None:
    observed = await run_of(Played(), evenly(1), seconds=3.0)()
    assert figures(observed, "sent") == pytest.approx([0.0, 1.0, 2.0])
    assert figures(observed, "outcome") == ["ok"] * 3


async def test_a_load_ends_where_the_dataset_does() -> None:
    load = Load(arrivals=clients(2), n_requests=9, seconds=None, timeout=9)
    observed = await Run(Played(), load, iter([work()] * 3), clock=trio.current_time)()
    assert len(observed.requests) == 3


# ------------------------------------------------------------------------ what is observed


async def test_each_request_is_written_down_as_it_was() -> None:
    observed = await run_of(Played(0.5, 0.1), evenly(2), work(3), n_requests=2)()
    [_, second] = observed.requests
    assert second == RequestRecord(
        index=1,
        scheduled=0.5,
        sent=0.5,
        prompt_tokens=None,
        output_tokens=3,
        chunks=((1.0, 1), (1.1, 1), (1.2, 1)),
        ended=1.2,
        outcome="ok",
        finish_reason="length",
    )


async def test_a_request_is_cancelled_when_so_many_tokens_have_come() -> None:
    works = [work(6), work(6, cancel_after=2), work(6, cancel_after=0)]
    target = Played()
    observed = await run_of(target, clients(3), *works, n_requests=3)()
    assert figures(observed, "outcome") == ["ok", "cancelled", "cancelled"]
    assert figures(observed, "output_tokens") == [6, 2, 0]
    assert figures(observed, "ended") == pytest.approx([1.0, 0.6, 0.0])
    assert figures(observed, "error") == [None] * 3
    assert target.under_way == 0


async def test_a_failure_is_counted_by_its_kind_and_others_go_on() -> None:
    run = run_of(Played(fails=lambda index: index == 1), clients(1), n_requests=4)
    observed = await run()
    assert figures(observed, "outcome") == ["ok", "error", "ok", "ok"]
    failed = observed.requests[1]
    assert (failed.error, failed.output_tokens) == ("broken stream", 1)
    assert run.tally.errors == {"broken stream": 1}
    assert run.tally.examples == {"broken stream": "as it was told to"}


async def test_a_request_that_takes_too_long_is_an_error() -> None:
    observed = await run_of(Played(), evenly(1), work(50), n_requests=1, timeout=2.05)()
    [late] = observed.requests
    assert (late.outcome, late.error, late.ended) == ("error", "timeout", 2.05)
    assert late.output_tokens == len(late.chunks) == 16  # one at 0.5 s, and so on


@pytest.mark.parametrize("reason", ["abort", "timeout", "error"])
async def test_what_the_server_gave_up_is_an_error(reason: str) -> None:
    observed = await run_of(Played(finish_reason=reason), clients(1), n_requests=1)()
    assert figures(observed, "outcome") == ["error"]
    assert figures(observed, "error") == [reason]


async def test_a_run_that_is_stopped_leaves_what_there_is_and_frees_the_rest() -> None:
    target = Played()
    run = run_of(target, clients(3), n_requests=100)

    async def stop() -> None:
        await anyio.sleep(2.55)
        run.stop()

    async with anyio.create_task_group() as group:
        group.start_soon(stop)
        observed = await run()
    assert observed.interrupted
    assert figures(observed, "outcome") == ["ok"] * 6 + ["cancelled"] * 3
    assert {request.error for request in observed.requests[6:]} == {"interrupted"}
    assert {request.ended for request in observed.requests[6:]} == {2.55}
    assert target.under_way == 0


async def test_samples_say_how_many_run_and_wait() -> None:
    observed = await run_of(Played(0.6, 0.1, n_seq=2), clients(3), work(11), n_requests=3)()
    sampled = {time: counts for time, *counts in observed.samples}
    assert sampled[0.5] == [0, 3]
    assert sampled[1.0] == [2, 1]
    assert sampled[2.0] == [0, 1]
    assert list(sampled) == pytest.approx([0.5 * i for i in range(len(sampled))])


async def test_lateness_of_sending_is_measured() -> None:
    """The dataset blocks the event loop for 0.2 s at its fifth prompt."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)

    def slow() -> Any:
        for index in itertools.count():
            if index == 4:
                clock.jump(0.2)
            yield work()

    load = Load(arrivals=evenly(10), n_requests=10, seconds=None, timeout=9)
    observed = await Run(Played(), load, slow(), clock=trio.current_time)()
    late = [each.sent - each.scheduled for each in observed.requests]
    assert late == pytest.approx([0.0] * 4 + [0.15, 0.05] + [0.0] * 4)
    assert observed.overhead.send_late_p99 == pytest.approx(0.15)
    assert observed.overhead.loop_lag_p99 > 0.05
    assert doubts(observed.overhead)


# -------------------------------------------------------------------------- steady state


async def test_the_window_of_a_closed_loop_lies_between_first_ends_and_the_last_request() -> None:
    observed = await run_of(Played(n_seq=3), clients(4), n_requests=16)()
    first = [request.ended for request in observed.requests[:4]]
    assert observed.window == pytest.approx((max(first), max(figures(observed, "sent"))))
    assert observed.steady


async def test_clients_that_go_in_step_do_so_for_whole_rounds() -> None:
    """Else a round's prefill would be missing, and the rate too high."""
    observed = await run_of(Played(), clients(4), work(6), n_requests=16)()
    begin, end = observed.window
    tokens = sum(begin < time <= end for each in observed.requests for time, _ in each.chunks)
    assert tokens / (end - begin) == pytest.approx(4 * 6 / 1.0)


async def test_the_window_of_an_open_loop_begins_when_requests_end_as_fast_as_they_come() -> None:
    observed = await run_of(Played(), evenly(4), n_requests=20)()
    assert observed.window == pytest.approx((1.0, 19 / 4))


def request(sent: float, ended: float, outcome: Any = "ok") -> RequestRecord:
    return RequestRecord(
        index=0,
        scheduled=sent,
        sent=sent,
        prompt_tokens=None,
        output_tokens=1,
        chunks=((ended, 1),),
        ended=ended,
        outcome=outcome,
    )


def test_too_few_requests_have_no_steady_state() -> None:
    burst = [request(0.0, 1.0 + i) for i in range(5)]
    assert steady_window(burst, OpenLoop(Level(math.inf, math.inf)), 0.0) is None
    assert whole_run(burst) == (0.0, 5.0)
    cut_short = [request(0.0, 1.0), request(2.0, 3.0, "cancelled")]
    assert steady_window(cut_short, evenly(0.5), 0.0) is None
    two_rounds = [request(i / 8, 1.0 + i / 8) for i in range(8)]
    two_rounds += [request(1.0 + i / 8, 2.0) for i in range(8)]
    assert steady_window(two_rounds, clients(8), 0.0) is None  # but one lies before all have ended
    assert steady_window([], evenly(1), 0.0) is None
    assert whole_run([]) == (0.0, 0.0)


async def test_without_a_steady_state_the_whole_run_counts() -> None:
    observed = await run_of(Played(), OpenLoop(Level(math.inf, math.inf)), n_requests=3)()
    assert not observed.steady
    assert observed.window == (0.0, max(figures(observed, "ended")))


def test_a_warm_up_delays_the_window() -> None:
    requests = [request(float(i), i + 0.5) for i in range(10)]
    assert steady_window(requests, evenly(1), 0.0) == (0.5, 9.0)
    assert steady_window(requests, evenly(1), 4.0) == (4.0, 9.0)


# -------------------------------------------------------------------------------- overhead


def test_the_clients_cost_is_doubted_only_where_it_can_matter() -> None:
    fine = ClientOverhead(
        cpu_seconds=5, wall_seconds=10, loop_lag_p50=0.001, loop_lag_p99=0.009, send_late_p99=0.009
    )
    assert doubts(fine) == []
    for name, value, words in (
        ("loop_lag_p99", 0.02, "20 ms late"),
        ("send_late_p99", 0.03, "sent 30 ms late"),
        ("cpu_seconds", 9.0, "90% of a CPU"),
    ):
        [doubt] = doubts(
            ClientOverhead(**{f: getattr(fine, f) for f in fine.__struct_fields__} | {name: value})
        )
        assert words in doubt


def test_a_quantile_is_the_least_figure_that_so_many_do_not_exceed() -> None:
    assert quantile([], 0.5) == 0
    assert quantile([3, 1, 2], 0.5) == 2
    assert [quantile(list(range(1, 101)), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
