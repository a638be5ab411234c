"""When requests are given up, against a table that is searched from end to end."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mtpbatch.exceptions import InternalError
from mtpbatch.timeouts import Timeouts
from mtpbatch.types import SamplingParams

SECONDS = st.none() | st.integers(1, 40).map(lambda n: n / 4)


class TimeoutsMachine(RuleBasedStateMachine):
    """Requests come, begin and end, and time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts = Timeouts()
        self.now = 0.0
        self.n_requests = 0
        self.queue: dict[str, float] = {}
        self.total: dict[str, float] = {}

    @rule(timeout=SECONDS, queue_timeout=SECONDS)
    def add(self, timeout: float | None, queue_timeout: float | None) -> None:
        request_id = f"r{self.n_requests}"
        self.n_requests += 1
        params = SamplingParams(timeout=timeout, queue_timeout=queue_timeout)
        self.timeouts.add(request_id, params, self.now)
        self.total[request_id] = self.now + (timeout or math.inf)
        self.queue[request_id] = self.now + (queue_timeout or math.inf)

    @precondition(lambda self: self.total)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.total)))
        self.timeouts.begin(request_id)
        self.queue[request_id] = math.inf

    @precondition(lambda self: self.total)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.forget(data.draw(st.sampled_from(sorted(self.total))))

    @rule(seconds=st.integers(0, 20).map(lambda n: n / 4))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        overdue = {r for r in self.total if self.at(r) <= self.now}
        expired = self.timeouts.expired(self.now)
        assert sorted(expired) == sorted(overdue)
        assert expired == sorted(expired, key=self.at), "first things first"
        assert self.timeouts.expired(self.now) == []
        for request_id in expired:
            self.forget(request_id)

    def forget(self, request_id: str) -> None:
        self.timeouts.remove(request_id)
        del self.total[request_id], self.queue[request_id]

    def at(self, request_id: str) -> float:
        return min(self.queue[request_id], self.total[request_id])

    @invariant()
    def agrees(self) -> None:
        self.timeouts.check_integrity()
        times = [self.at(request_id) for request_id in self.total]
        assert self.timeouts.next == min(times, default=math.inf)
        assert len(self.timeouts) == sum(at < math.inf for at in times)


def test_any_order_of_calls_gives_the_times_of_a_plain_table() -> None:
    run_state_machine_as_test(
        TimeoutsMachine, settings=settings(max_examples=100, stateful_step_count=40)
    )


def test_requests_that_end_are_not_kept() -> None:
    timeouts = Timeouts()
    for number in range(1000):
        timeouts.add(f"r{number}", SamplingParams(timeout=1.0 + number), 0.0)
    for number in range(5, 1000):
        timeouts.remove(f"r{number}")
        timeouts.check_integrity()
    assert len(timeouts._heap) <= 10


def test_who_has_no_timeout_costs_nothing() -> None:
    timeouts = Timeouts()
    timeouts.add("r", SamplingParams(), 0.0)
    timeouts.begin("r")
    timeouts.remove("r")
    assert timeouts._n_pushed == 0


def test_a_request_has_its_timeouts_once() -> None:
    timeouts = Timeouts()
    timeouts.add("r", SamplingParams(timeout=1), 0.0)
    with pytest.raises(InternalError, match="already"):
        timeouts.add("r", SamplingParams(timeout=1), 0.0)


def test_check_integrity_notices_what_is_wrong() -> None:
    timeouts = Timeouts()
    for number in range(3):
        timeouts.add(f"r{number}", SamplingParams(timeout=1.0 + number), 0.0)
    timeouts.check_integrity()
    timeouts._heap.reverse()
    with pytest.raises(InternalError, match="the first one is first"):
        timeouts.check_integrity()
    timeouts._heap.pop()
    with pytest.raises(InternalError, match="in the heap once"):
        timeouts.check_integrity()
