"""Reaching event loops from other threads: asyncio, uvloop and trio alike.

Nothing here ever waits for a loop: a call is handed over, or the loop is gone.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVarTuple

import anyio

_Args = TypeVarTuple("_Args")


class EventLoop:
    """One running event loop. Equal to another if both are the same loop."""

    __slots__ = ("_call_soon", "_native")

    def __init__(self, native: object, call_soon: Callable[..., Any]) -> None:
        self._native = native
        self._call_soon = call_soon

    @classmethod
    def current(cls) -> EventLoop:
        """The loop that runs in this thread. Raises :class:`RuntimeError` if none does."""
        # Only a program that imported trio can be running under it. It is asked first: in its
        # guest mode an asyncio loop runs beneath.
        if "trio" in sys.modules:
            import trio

            if trio.lowlevel.in_trio_run():
                token = trio.lowlevel.current_trio_token()
                return cls(token, token.run_sync_soon)
        loop = asyncio.get_running_loop()
        return cls(loop, loop.call_soon_threadsafe)

    def post(self, call: Callable[[*_Args], object], *args: *_Args) -> bool:
        """Have ``call`` run on the loop soon, in the order posted; ``False`` if it is closed.

        From any thread. ``call`` must not raise: under trio that would end the whole run.
        """
        try:
            self._call_soon(call, *args)
        except RuntimeError:  # also trio.RunFinishedError
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EventLoop) and self._native is other._native

    def __hash__(self) -> int:
        return id(self._native)


class ThreadEvent:
    """An event that any thread sets, once, and tasks on any number of loops wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._waiters: list[tuple[EventLoop, anyio.Event]] = []

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
            event = anyio.Event()
            self._waiters.append((EventLoop.current(), event))
        await event.wait()
