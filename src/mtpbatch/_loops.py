"""Reaching event loops from other threads: asyncio, uvloop and trio alike.

Nothing here ever waits for a loop: a call is handed over, or the loop is gone.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVarTuple

_Args = TypeVarTuple("_Args")


class LoopEvent(Protocol):
    """What asyncio's and trio's events have in common."""

    def set(self) -> object: ...
    async def wait(self) -> object: ...


class EventLoop(NamedTuple):
    """One running event loop. Equal to another if both are the same loop."""

    call_soon: Callable[..., Any]
    """Its own method, for calls from any thread."""
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
                return cls(trio.lowlevel.current_trio_token().run_sync_soon, trio.Event)
        return cls(asyncio.get_running_loop().call_soon_threadsafe, asyncio.Event)

    def post(self, call: Callable[[*_Args], object], *args: *_Args) -> bool:
        """Have ``call`` run on the loop soon, in the order posted; ``False`` if it is closed.

        From any thread. ``call`` must not raise: under trio that would end the whole run.
        """
        try:
            self.call_soon(call, *args)
        except RuntimeError:  # also trio.RunFinishedError
            return False
        return True


class ThreadEvent:
    """An event that any thread sets, once, and tasks on any number of loops wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._waiters: list[tuple[EventLoop, LoopEvent]] = []

    def set(self) -> None:
        with self._lock:
            self._set = True
            waiters, self._waiters = self._waiters, []
        for loop, event in waiters:
            loop.post(event.set)

    def is_set(self) -> bool:
        return self._set

    async def wait(self) -> None:
        with self._lock:
            if self._set:
                return
            loop = EventLoop.current()
            event = loop.event()
            self._waiters.append((loop, event))
        await event.wait()
