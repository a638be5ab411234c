"""Handing things over to event loops, from other threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import anyio
import pytest

from mtpbatch._loops import EventLoop, Mailbox, ThreadEvent


class SlowLoop:
    """A loop that runs what was posted when it is told to."""

    def __init__(self) -> None:
        self.posted: list[Callable[[], object]] = []
        self.closed = False

    def call_soon(self, call: Callable[[], object]) -> None:
        if self.closed:
            raise RuntimeError("closed")
        self.posted.append(call)

    def run(self) -> None:
        posted, self.posted = self.posted, []
        for call in posted:
            call()

    def as_event_loop(self) -> EventLoop:
        return EventLoop(self.call_soon, lambda: self.closed, anyio.Event)


def test_a_loop_that_is_behind_is_woken_once_and_gets_everything_in_order() -> None:
    loop = SlowLoop()
    taken: list[list[int]] = []
    mailbox = Mailbox(loop.as_event_loop(), taken.append)
    for first in range(0, 1000, 2):
        mailbox.put([first, first + 1])
    assert len(loop.posted) == 1
    loop.run()
    assert taken == [list(range(1000))]
    mailbox.put([7])
    loop.run()
    assert taken[1:] == [[7]]


@pytest.mark.parametrize("behind", [False, True], ids=["idle", "behind"])
def test_a_closed_loop_is_noticed_also_while_it_owes_an_answer(behind: bool) -> None:
    loop = SlowLoop()
    mailbox = Mailbox[int](loop.as_event_loop(), lambda items: None)
    if behind:
        mailbox.put([1])
    assert not mailbox.closed
    loop.closed = True
    assert mailbox.closed
    mailbox.put([2])
    assert len(loop.posted) == behind


@pytest.mark.anyio
async def test_the_running_loop_knows_itself_and_takes_what_other_threads_put() -> None:
    loop = EventLoop.current()
    assert loop == EventLoop.current()
    assert not loop.is_closed()
    taken: list[int] = []
    done = anyio.Event()

    def take(items: list[int]) -> None:
        taken.extend(items)
        if len(taken) == 300:
            done.set()

    mailbox = Mailbox(loop, take)

    def send(first: int) -> None:
        for item in range(first, first + 100):
            mailbox.put([item])

    threads = [threading.Thread(target=send, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    await done.wait()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(300))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_has_ended_says_so(backend: str) -> None:
    async def main() -> EventLoop:
        return EventLoop.current()

    loop = anyio.run(main, backend=backend)
    assert loop.is_closed()
    mailbox = Mailbox[int](loop, lambda items: None)
    mailbox.put([1])
    assert mailbox.closed


@pytest.mark.anyio
async def test_an_event_keeps_nothing_of_who_waits_no_longer() -> None:
    event = ThreadEvent()
    kind = type(EventLoop.current().event())

    def n_kept() -> int:
        gc.collect()
        return sum(type(thing) is kind for thing in gc.get_objects())

    before = n_kept()
    for _ in range(100):
        with anyio.move_on_after(0):
            await event.wait()
    assert n_kept() < before + 50
