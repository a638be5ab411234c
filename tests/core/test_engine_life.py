"""An engine's life: draining, closing within a deadline, and telling whether it is well.

A native call that does not come back is a step of the scripted backend that is held.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from mtpbatch import (
    Engine,
    EngineClosedError,
    EngineDeadError,
    EngineStalledError,
    Generation,
    InvalidParameterError,
)
from mtpbatch.testing import ScriptedBackend, StepGate, open_scripted_engine
from patience import until

pytestmark = pytest.mark.anyio

FOREVER = 10**6
ENDLESS: dict[str, Any] = {"max_tokens": FOREVER, "ignore_eos": True}


@asynccontextmanager
async def wedged(
    n_steps: int = 3, **options: Any
) -> AsyncIterator[tuple[Engine, ScriptedBackend, list[Generation], StepGate]]:
    """An engine with two requests, one running and one waiting, whose step does not end."""
    options = {"n_seq": 1, "n_draft_max": 0, "n_ctx": FOREVER} | options
    backend = ScriptedBackend(lambda _: "y" * 100, **options)
    gate = backend.hold_step(n_steps)
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    try:
        generations = [engine.submit("x", **ENDLESS), engine.submit("x", **ENDLESS)]
        await gate.reached()
        yield engine, backend, generations, gate
    finally:
        gate.release()
        await engine.aclose()
        await until(lambda: not engine._thread.is_alive())
        await engine.aclose()
    assert backend.closed


async def check_aborted(generations: list[Generation], texts: list[str]) -> None:
    done = [await generation for generation in generations]
    assert [completion.finish_reason for completion in done] == ["abort"] * len(done)
    assert [completion.text for completion in done] == texts


# ---------------------------------------------------------------------- waiting for the end


@pytest.mark.parametrize("dies", [False, True])
async def test_who_waits_for_the_end_hears_of_it_and_of_what_it_died_of(dies: bool) -> None:
    backend = ScriptedBackend()
    if dies:
        backend.fail_step(0, RuntimeError("boom"))
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    heard: list[str] = []

    async def wait() -> None:
        try:
            await engine.wait_closed()
            heard.append("closed")
        except EngineDeadError as error:
            heard.append(repr(error.__cause__))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        assert heard == []
        if dies:
            with pytest.raises(EngineDeadError):
                await engine.generate("x")
        else:
            await engine.aclose()
    assert heard == ["RuntimeError('boom')" if dies else "closed"] * 2
    await engine.aclose()


# ----------------------------------------------------------------------------- draining


async def test_draining_finishes_what_runs_and_waits_and_takes_nothing_new() -> None:
    backend = ScriptedBackend(lambda _: "answer", n_seq=1)
    gate = backend.hold_step(0)
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    generations = [engine.submit("x"), engine.submit("x"), engine.submit("x" * 200)]
    drained = False

    async def drain() -> None:
        nonlocal drained
        await engine.drain()
        drained = True

    async with anyio.create_task_group() as group:
        group.start_soon(drain)
        group.start_soon(drain)
        await gate.reached()
        await until(lambda: engine.draining)
        assert "draining" in repr(engine)
        with pytest.raises(EngineClosedError, match="draining"):
            engine.submit("x")
        with pytest.raises(EngineClosedError, match="draining"):
            await engine.generate("x")
        engine.check_health()
        assert not engine.closed
        assert not drained
        gate.release()
    assert drained
    assert [g.completion.text if g.completion else None for g in generations] == ["answer"] * 3
    await engine.drain()
    assert await engine.detokenize(await engine.tokenize("x")) == "x", "until it is closed"
    await engine.aclose()
    await engine.drain()


async def test_a_long_prompt_being_tokenised_is_drained_too() -> None:
    proceed, begun = threading.Event(), threading.Event()

    class Slow(ScriptedBackend):
        def tokenize(self, text: str, **options: Any) -> list[int]:
            if len(text) > 1000:
                begun.set()
                assert proceed.wait(30)
            return super().tokenize(text, **options)

    backend = Slow(lambda _: "answer", n_ctx=3000)
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    generations = [engine.submit("x" * 2000), engine.submit("z" * 2000)]
    await until(begun.is_set)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.drain)
        await until(lambda: "draining" in repr(engine))
        proceed.set()
    assert [g.completion.text if g.completion else None for g in generations] == ["answer"] * 2
    await engine.aclose()


async def test_at_the_deadline_of_a_drain_the_rest_is_aborted_though_a_step_hangs() -> None:
    async with wedged() as (engine, backend, generations, gate):
        await engine.drain(timeout=0)
        await check_aborted(generations, ["yyy", ""])
        assert engine.stats().finished["abort"] == 2
        await engine.drain()
        await engine.drain(timeout=0)
        gate.release()
        await until(lambda: not backend.active)
        assert not engine.closed
        engine.check_health()


async def test_a_cancelled_drain_lets_requests_run_on() -> None:
    async with wedged(n_ctx=200) as (engine, _, generations, gate):
        with anyio.move_on_after(0) as scope:
            await engine.drain()
        assert scope.cancelled_caught
        gate.release()
        for generation in generations:
            assert (await generation).finish_reason == "length"


async def test_a_drain_ends_when_the_engine_is_closed() -> None:
    async with wedged() as (engine, _, generations, gate):
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain)
            await until(lambda: "draining" in repr(engine))
            group.start_soon(engine.aclose)
            await until(lambda: engine.closed)
            gate.release()
        await check_aborted(generations, ["yyyy", ""])


@pytest.mark.parametrize("bad", [-1, float("nan"), "3"])
async def test_deadlines_are_numbers_of_seconds(bad: Any) -> None:
    backend = ScriptedBackend()
    engine = await Engine._start(lambda report: backend)
    for call in (engine.drain, engine.aclose):
        with pytest.raises(InvalidParameterError, match=r"^timeout: .*seconds from 0 on, got"):
            await call(bad)
    with pytest.raises(InvalidParameterError, match=r"^stall_timeout: .*seconds from 0 on, got"):
        engine.check_health(bad)
    engine.check_health()
    await engine.aclose()


# ------------------------------------------------------------------------------ closing


async def test_closing_does_not_wait_for_a_step_that_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with wedged() as (engine, backend, generations, gate):
        await engine.aclose(timeout=0)
        await check_aborted(generations, ["yyy", ""])
        assert engine.closed
        assert not backend.closed, "its step still runs"
        assert any("engine.left_behind" in record.message for record in caplog.records)
        await engine.aclose()
        with pytest.raises(EngineClosedError):
            engine.submit("x")
        assert engine.stats().finished["abort"] == 2
        gate.release()
        await until(lambda: backend.closed)


async def test_several_tasks_and_loops_close_an_engine_whose_step_hangs() -> None:
    async with wedged() as (engine, _, generations, _):

        def elsewhere(backend: str) -> None:
            anyio.run(engine.aclose, 0, backend=backend)

        async with anyio.create_task_group() as group:
            group.start_soon(engine.aclose, 0)
            group.start_soon(engine.aclose, 0)
            for backend in ("asyncio", "trio"):
                group.start_soon(anyio.to_thread.run_sync, elsewhere, backend)
        await check_aborted(generations, ["yyy", ""])


async def test_closing_does_not_wait_for_a_backend_that_does_not_close() -> None:
    """As with llama.cpp, where the step that hangs is on a thread of its own."""
    closing, proceed = threading.Event(), threading.Event()

    class Stuck(ScriptedBackend):
        def close(self) -> None:
            closing.set()
            assert proceed.wait(30)
            super().close()

    backend = Stuck(lambda _: "y" * 100, n_ctx=FOREVER)
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    generation = engine.submit("x", **ENDLESS)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.aclose)
        assert (await generation).finish_reason == "abort"
        await until(closing.is_set)
        group.cancel_scope.cancel()  # closing goes on all the same
        await engine.aclose(timeout=0)
        proceed.set()
    assert backend.closed
    assert not engine._thread.is_alive()


def test_the_interpreter_does_not_wait_for_a_step_that_hangs() -> None:
    program = """
import anyio, anyio.to_thread, threading
import mtpbatch.engine
from mtpbatch.testing import ScriptedBackend

mtpbatch.engine._CLOSING_TIME = 0.01
mtpbatch.log_to_console("ERROR")

stuck = threading.Event()

class Stuck(ScriptedBackend):
    def exchange(self, plan, **waiting):
        if plan is not None:
            stuck.set()
            threading.Event().wait()
        return super().exchange(plan, **waiting)

async def main():
    engine = await mtpbatch.Engine._start(lambda report: Stuck())
    engine.submit("x")
    await anyio.to_thread.run_sync(stuck.wait)

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr.endswith("ERROR engine.left_behind waited=0.01\n")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------- health


async def test_health_fails_when_no_step_ends_though_there_are_requests() -> None:
    async with wedged() as (engine, backend, generations, gate):
        backend.clock.advance(5)
        engine.check_health(stall_timeout=10)
        backend.clock.advance(5.1)
        with pytest.raises(
            EngineStalledError, match=r"10\.1 s.*stall_timeout=10.* 2 requests"
        ) as e:
            engine.check_health(stall_timeout=10)
        assert e.value.seconds == pytest.approx(10.1)
        assert e.value.n_requests == 2
        with pytest.raises(EngineStalledError):
            await anyio.to_thread.run_sync(engine.check_health, 10)
        engine.check_health()
        gate.release()
        for generation in generations:
            generation.cancel()
            await generation
        engine.check_health(stall_timeout=10)


async def test_an_idle_engine_is_well_and_a_new_request_has_all_the_time() -> None:
    backend = ScriptedBackend()
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    await engine.generate("x")
    backend.clock.advance(1000)
    engine.check_health(stall_timeout=10)
    gate = backend.hold_step(backend.n_steps)
    generation = engine.submit("x", max_tokens=3, ignore_eos=True)
    await gate.reached()
    # The engine's thread may not have been idle yet when those 1000 seconds passed: then it takes
    # them for a program that stood still, of which LONGEST_GAP counts for the next step.
    backend.clock.advance(9.9)
    engine.check_health(stall_timeout=10)
    backend.clock.advance(0.2)
    with pytest.raises(EngineStalledError):
        engine.check_health(stall_timeout=10)
    gate.release()
    await generation
    await engine.aclose()


async def test_waiting_for_a_grammar_is_no_stall() -> None:
    backend = ScriptedBackend(lambda _: "y", n_seq=1, n_draft_max=0)
    compiled = threading.Event()
    backend.compile_grammar = lambda source: compiled.wait() and None  # type: ignore[method-assign, assignment]
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x", regex="y")
        try:
            backend.clock.advance(1000)
            engine.check_health(60)
        finally:
            compiled.set()
        await generation
