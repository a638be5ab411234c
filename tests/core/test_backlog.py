"""The bounded queue's rules, against a plain list of requests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mtpbatch.backlog import Backlog
from mtpbatch.exceptions import EngineOverloaded, InternalError
from mtpbatch.sequence import Sequence
from mtpbatch.testing import ScriptedBackend
from scheduling import make_sequence

BACKEND = ScriptedBackend()
NUMBERS = itertools.count()


def request(n_tokens: int) -> Sequence:
    return make_sequence(BACKEND, f"r{next(NUMBERS)}", [65] * n_tokens)


@dataclass
class Known:
    sequence: Sequence
    entered: bool = False
    begun: bool = False


class BacklogMachine(RuleBasedStateMachine):
    """Requests come and wait or go away, begin, and end wherever they are."""

    @initialize(
        n_seq=st.integers(1, 3),
        max_waiting=st.none() | st.integers(0, 4),
        max_waiting_tokens=st.none() | st.integers(0, 12),
    )
    def open(self, n_seq: int, max_waiting: int | None, max_waiting_tokens: int | None) -> None:
        self.n_seq, self.max_waiting, self.max_tokens = n_seq, max_waiting, max_waiting_tokens
        self.backlog = Backlog(n_seq, max_waiting, max_waiting_tokens)
        self.known: dict[str, Known] = {}  # in the order in which they came

    def has_room(self, n_tokens: int) -> bool:
        """The documented rule, counted anew."""
        entered = [known for known in self.known.values() if known.entered]
        if len(entered) < self.n_seq:
            return True
        if self.max_waiting is not None and len(entered) >= self.n_seq + self.max_waiting:
            return False
        waiting = sum(len(known.sequence.prompt) for known in entered if not known.begun)
        return self.max_tokens is None or waiting + n_tokens <= self.max_tokens

    def line(self) -> list[Known]:
        return [known for known in self.known.values() if not known.entered]

    @rule(n_tokens=st.integers(1, 9), waits=st.booleans())
    def come(self, n_tokens: int, waits: bool) -> None:
        sequence = request(n_tokens)
        may_enter = not self.line() and self.has_room(n_tokens)
        assert self.backlog.enter(sequence) == may_enter
        if may_enter or waits:
            self.known[sequence.request_id] = Known(sequence, entered=may_enter)
        if not may_enter and waits:
            self.backlog.stand_in_line(sequence)

    @precondition(lambda self: any(known.entered for known in self.known.values()))
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        names = [name for name, known in self.known.items() if known.entered]
        name = data.draw(st.sampled_from(names))  # perhaps one that had to start again
        self.backlog.begin(name)
        self.known[name].begun = True
        self.move_up()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        known = self.known.pop(name)
        assert self.backlog.leave(name) is (None if known.entered else known.sequence)
        assert self.backlog.leave(name) is None
        self.move_up()

    def move_up(self) -> None:
        """As the engine does after each of these."""
        for sequence in self.backlog.move_up():
            first = self.line()[0]
            assert sequence is first.sequence, "first come, first served"
            assert self.has_room(len(sequence.prompt))
            first.entered = True
        line = self.line()
        assert not line or not self.has_room(len(line[0].sequence.prompt)), "no room is left idle"

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "backlog"):
            self.backlog.check_integrity()
            assert len(self.backlog) == len(self.known)
            n_entered = sum(known.entered for known in self.known.values())
            assert self.max_waiting is None or n_entered <= self.n_seq + self.max_waiting

    def teardown(self) -> None:
        """Everybody gets in, in the end: no room was lost."""
        while hasattr(self, "backlog") and self.known:
            name = next(name for name, known in self.known.items() if known.entered)
            del self.known[name]
            self.backlog.leave(name)
            self.move_up()
        if hasattr(self, "backlog"):
            assert self.backlog._n_tokens == self.backlog._n_begun == 0


def test_any_order_of_calls_keeps_to_the_rules() -> None:
    run_state_machine_as_test(
        BacklogMachine, settings=settings(max_examples=150, stateful_step_count=40)
    )


def test_who_finds_a_sequence_free_enters_however_long_its_prompt_is() -> None:
    backlog = Backlog(2, max_waiting=0, max_waiting_tokens=0)
    one, two, three = (request(100) for _ in range(3))
    assert backlog.enter(one)
    assert backlog.enter(two)
    assert not backlog.enter(three)


def test_a_long_prompt_is_not_overtaken_by_short_ones() -> None:
    backlog = Backlog(1, max_waiting_tokens=10)
    running, long, short = request(5), request(11), request(1)
    assert backlog.enter(running)
    backlog.begin(running.request_id)
    assert not backlog.enter(long)
    backlog.stand_in_line(long)
    assert not backlog.enter(short), "though it would fit"
    backlog.stand_in_line(short)
    assert backlog.move_up() == []
    backlog.leave(running.request_id)
    assert backlog.move_up() == [long], "the short one would make the waiting 12 tokens"
    backlog.begin(long.request_id)
    assert backlog.move_up() == [short]


def test_the_error_has_the_figures_of_the_moment() -> None:
    backlog = Backlog(1, max_waiting=2, max_waiting_tokens=50)
    running, waiting, in_line = request(7), request(20), request(40)
    assert backlog.enter(running)
    backlog.begin(running.request_id)
    assert backlog.enter(waiting)
    assert not backlog.enter(in_line)
    backlog.stand_in_line(in_line)
    error = backlog.reject(4)  # one of them is still tokenised
    assert isinstance(error, EngineOverloaded)
    assert (error.running, error.waiting, error.waiting_tokens) == (1, 3, 60)
    assert (error.max_waiting, error.max_waiting_tokens) == (2, 50)
    for words in ("1 requests run", "3 wait", "60 tokens", "max_waiting=2", 'on_full="wait"'):
        assert words in str(error)


def test_a_request_comes_once() -> None:
    backlog = Backlog(1)
    one = request(3)
    assert backlog.enter(one)
    with pytest.raises(InternalError, match="comes twice"):
        backlog.enter(one)


def test_check_integrity_notices_what_is_wrong() -> None:
    backlog = Backlog(1)
    assert backlog.enter(request(3))
    backlog.check_integrity()
    backlog._n_tokens += 1
    with pytest.raises(InternalError, match="tokens add up"):
        backlog.check_integrity()
    backlog._n_tokens -= 1
    backlog._n_begun += 1
    with pytest.raises(InternalError, match="how many have begun"):
        backlog.check_integrity()
    backlog = Backlog(1)
    backlog.stand_in_line(request(3))
    with pytest.raises(InternalError, match="idle engine"):
        backlog.check_integrity()
