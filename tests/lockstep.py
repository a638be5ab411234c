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

from msgspec.structs import replace

from mtpbatch import Engine
from mtpbatch.testing import ScriptedBackend
from mtpbatch.types import NO_RESULT, EntryResult, Plan, StepResult, TokenLogprobs

_PATIENCE: Final = 60.0  # seconds, after which an engine that does not stop again has failed


class LockstepBackend(ScriptedBackend):
    """Stops the engine's thread at the begin of each exchange."""

    def __init__(self, script: Callable[[str], str] | None = None, **model: Any) -> None:
        super().__init__(script, **model)
        self.garble: Callable[[StepResult], StepResult] = lambda result: result
        """What is to be made of each result before the engine gets it."""
        self.offered: Plan | None = None
        """The plan with which the engine stands here."""
        self._idle = False  # there was nothing to do when it went on last, or came since
        self._halts: SimpleQueue[None] = SimpleQueue()
        self._goes: SimpleQueue[None] = SimpleQueue()

    @property
    def will_fail(self) -> bool:
        """Whether a step is to fail that has not come yet."""
        return bool(self._errors)

    @property
    def at_rest(self) -> bool:
        """Whether the engine has found nothing to do, and has not been told of anything since."""
        return self._idle and self.offered is None

    def wake(self) -> None:
        self._idle = False
        super().wake()

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
        self._idle = False
        results = super().exchange(plan, wait=wait, timeout=timeout)
        self._idle = wait and not results
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


def _garbled(result: EntryResult, how: str, n_vocab: int) -> EntryResult:
    """What no entry can have been given."""
    ids = result.token_ids
    return {
        "no such token": lambda: replace(result, token_ids=(*ids[:-1], n_vocab)),
        "negative token": lambda: replace(result, token_ids=(-1, *ids[1:])),
        "too many tokens": lambda: replace(result, token_ids=ids * 50),
        "too few tokens": lambda: replace(result, token_ids=(), n_drafted=1, finish_reason="stop"),
        "more accepted than drafted": lambda: replace(result, n_accepted=result.n_drafted + 1),
        "less than nothing accepted": lambda: replace(result, n_accepted=-1),
        "drafted too deep": lambda: replace(result, n_drafted=1000),
        "probabilities of others": lambda: replace(
            result, logprobs=(*result.logprobs, TokenLogprobs(1, 0.0, 1))
        ),
    }[how]()


_GARBAGE: Final = (
    "no such token",
    "negative token",
    "too many tokens",
    "too few tokens",
    "more accepted than drafted",
    "less than nothing accepted",
    "drafted too deep",
    "probabilities of others",
    "an entry too few",
    "an entry too many",
)


class Garbage:
    """What comes instead of results: for :attr:`LockstepBackend.garble`."""

    KINDS = (*_GARBAGE, "stuck")
    """``stuck``: the grammar of an answer cannot go on; nothing is wrong with the others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._coming: deque[str] = deque()

    @property
    def is_coming(self) -> bool:
        """Whether some has not come yet."""
        return bool(self._coming)

    def add(self, kind: str) -> None:
        """One more, in place of the next result that gives somebody something."""
        self._coming.append(kind)

    def garble(self, result: StepResult) -> StepResult:
        """On the engine's thread: what comes next is not what the model gave."""
        if not self._coming or result.error is not None or not result.entries:
            return result
        entries = list(result.entries)
        given = [i for i, entry in enumerate(entries) if entry.token_ids]
        if not given:
            return result
        how = self._coming.popleft()
        i = given[-1]
        if how == "an entry too few":
            del entries[i]
        elif how == "an entry too many":
            entries.append(entries[i])
        elif how == "stuck":
            entries[i] = NO_RESULT
            seq_id = self._seq_id(result.plan, i)
            return replace(result, entries=tuple(entries), stuck=((seq_id, "scripted"),))
        else:
            entries[i] = _garbled(entries[i], how, self._engine.model.n_vocab)
        return replace(result, entries=tuple(entries))

    def _seq_id(self, plan: int, i: int) -> int:
        flights = self._engine._scheduler._in_flight
        [entry] = [f.plan.entries[i] for f in flights if f.plan.number == plan]
        return entry.seq_id


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
