"""An engine's thread and helpers that go on only when they are told to.

With them a test is one thread of control: while it does something the engine stands still inside
its backend, as it does while a native call runs, and the other way round.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Final

from mtpbatch import Engine
from mtpbatch.testing import ScriptedBackend
from mtpbatch.types import Plan, StepResult

_PATIENCE: Final = 60.0  # seconds, after which an engine that does not stop again has failed


class LockstepBackend(ScriptedBackend):
    """Stops the engine's thread at the begin of each exchange."""

    def __init__(self, script: Callable[[str], str] | None = None, **model: Any) -> None:
        super().__init__(script, **model)
        self.garble: Callable[[StepResult], StepResult] = lambda result: result
        """What is to be made of each result before the engine gets it."""
        self.offered: Plan | None = None
        """The plan with which the engine stands here."""
        self.idle = False
        """Whether there was nothing to do when it went on last."""
        self._halts: SimpleQueue[None] = SimpleQueue()
        self._goes: SimpleQueue[None] = SimpleQueue()

    def await_halt(self) -> None:
        """Wait until the engine's thread stands here, or has closed the backend."""
        self._halts.get(timeout=_PATIENCE)

    def turn(self) -> None:
        """Let the engine's thread go on, and wait until it stands here again."""
        if not self.closed:
            self._goes.put(None)
            self.await_halt()

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        self.offered = plan
        self._halts.put(None)
        self._goes.get()
        self.wake()  # nobody else would end its wait
        self.idle = False
        results = super().exchange(plan, wait=wait, timeout=timeout)
        self.idle = wait and not results
        return [self.garble(result) for result in results]

    def close(self) -> None:
        super().close()
        self._halts.put(None)


def let_run(loop: asyncio.AbstractEventLoop, n_looks: int = 4) -> None:
    """Let a loop do what is ready, and what becomes so by that."""

    async def look() -> None:
        for _ in range(n_looks):
            await asyncio.sleep(0)

    loop.run_until_complete(look())


def close_all(
    engine: Engine, backend: LockstepBackend, loops: Sequence[asyncio.AbstractEventLoop]
) -> None:
    """Close an engine, whatever it does, and the loops, whatever waits on them."""
    closing = loops[0].create_task(engine.aclose(0))
    while not backend.closed:
        let_run(loops[0])
        backend.turn()
    engine._thread.join()
    for loop in loops:
        tasks = asyncio.all_tasks(loop)
        for task in tasks - {closing}:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()


class Helpers:
    """Takes the place of a :class:`ThreadPoolExecutor`; works are done one by one, when told."""

    def __init__(self, n_threads: int, *, thread_name_prefix: str) -> None:
        self._works: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._works.append((future, work))
        return future

    def work(self) -> bool:
        """Do the first of what waits; ``False`` if nothing does."""
        while self._works:
            future, work = self._works.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
                return True
        return False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            for future, _ in self._works:
                future.cancel()
