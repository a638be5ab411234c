"""Replicas whose engines play a scripted model, and a board by which a test steers them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.types import Message

from mtpbatch import Engine
from mtpbatch.scaleout import EngineReplica
from mtpbatch.scaleout.passing import HttpRequest
from mtpbatch.testing import ScriptedBackend, StepGate, open_scripted_engine

ANSWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # each a token
HELD = "And it was held"


class Board:
    """Names that are set once, for processes to wait for each other."""

    def __init__(self) -> None:
        self._events: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def set(self, name: str) -> None:
        self._events[name].set()

    async def wait(self, name: str) -> None:
        await self._events[name].wait()


class _Gate(StepGate):
    """As long as it takes: the machine may be busy."""

    def _pass(self) -> None:
        self._reached.set()
        self._released.wait()


class _Backend(ScriptedBackend):
    """One token a step. Sets "held" when a step is held, and "cancelled"."""

    def __init__(
        self, board: Any, n_seq: int, hold: int | None, die: int | None, *, restarts: bool
    ) -> None:
        super().__init__(lambda _: ANSWER, n_seq=n_seq, n_draft_max=0, snapshot_memory=0)
        self._board = board
        self.gate = _Gate()
        if hold is not None:
            self._gates[hold] = self.gate
        if die is not None and restarts:
            self.die_in_step(die)
        elif die is not None:
            self.fail_step(die, RuntimeError("scripted death"))

    def cancel(self, ticket: int) -> None:
        super().cancel(ticket)
        self._board.set.remote("cancelled")


class ScriptedReplica(EngineReplica):
    """Answers the alphabet. Holds one step until "release" is set, or dies of one; if it
    ``restarts``, only its model does."""

    async def __init__(  # type: ignore[misc]
        self,
        board: Any,
        n_seq: int = 4,
        hold: int | None = None,
        die: int | None = None,
        restarts: bool = False,
    ) -> None:
        self._backend = _Backend(board, n_seq, hold, die, restarts=restarts)
        self._board = board
        await super().__init__()
        self._helper = asyncio.create_task(self._tell_and_hear())

    async def n_steps(self) -> int:
        return self._backend.n_steps

    async def advance(self, seconds: float) -> None:
        self._backend.clock.advance(seconds)

    def _open(
        self, model: str | None, config: dict[str, Any]
    ) -> AbstractAsyncContextManager[Engine]:
        return open_scripted_engine(self._backend)

    async def _tell_and_hear(self) -> None:
        await self._backend.gate.reached()
        self._board.set.remote("held")
        await self._board.wait.remote("release")
        self._backend.gate.release()


class PlainReplica(EngineReplica):
    """The real one, which tells its threads."""

    async def n_threads(self) -> int | None:
        return self._engine.config.n_threads


class HoldingReplica(EngineReplica):
    """The real one, but that the answer to ``HELD`` stays where it has begun."""

    async def answer(self, request: HttpRequest) -> AsyncIterator[list[Message]]:
        async for messages in super().answer(request):
            for message in messages:
                yield [message]
                if HELD.encode() in request.body and message.get("body"):
                    await asyncio.Future()
