"""Waiting for what another thread does, without a sleep."""

from __future__ import annotations

from collections.abc import Callable

import anyio.lowlevel


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads go on until it holds."""
    while not condition():
        await anyio.lowlevel.checkpoint()
