"""The order of waiting requests, against a list that is searched from end to end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mtpbatch.exceptions import InternalError
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import DraftWish
from mtpbatch.text import TextAssembler
from mtpbatch.types import SamplingParams
from mtpbatch.waiting import WaitingQueue

TICKETS = itertools.count(1)

PRIORITIES = st.integers(-100, 100)
DEADLINES = st.none() | st.floats(0.001, 1e6)


def request(submitted: float = 0.0, **params: Any) -> Sequence:
    ticket = next(TICKETS)
    return Sequence(
        f"r{ticket}",
        ticket,
        (65,),
        SamplingParams(**params),
        seed=0,
        max_tokens=1,
        wish=DraftWish(0, adaptive=False),
        n_draft_max=0,
        followed=False,
        assembler=TextAssembler([b""]),
        submitted=submitted,
    )


def key(sequence: Sequence) -> tuple[float, int]:
    """The rule as the documentation has it, in figures."""
    seconds = 60.0 + 10.0 * sequence.params.priority
    if sequence.params.deadline is not None and sequence.params.deadline < seconds:
        seconds = sequence.params.deadline
    return sequence.submitted + seconds, sequence.ticket


def drained(queue: WaitingQueue) -> list[Sequence]:
    return [queue.pop() for _ in range(len(queue))]


class QueueMachine(RuleBasedStateMachine):
    """Requests come, leave, are taken and are put back."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.waiting: list[Sequence] = []
        self.aside: dict[str, int] = {}
        self.taken: list[Sequence] = []

    @rule(submitted=st.integers(0, 300), priority=PRIORITIES, deadline=DEADLINES)
    def push(self, submitted: int, priority: int, deadline: float | None) -> None:
        sequence = request(submitted / 4, priority=priority, deadline=deadline)
        self.queue.push(sequence)
        self.waiting.append(sequence)

    @property
    def in_line(self) -> list[Sequence]:
        return [sequence for sequence in self.waiting if sequence.request_id not in self.aside]

    @precondition(lambda self: self.in_line)
    @rule(reason=st.integers(0, 2))
    def set_aside(self, reason: int) -> None:
        self.aside[min(self.in_line, key=key).request_id] = reason
        self.queue.set_aside(reason)

    @rule(reason=st.integers(0, 2))
    def bring_back(self, reason: int) -> None:
        self.queue.bring_back(reason)
        self.aside = {id_: r for id_, r in self.aside.items() if r != reason}

    @precondition(lambda self: self.in_line)
    @rule()
    def pop(self) -> None:
        first = min(self.in_line, key=key)
        assert self.queue.pop() is first
        self.waiting.remove(first)
        self.taken.append(first)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.waiting))
        assert self.queue.remove(sequence.request_id) is sequence
        assert self.queue.remove(sequence.request_id) is None
        self.aside.pop(sequence.request_id, None)
        self.waiting.remove(sequence)
        self.taken.append(sequence)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.taken))
        self.queue.push(sequence)
        self.taken.remove(sequence)
        self.waiting.append(sequence)

    @invariant()
    def agrees(self) -> None:
        self.queue.check_integrity()
        assert self.queue.first is min(self.in_line, key=key, default=None)
        assert self.queue.reasons >= set(self.aside.values())
        assert len(self.queue) == len(self.waiting)
        assert sorted(self.queue, key=key) == sorted(self.waiting, key=key)
        assert all(s.request_id in self.queue for s in self.waiting)
        assert not any(s.request_id in self.queue for s in self.taken)

    def teardown(self) -> None:
        for reason in range(3):
            self.queue.bring_back(reason)
        assert drained(self.queue) == sorted(self.waiting, key=key)


def test_any_order_of_calls_gives_the_order_of_a_plain_list() -> None:
    run_state_machine_as_test(
        QueueMachine, settings=settings(max_examples=100, stateful_step_count=40)
    )


@given(
    victim=st.tuples(PRIORITIES, DEADLINES),
    gaps=st.floats(0.5, 50.0),
    others=st.lists(st.tuples(PRIORITIES, DEADLINES), min_size=1, max_size=6),
)
def test_nobody_waits_forever(
    victim: tuple[int, float | None],
    gaps: float,
    others: list[tuple[int, float | None]],
) -> None:
    """However urgent those are that keep coming, as fast as the engine takes them."""
    queue = WaitingQueue()
    waiting = request(0.0, priority=victim[0], deadline=victim[1])
    queue.push(waiting)
    for turn in itertools.count(1):
        priority, deadline = others[turn % len(others)]
        queue.push(request(turn * gaps, priority=priority, deadline=deadline))
        taken = queue.pop()
        if taken is waiting:
            break
        assert taken.submitted <= 2000.0, "only who comes soon after it can go before it"
    assert turn <= 2000.0 / gaps + 1


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ({}, {}),
        ({"priority": 3}, {"priority": 3}),
        ({"priority": -100}, {"priority": 100, "deadline": 1e9}),
        ({"deadline": 5.0}, {"deadline": 5.0}),
    ],
)
def test_first_come_first_served(early: dict[str, Any], late: dict[str, Any]) -> None:
    queue = WaitingQueue()
    requests = [request(1.0, **early), request(1.0, **early), request(1.5, **late)]
    for sequence in reversed(requests):
        queue.push(sequence)
    assert drained(queue) == requests


def test_a_level_of_priority_is_worth_ten_seconds() -> None:
    queue = WaitingQueue()
    low = request(0.0, priority=2)
    before, after = request(19.75), request(20.25)
    for sequence in (after, low, before):
        queue.push(sequence)
    assert drained(queue) == [before, low, after]


def test_a_deadline_brings_forward_and_never_back() -> None:
    queue = WaitingQueue()
    plain, soon, urgent = request(0.0), request(50.0, deadline=9.0), request(1.0, priority=-6)
    generous = request(0.5, deadline=1000.0)
    low = request(49.0, priority=50, deadline=9.5)
    for sequence in (plain, soon, urgent, generous, low):
        queue.push(sequence)
    assert drained(queue) == [urgent, low, soon, plain, generous]


def test_requests_that_leave_are_not_kept() -> None:
    queue = WaitingQueue()
    requests = [request(float(i)) for i in range(1000)]
    for sequence in requests:
        queue.push(sequence)
    for sequence in requests[5:]:
        assert queue.remove(sequence.request_id) is sequence
        queue.check_integrity()
    assert len(queue._heap) <= 10
    assert drained(queue) == requests[:5]


def test_a_request_waits_once() -> None:
    queue = WaitingQueue()
    sequence = request()
    queue.push(sequence)
    with pytest.raises(InternalError, match="waits already"):
        queue.push(sequence)


def test_check_integrity_notices_what_is_wrong() -> None:
    queue = WaitingQueue()
    for submitted in (3.0, 2.0, 1.0):
        queue.push(request(submitted))
    queue.check_integrity()
    queue._heap.reverse()
    with pytest.raises(InternalError, match="in order"):
        queue.check_integrity()
    queue._heap.reverse()
    next(iter(queue)).submitted = 9.0
    with pytest.raises(InternalError, match="due stays"):
        queue.check_integrity()
    queue._heap.pop()
    with pytest.raises(InternalError, match="one entry"):
        queue.check_integrity()
