"""A program that runs an engine while calls of its native part fail.

``python under_faults.py SCENARIO MODEL``, with the library of ``faults.cpp`` preloaded. Each
scenario fails the first call, then the second, and so on, until an answer needs no more of them:
faults come in every place of a step that there is. What has to hold after each of them: every
request has ended, with the right answer or with an error and a right beginning; with the right
answer, if it still waited when the step failed; the engine goes on; and the next answers are those
of an engine that nothing was done to.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any, Final, NamedTuple

from mtpbatch import (
    Completion,
    DecodeError,
    Engine,
    EngineDeadError,
    EngineStalledError,
    RequestAdmitted,
    RequestEnded,
    StepReport,
    Watcher,
    memory,
)
from patience import until

PROCESS, SEQ_RM, STATE_GET, STATE_SET, NEW = range(5)
RUNS, THROWS, HANGS = 1, 2, 4

LARGE: Final = 1 << 14  # bytes
FAULTS: Final = ctypes.CDLL(None)
FAULTS.faults_fired.restype = ctypes.c_int64


def arm(
    point: int, nth: int, *, count: int = 1, code: int = 0, way: int = 0, least: int = 0
) -> None:
    values = map(ctypes.c_int64, (nth, count))
    assert FAULTS.faults_arm(point, *values, code, way, ctypes.c_int64(least))


def disarm(point: int) -> int:
    """How often the fault was there."""
    FAULTS.faults_disarm(point)
    return int(FAULTS.faults_fired(point))


class Bystanders(Watcher):
    """Notes who ends by a step that it took no part in, as it still waited for a sequence."""

    def __init__(self) -> None:
        self.wronged: list[str] = []
        self.n_spared = 0  # of those who waited, how many were answered
        self._begun: set[str] = set()
        self._concerned: set[str] | None = None  # who had begun when a step failed

    def admitted(self, request: RequestAdmitted) -> None:
        self._begun.add(request.request_id)

    def stepped(self, report: StepReport) -> None:
        if report.error is not None:
            self._concerned = self._begun.copy()

    def ended(self, request: RequestEnded) -> None:
        if self._concerned is None or request.request_id in self._concerned:
            return
        if request.error is None:
            self.n_spared += 1
        else:
            self.wronged.append(f"{request.request_id}: {request.error}")


class Question:
    """Requests that an engine answers at once, more than it has sequences, some of them drafted."""

    def __init__(self, n_prompt: int, max_tokens: int, depth: int = 2, n: int = 4) -> None:
        hows: list[dict[str, Any]] = [
            {},
            {"temperature": 1.0, "seed": 3},
            {"speculation": depth},
            {"speculation": 0},
        ]
        self.params = [
            (
                [5 + i, *range(20, 19 + n_prompt + 3 * i)],
                {"max_tokens": max_tokens, "ignore_eos": True} | how,
            )
            for i, how in zip(range(n), cycle(hows), strict=False)
        ]

    async def ask(self, engine: Engine) -> list[Completion | BaseException]:
        async def one(prompt: list[int], how: dict[str, Any]) -> Completion:
            return await engine.submit(prompt, **how)

        each = (one(prompt, how) for prompt, how in self.params)
        return await asyncio.gather(*each, return_exceptions=True)

    async def right(self, engine: Engine) -> list[Completion]:
        """The answers, none of which must fail."""
        return [answer for answer in await self.ask(engine) if isinstance(answer, Completion)]


KEPT: Final = Question(70, 8)
"""Whose prompts are kept, and spared when they come again."""

PAUSED: Final = Question(20, 90)
"""Of whom some are parked, with so few cells:"""
SCARCE: Final[dict[str, Any]] = {"n_cells": 190, "n_batch": 32}


def check(
    answers: Iterable[Completion | BaseException], right: list[Completion], *, or_dead: bool = False
) -> int:
    """How many of them failed, which is no harm: what there was is right, nobody hangs."""
    n_failed = 0
    for answer, expected in zip(answers, right, strict=True):
        if isinstance(answer, BaseException):
            allowed = (DecodeError, EngineDeadError) if or_dead else (DecodeError,)
            assert isinstance(answer, allowed), repr(answer)
            n_failed += 1
            completion = answer.completion
        else:
            completion = answer
            assert len(completion.token_ids) == len(expected.token_ids)
        assert completion is not None or or_dead  # it was dead before it was asked
        given = completion.token_ids if completion is not None else ()
        assert given == expected.token_ids[: len(given)], (given, expected.token_ids)
    return n_failed


def all_right(answers: Iterable[Completion | BaseException], right: list[Completion]) -> None:
    assert check(answers, right) == 0, answers


@asynccontextmanager
async def open_engine(model: str, **config: Any) -> AsyncIterator[Engine]:
    given: dict[str, Any] = {"n_seq": 3, "n_ctx": 128, "kv_type": "f32", "n_threads": 1}
    async with Engine.open(model, **(given | config)) as engine:
        yield engine


class Swept(NamedTuple):
    """Requests: how many failed, and how many waited meanwhile and were answered."""

    n_failed: int
    n_spared: int


async def sweep(
    model: str,
    point: int,
    question: Question,
    *,
    code: int = 0,
    way: int = 0,
    count: int = 1,
    least: int = 0,
    n_asked: int = 1,
    keeps: bool = False,
    **config: Any,
) -> Swept:
    """Fail each call in turn, of those that it takes to ask so often.

    ``keeps``: an engine that has answered once takes fewer of these calls.
    """
    async with open_engine(model, **config) as engine:
        right = await question.right(engine)
    n_failed = n_spared = nth = 0
    fired = True
    while fired:
        async with open_engine(model, **config) as engine:
            while True:
                bystanders = Bystanders()
                arm(point, nth, count=count, code=code, way=way, least=least)
                with engine.watch(bystanders):
                    for _ in range(n_asked):
                        n_failed += check(await question.ask(engine), right)
                fired = disarm(point) > 0
                assert not bystanders.wronged, bystanders.wronged
                n_spared += bystanders.n_spared
                nth += fired
                for _ in range(2):
                    all_right(await question.ask(engine), right)
                engine.check_health()
                stats = engine.stats()
                assert (stats.running, stats.waiting, stats.kv_cells_used) == (0, 0, 0)
                if keeps or not fired:
                    break
    assert nth > 0, "there was nothing to fail"
    print(f"{nth} faults, by which {n_failed} requests failed, and {n_spared} who waited did not")
    return Swept(n_failed, n_spared)


async def decode(model: str) -> None:
    """Each decode fails, of the model and of its head, with every code there is, before and after
    it has changed the memory."""
    question = Question(5, 6)
    for code in (1, 2, -1, -2):
        assert all(await sweep(model, PROCESS, question, code=code))
    for code in (2, -2):
        assert all(await sweep(model, PROCESS, question, code=code, way=RUNS))
    for way in (THROWS, RUNS | THROWS):
        assert all(await sweep(model, PROCESS, question, way=way))


async def seq_rm(model: str) -> None:
    """Each removal is refused: of drafts that were rejected, and of whole sequences; one, some, or
    all from there on, so that ids are taken again that still hold what was before."""
    for count in (1, 3):
        # So long that drafts are rejected while others wait.
        assert all(await sweep(model, SEQ_RM, Question(5, 24, n=6), count=count))
    await sweep(model, SEQ_RM, Question(5, 6), count=1 << 40, n_asked=2)
    undrafted = Question(5, 6, depth=0)
    await sweep(model, SEQ_RM, undrafted, count=1 << 40, n_asked=2, n_draft_max=0)


async def states(model: str) -> None:
    """States of sequences cannot be read or written: nobody fails, what they spare is computed."""
    for point in (STATE_GET, STATE_SET):
        for way in (0, RUNS):
            swept = await sweep(model, point, KEPT, way=way, n_asked=3, keeps=True)
            assert not swept.n_failed
            swept = await sweep(model, point, PAUSED, way=way, **SCARCE)
            assert not swept.n_failed


async def large(model: str) -> None:
    """There is no memory for what is large: snapshots, hidden rows, what waits for the heads."""
    assert all(await sweep(model, NEW, KEPT, least=LARGE, n_asked=3, keeps=True))
    await sweep(model, NEW, PAUSED, least=LARGE, keeps=True, **SCARCE)


async def small(model: str) -> None:
    """There is no memory for anything, however small. That may end the engine, but not the process:
    every request ends, and another engine is right."""
    question = KEPT
    async with open_engine(model) as engine:
        right = await question.right(engine)
    n_dead = nth = 0
    fired = 1
    while fired:
        async with open_engine(model) as engine:
            all_right(await question.ask(engine), right)
            while fired and not engine.closed:
                arm(NEW, nth)
                answers = await question.ask(engine)
                fired = disarm(NEW)
                n_failed = check(answers, right, or_dead=True)
                assert fired or not n_failed
                answers = await question.ask(engine)  # of which it may hear that it has ended
                if not engine.closed:
                    all_right(answers, right)
                    assert engine.stats().kv_cells_used == 0
                nth += 1
            n_dead += engine.closed
    print(f"{nth} faults, of which {n_dead} ended the engine")


def stalled(engine: Engine) -> bool:
    try:
        engine.check_health(stall_timeout=0.01)
    except EngineStalledError:
        return True
    return False


async def hang(model: str) -> None:
    """A decode hangs: it is noticed, requests end all the same, and it goes on when that does."""
    question = Question(5, 6)
    async with open_engine(model) as engine:
        right = await question.right(engine)
        arm(PROCESS, 3, way=HANGS)
        hanging = [engine.submit(prompt, **how) for prompt, how in question.params]
        await until(lambda: FAULTS.faults_hanging() > 0)
        late = engine.submit([9], timeout=0.01)
        assert (await late).finish_reason == "timeout"
        hanging[0].cancel()
        assert (await hanging[0]).finish_reason == "abort"
        await until(lambda: stalled(engine))
        engine.check_health()
        FAULTS.faults_release()
        answers = [await generation for generation in hanging[1:]]
        all_right(answers, right[1:])
        all_right(await question.ask(engine), right)
        engine.check_health()
        disarm(PROCESS)
        # Closing does not wait for it; the engine's thread frees everything when it can.
        arm(PROCESS, 3, way=HANGS)
        hanging = [engine.submit(prompt, **how) for prompt, how in question.params]
        await until(lambda: FAULTS.faults_hanging() > 0)
        await engine.aclose(timeout=0.01)
        for generation in hanging:
            assert (await generation).finish_reason == "abort"
        FAULTS.faults_release()
        engine._thread.join()


def main() -> None:
    scenario, model = sys.argv[1:]
    # However fast the machine is, states are worth copying.
    memory.Snapshots._share_of = lambda *_, **__: 0.0  # type: ignore[method-assign]
    asyncio.run(globals()[scenario](model))
    gc.collect()
    print("all held")


main()
