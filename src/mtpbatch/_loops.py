"""Reaching event loops from other threads: asyncio, uvloop and trio alike.

Nothing here ever waits for a loop: a call is handed over, or the loop is gone.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    import trio.lowlevel

_Args = TypeVarTuple("_Args")
_Item = TypeVar("_Item")


class LoopEvent(Protocol):
    """What asyncio's and trio's events have in common."""

    def set(self) -> object: ...
    async def wait(self) -> object: ...


class EventLoop(NamedTuple):
    """One running event loop. Equal to another if both are the same loop."""

    call_soon: Callable[..., Any]
    """Its own method, for calls from any thread."""
    is_closed: Callable[[], bool]
    """Whether it has ended, from any thread."""
    event: Callable[[], LoopEvent]
    """A new event that tasks on this loop can wait for, and that is set on this loop.

    The loop's own kind: a stream makes one for each wait, and anyio's takes twice as long."""

    @classmethod
    def current(cls) -> EventLoop:
        """The loop that runs in this thread. Raises :class:`RuntimeError` if none does."""
        # Only a program that imported trio can be running under it. It is asked first: in its
        # guest mode an asyncio loop runs beneath.
        if "trio" in sys.modules:
            import trio

            if trio.lowlevel.in_trio_run():
                token = trio.lowlevel.current_trio_token()
                return cls(token.run_sync_soon, _TrioRunFinished(token), trio.Event)
        loop = asyncio.get_running_loop()
        return cls(loop.call_soon_threadsafe, loop.is_closed, asyncio.Event)

    def post(self, call: Callable[[*_Args], object], *args: *_Args) -> bool:
        """Have ``call`` run on the loop soon, in the order posted; ``False`` if it is closed.

        From any thread. ``call`` must not raise: under trio that would end the whole run.
        """
        try:
            self.call_soon(call, *args)
        except RuntimeError:  # also trio.RunFinishedError
            return False
        return True


@dataclass(frozen=True)
class _TrioRunFinished:
    """Trio tells whether a run has finished only to who posts."""

    token: trio.lowlevel.TrioToken

    def __call__(self) -> bool:
        try:
            self.token.run_sync_soon(_nothing, idempotent=True)
        except RuntimeError:
            return True
        return False


def _nothing() -> None: ...


class Mailbox(Generic[_Item]):
    """What a thread has for an event loop: all that has come since the loop looked last, at once.

    A loop that is behind is not woken again. To wake it is a system call, for which the GIL is
    given up for so short a time that nobody else gets it; but each time a thread that waits for it,
    such as the loop's own, begins to wait anew. With one wake-up for each item a busy sender would
    keep the loop from ever catching up.
    """

    def __init__(self, loop: EventLoop, take: Callable[[list[_Item]], object]) -> None:
        """``take`` is called on the loop, with the items in their order; it must not raise."""
        self._loop = loop
        self._take = take
        self._lock = threading.Lock()
        self._items: list[_Item] = []
        self._posted = False

    @property
    def closed(self) -> bool:
        """Whether the loop is, so that nobody will look again."""
        return self._loop.is_closed()

    def put(self, items: list[_Item]) -> None:
        """Have the loop take these soon, unless it is closed. From any thread."""
        with self._lock:
            self._items += items
            posted, self._posted = self._posted, True
        if not posted:
            self._loop.post(self._hand_over)

    def _hand_over(self) -> None:
        with self._lock:
            items, self._items = self._items, []
            self._posted = False
        self._take(items)


class ThreadEvent:
    """An event that any thread sets, once, and tasks on any number of loops wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._waiters: dict[LoopEvent, EventLoop] = {}

    def set(self) -> None:
        with self._lock:
            self._set = True
            waiters, self._waiters = self._waiters, {}
        for event, loop in waiters.items():
            loop.post(event.set)

    def is_set(self) -> bool:
        return self._set

    async def wait(self) -> None:
        with self._lock:
            if self._set:
                return
            loop = EventLoop.current()
            event = loop.event()
            self._waiters[event] = loop
        try:
            await event.wait()
        finally:
            with self._lock:  # nothing is kept of who is cancelled
                self._waiters.pop(event, None)
