"""An engine whose native part dies, played by the scripted backend, on all three event loops.

Time is the backend's clock, which moves only when it is told to: no pause is slept through.
"""

from __future__ import annotations

import logging
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from mtpbatch import (
    Completion,
    Engine,
    EngineClosedError,
    EngineDeadError,
    EngineStalledError,
    Generation,
    ModelLoadError,
    NativeDiedError,
)
from mtpbatch.restarts import MOST
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.types import Plan, StepResult
from patience import until

pytestmark = pytest.mark.anyio

ENDLESS: dict[str, Any] = {"max_tokens": 10**6, "ignore_eos": True}


async def submitted(
    engine: Engine, backend: ScriptedBackend, n: int, **params: Any
) -> list[Generation]:
    """So many requests, which all have come when the first step ends."""
    gate = backend.hold_step(backend.n_steps)
    generations = [engine.submit("x", **params) for _ in range(n)]
    await gate.reached()
    gate.release()
    return generations


async def check_died(generation: Generation) -> Completion:
    """It ended with the death; what there was by then."""
    with pytest.raises(
        NativeDiedError, match=r"signal 9, SIGKILL\); .* send the request again"
    ) as e:
        await generation
    assert e.value.returncode == -9
    completion = generation.completion
    assert completion is not None
    assert completion is e.value.completion
    assert completion.finish_reason == "error"
    return completion


async def test_who_runs_ends_with_the_death_and_who_waits_is_answered_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mtpbatch")
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=2, n_draft_max=0)
    backend.die_in_step(5)
    async with open_scripted_engine(backend) as engine:
        generations = await submitted(engine, backend, 5)
        for generation in generations[:2]:
            assert (await check_died(generation)).text in ("yyyyy", "yyyy")
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.restarts) == (0, 3, 1)
        assert stats.finished["error"] == 2
        with pytest.raises(NativeDiedError, match="starts another one"):
            engine.check_health()
        assert backend.dead
        late = engine.submit("x")  # while there is nothing that runs it
        backend.clock.advance(1.0)
        for generation in (*generations[2:], late):
            assert (await generation).text == "y" * 40
        engine.check_health()
        engine._scheduler.check_integrity()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 2)
        assert stats.finished["stop"] == 4
    words = [record.getMessage().split()[0] for record in caplog.records]
    assert words == ["engine.opened", "engine.native_died", "engine.restarted", "engine.closed"]
    assert "restart_in=1.0" in caplog.messages[1]
    assert "requests=4" in caplog.messages[2]


class Watched(ScriptedBackend):
    """Counts how often the engine's thread has come to wait."""

    n_waits = 0

    def exchange(self, plan: Plan | None, *, wait: bool, **rest: Any) -> list[StepResult]:
        self.n_waits += wait
        return super().exchange(plan, wait=wait, **rest)

    async def pass_second(self) -> None:
        """A second passes, and the engine's thread has seen it, if it has not ended."""
        before = self.n_waits
        self.clock.advance(1.0)
        await until(lambda: self.n_waits > before or self.closed)
        await anyio.lowlevel.checkpoint()  # for what it sent


async def test_a_stuck_process_is_killed_and_who_waits_is_answered_by_the_next() -> None:
    backend = Watched(lambda _: "y" * 40, n_seq=2, n_draft_max=0, step_timeout=30.0)
    backend.hang_in_step(5)
    async with open_scripted_engine(backend) as engine:
        generations = await submitted(engine, backend, 3)
        await until(lambda: backend.n_steps == 5)
        for second in range(30):
            await backend.pass_second()
            assert not backend.dead, second
        with pytest.raises(EngineStalledError, match="3 requests"):
            engine.check_health(stall_timeout=29.0)
        while not backend.dead:
            await backend.pass_second()
        for generation in generations[:2]:
            with pytest.raises(
                NativeDiedError, match=r"SIGKILL: silent for more than step_timeout=30\.0 seconds"
            ) as caught:
                await generation
            assert caught.value.why.startswith("silent")
            assert caught.value.completion is not None
            assert caught.value.completion.text in ("yyyyy", "yyyy")
        backend.clock.advance(1.0)
        assert (await generations[2]).text == "y" * 40
        assert engine.stats().restarts == 1


async def test_requests_that_time_out_meanwhile_do_not_keep_a_stuck_process_alive() -> None:
    backend = Watched(lambda _: "y" * 40, n_seq=1, step_timeout=30.0)
    backend.hang_in_step(0)
    async with open_scripted_engine(backend) as engine:
        seconds = 0
        while not backend.dead:
            generation = engine.submit("x", timeout=10.0)
            while generation.completion is None and not backend.dead:
                await backend.pass_second()
                seconds += 1
        assert 30 < seconds < 45, "the first request alone is not known to be in a step"


async def test_a_process_that_is_stuck_in_its_first_step_again_and_again_is_given_up() -> None:
    backend = Watched(lambda _: "y" * 40, n_seq=1, step_timeout=100.0)
    async with open_scripted_engine(backend) as engine:
        for _ in range(MOST + 1):
            backend.hang_in_step(backend.n_steps)
            generation = engine.submit("x")
            while generation.completion is None:
                await backend.pass_second()
        with pytest.raises(EngineDeadError):
            engine.check_health()


async def test_an_engine_without_work_is_not_stuck() -> None:
    backend = Watched(lambda _: "yyy", n_seq=1, step_timeout=3.0)
    async with open_scripted_engine(backend) as engine:
        for _ in range(3):
            assert (await engine.generate("x")).text == "yyy"
            for _ in range(9):
                await backend.pass_second()
        assert engine.stats().restarts == 0


async def test_parked_requests_end_as_well_for_the_executor_had_their_random_state() -> None:
    backend = ScriptedBackend(lambda _: "y" * 90, n_seq=4, n_ctx=64, n_cells=80, n_draft_max=0)
    backend.die_in_step(40)
    async with open_scripted_engine(backend) as engine:
        generations = await submitted(engine, backend, 4, **ENDLESS)
        n_tokens = [len((await check_died(generation)).token_ids) for generation in generations]
        assert engine.stats().preemptions > 0
        assert min(n_tokens) < 30 < max(n_tokens), "somebody has paused"
        engine._scheduler.check_integrity()
        backend.clock.advance(1.0)
        assert (await engine.generate("x", max_tokens=3)).text == "yyy"
        engine._scheduler.check_integrity()


async def test_requests_are_cancelled_and_time_out_while_nothing_runs() -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1)
    backend.die_in_step(0)
    asked: list[dict[str, Any]] = [{}, {"queue_timeout": 0.5}, {"timeout": 0.2}, {}]
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x")
        cancelled, late, early, last = (engine.submit("x", **params) for params in asked)
        await check_died(running)
        cancelled.cancel()
        assert (await cancelled).finish_reason == "abort"
        backend.clock.advance(0.5)
        assert (await late).finish_reason == (await early).finish_reason == "timeout"
        assert backend.dead, "half a second is left of the pause"
        assert last.completion is None
        backend.clock.advance(0.5)
        assert (await last).text == "y" * 40


async def test_pauses_grow_and_the_engine_is_dead_for_good_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend(n_seq=1)
    backend.die_in_step(0)
    for index in range(MOST):
        backend.fail_restart(index)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x"), engine.submit("x")
        await check_died(running)
        for index in range(MOST):
            said = f"restart_in={2.0**index}"
            await until(lambda words=said: words in caplog.text)  # type: ignore[misc]
            backend.clock.advance(2.0**index - 0.25)
            with pytest.raises(NativeDiedError):
                engine.check_health()
            assert backend._n_restarts == index
            assert engine.stats().restarts == 1, "deaths are counted, not tries"
            backend.clock.advance(0.25)
        with pytest.raises(EngineDeadError, match="scripted failure") as caught:
            await waiting
        assert isinstance(caught.value.__cause__, ModelLoadError)
        assert waiting.completion is not None
        for call in (engine.check_health, engine.stats, lambda: engine.submit("x")):
            with pytest.raises(EngineDeadError):
                call()


async def test_the_time_without_a_native_part_is_no_stall_of_the_next_one() -> None:
    backend = ScriptedBackend(n_seq=1)
    backend.die_in_step(0)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x"), engine.submit("x")
        await check_died(running)
        held = backend.hold_step(backend.n_steps)
        backend.clock.advance(100.0)
        await held.reached()
        engine.check_health(60.0)
        backend.clock.advance(61.0)
        with pytest.raises(EngineStalledError):
            engine.check_health(60.0)
        held.release()
        await waiting


async def test_who_dies_again_and_again_takes_a_request_along_each_time() -> None:
    backend = ScriptedBackend(n_seq=1)
    async with open_scripted_engine(backend) as engine:
        for index in range(MOST):
            backend.die_in_step(backend.n_steps)
            await check_died(engine.submit("x", **ENDLESS))
            backend.clock.advance(2.0**index)
            await until(lambda: engine._death is None)
            engine.check_health()
        backend.die_in_step(backend.n_steps)
        with pytest.raises(EngineDeadError, match="SIGKILL") as caught:
            await engine.generate("x", **ENDLESS)
        assert isinstance(caught.value.__cause__, NativeDiedError)


async def test_who_runs_well_for_a_minute_has_recovered() -> None:
    backend = ScriptedBackend(n_seq=1)
    async with open_scripted_engine(backend) as engine:
        for _ in range(MOST + 2):
            backend.die_in_step(backend.n_steps)
            await check_died(engine.submit("x", **ENDLESS))
            backend.clock.advance(1.0)
            await engine.generate("x")
            backend.clock.advance(60.0)


async def test_an_engine_is_closed_while_it_waits_to_restart() -> None:
    backend = ScriptedBackend(n_seq=1)
    backend.die_in_step(0)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x"), engine.submit("x")
        await check_died(running)
        await engine.aclose()
        assert (await waiting).finish_reason == "abort"
        with pytest.raises(EngineClosedError):
            engine.check_health()
    assert backend.closed
    assert backend._n_restarts == 0


async def test_an_engine_is_drained_across_a_death() -> None:
    backend = ScriptedBackend(lambda _: "answer", n_seq=1)
    backend.die_in_step(0)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x"), engine.submit("x")
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain)
            await check_died(running)
            assert waiting.completion is None
            backend.clock.advance(1.0)
        assert waiting.completion is not None
        assert waiting.completion.text == "answer"


async def test_draining_ends_with_an_engine_that_dies() -> None:
    backend = ScriptedBackend(n_seq=1)
    held = backend.hold_step(0)
    backend.fail_step(0, RuntimeError("scripted crash"))
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x")
        await held.reached()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.drain)
            await until(lambda: engine.draining)
            held.release()
            with pytest.raises(EngineDeadError):
                await running


async def test_a_backend_that_cannot_restart_ends_the_engine() -> None:
    """A backend of one's own need not be able to."""

    class Frail(ScriptedBackend):
        restart = None  # type: ignore[assignment]

    backend = Frail(n_seq=1)
    backend.die_in_step(0)
    async with open_scripted_engine(backend) as engine:
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await engine.generate("x")
