"""The real engine, thread and scheduler on a scripted model, on all three event loops.

Nothing here sleeps: steps are held at gates, and what is to happen meanwhile is awaited.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import uvloop

from mtpbatch import (
    DecodeError,
    Engine,
    EngineClosedError,
    EngineConfig,
    EngineDeadError,
    Generation,
    InternalError,
    InvalidParameterError,
    InvalidRequestError,
    ModelLoadError,
    PromptTooLongError,
)
from mtpbatch._loops import EventLoop
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.types import Plan, StepResult
from patience import until

pytestmark = pytest.mark.anyio


FOREVER = 10**6
ENDLESS: dict[str, Any] = {"max_tokens": FOREVER, "ignore_eos": True}


def engine_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mtpbatch")]


@pytest.fixture(autouse=True)
def _no_thread_left() -> Any:
    yield
    assert engine_threads() == []


# --------------------------------------------------------------------------- generating


async def test_generate_gives_the_models_answer() -> None:
    backend = ScriptedBackend(lambda prompt: f"{prompt} 日本語 🙂")
    async with open_scripted_engine(backend) as engine:
        completion = await engine.generate("hello", max_tokens=50)
        assert completion.text == "hello 日本語 🙂"
        assert completion.finish_reason == "stop"
        assert list(completion.prompt_token_ids) == await engine.tokenize("hello")
        assert await engine.detokenize(completion.token_ids) == completion.text
        assert 0 < completion.accepted < completion.drafted
        assert completion.steps < len(completion.token_ids)
    assert not backend.active
    assert backend.closed


async def test_a_prompt_of_token_ids_is_as_good_as_its_text() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        by_text = await engine.generate("the old tower")
        by_ids = await engine.generate(await engine.tokenize("the old tower"))
        assert by_ids.text == by_text.text


async def test_stream_gives_each_steps_text_and_then_the_completion() -> None:
    backend = ScriptedBackend(lambda _: "日本語 and the rest STOP more", acceptance=0.5)
    async with open_scripted_engine(backend) as engine:
        async with engine.stream("x", stop="STOP") as stream:
            assert stream.completion is None
            deltas = [delta async for delta in stream]
        completion = stream.completion
        assert completion is not None
        assert "".join(delta.text for delta in deltas) == completion.text == "日本語 and the rest "
        assert sum((delta.token_ids for delta in deltas), ()) == completion.token_ids
        assert sum(delta.n_accepted for delta in deltas) == completion.accepted
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "stop"
        assert not any("\ufffd" in delta.text for delta in deltas)


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
@pytest.mark.parametrize("lag", [0, 3])
async def test_nothing_ends_an_answer_before_min_tokens(acceptance: float, lag: int) -> None:
    """A stop text that they complete does not count; one that ends later does."""
    backend = ScriptedBackend(lambda _: "aSTOPbSTOPc", acceptance=acceptance, lag=lag)
    async with open_scripted_engine(backend) as engine:
        for min_tokens, text in {0: "a", 4: "a", 5: "aSTOPb", 9: "aSTOPb"}.items():
            done = await engine.generate("x", stop="STOP", min_tokens=min_tokens)
            assert (done.text, done.finish_reason) == (text, "stop"), min_tokens
            assert len(done.token_ids) >= min_tokens
        for min_tokens, n_tokens in {10: 12, 11: 12, 12: 24, 20: 24}.items():
            done = await engine.generate("x", min_tokens=min_tokens)
            assert (len(done.token_ids), done.finish_reason) == (n_tokens, "stop"), min_tokens
            assert done.text == "aSTOPbSTOPc aSTOPbSTOPc"[: n_tokens - 1]
        silent = ScriptedBackend(lambda _: "")
    async with open_scripted_engine(silent) as engine:
        assert (await engine.generate("x", min_tokens=3)).text == "   "


async def test_a_submitted_request_runs_by_itself_and_keeps_its_deltas() -> None:
    async with open_scripted_engine(ScriptedBackend(lambda _: "some answer")) as engine:
        generation = engine.submit("x")
        assert repr(generation) == "<Generation req-1: under way>"
        completion = await generation
        assert await generation is completion
        assert "".join([delta.text async for delta in generation]) == "some answer"
        assert [delta async for delta in generation] == [], "each delta is given out once"
        assert repr(generation) == f"<Generation req-1: stop, {len(completion.token_ids)} tokens>"
        generation.cancel()
        assert (await generation).finish_reason == "stop"


async def test_generate_many_keeps_the_order_of_the_prompts() -> None:
    backend = ScriptedBackend(lambda prompt: prompt * len(prompt), n_seq=3)
    async with open_scripted_engine(backend) as engine:
        prompts = ["a" * (1 + i % 5) + str(i) for i in range(40)]
        done = await engine.generate_many(iter(prompts))
        assert [completion.text for completion in done] == [p * len(p) for p in prompts]
        assert await engine.generate_many([]) == []


async def test_neighbours_and_drafts_change_nothing_in_an_answer() -> None:
    alone = ScriptedBackend(n_seq=1, n_draft_max=0)
    crowded = ScriptedBackend(n_seq=8, n_draft_max=4, n_batch=40)
    prompts = [f"prompt {i} " * (i % 4 + 1) for i in range(30)]
    async with open_scripted_engine(alone) as one, open_scripted_engine(crowded) as many:
        expected = [await one.generate(prompt) for prompt in prompts]
        got = await many.generate_many(prompts)
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]


async def test_speculation_is_the_requests_choice() -> None:
    async with open_scripted_engine(ScriptedBackend(acceptance=1.0)) as engine:
        off = await engine.generate("x", speculation=0, max_tokens=8, ignore_eos=True)
        on = await engine.generate("x", speculation=3, max_tokens=9, ignore_eos=True)
        assert (off.drafted, off.steps) == (0, 8)
        assert (on.drafted, on.accepted, on.steps) == (6, 6, 3)
        assert on.accepted_by_depth == (2, 2, 2)


async def test_a_model_without_heads_works_undrafted_and_says_so() -> None:
    async with open_scripted_engine(ScriptedBackend(mtp=False)) as engine:
        assert (await engine.generate("x")).drafted == 0
        assert not engine.stats().mtp
        with pytest.raises(InvalidParameterError, match=r"speculation: .*no MTP heads"):
            await engine.generate("x", speculation=1)


async def test_requests_without_a_seed_get_one_each_and_a_given_one_is_passed_on() -> None:
    seeds: list[int] = []

    class Recording(ScriptedBackend):
        def exchange(self, plan: Plan | None, **waiting: Any) -> list[StepResult]:
            if plan is not None:
                seeds.extend(admission.seed for admission in plan.admit)
            return super().exchange(plan, **waiting)

    async with open_scripted_engine(Recording()) as engine:
        await engine.generate_many(["x"] * 8)
        assert len(set(seeds)) > 1
        seeds.clear()
        await engine.generate("x", seed=42)
        assert seeds == [42]


async def test_times_come_from_the_backends_clock() -> None:
    backend = ScriptedBackend(lambda _: "xy", n_draft_max=0, step_time=0.25)
    async with open_scripted_engine(backend) as engine:
        timings = (await engine.generate("x")).timings
        assert (timings.queued, timings.first_token, timings.total) == (0.0, 0.25, 0.75)


async def test_stats_and_repr_show_what_is_going_on() -> None:
    backend = ScriptedBackend(lambda _: "xyz", n_seq=2, n_draft_max=0)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        generations = [engine.submit("x") for _ in range(5)]
        assert engine.stats().waiting + engine.stats().running == 5
        await gate.reached()
        await until(lambda: engine.stats().running > 0)
        stats = engine.stats()
        assert (stats.running + stats.waiting, stats.n_seq) == (5, 2)
        assert stats.free_sequences == 2 - stats.running
        assert "n_ctx=256" in repr(engine)
        assert f"{stats.running} running, {stats.waiting} waiting" in repr(engine)
        gate.release()
        for generation in generations:
            await generation
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 2)
        assert stats.finished == {"stop": 5, "length": 0, "abort": 0, "timeout": 0, "error": 0}
        assert stats.generated_tokens == 20
    assert engine.closed
    assert "closed" in repr(engine)
    assert engine.stats() == stats


async def test_a_loop_is_called_once_per_step_however_many_requests_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    post = EventLoop.post

    def counting(self: EventLoop, call: Callable[..., object], *args: object) -> bool:
        nonlocal calls
        calls += 1
        return post(self, call, *args)

    backend = ScriptedBackend(lambda _: "abcdefgh", n_seq=4, n_draft_max=0)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        monkeypatch.setattr(EventLoop, "post", counting)
        generations = [engine.submit("x") for _ in range(4)]
        await gate.reached()
        calls = 0
        gate.release()
        for generation in generations:
            await generation
        assert calls <= backend.n_steps
        calls = 0
        await engine.generate("x")
        assert calls == 1, "who does not stream is called at the end only"
        monkeypatch.undo()


# ----------------------------------------------------------------------------- running ahead


@pytest.mark.parametrize("lag", [1, 5, 30])
async def test_answers_do_not_depend_on_how_far_the_model_is_ahead(lag: int) -> None:
    prompts = [f"{i} " * (1 + 3 * i) for i in range(12)]
    async with open_scripted_engine(ScriptedBackend(n_seq=3, n_batch=16)) as engine:
        expected = await engine.generate_many(prompts, stop=["tower", "日"])
    backend = ScriptedBackend(n_seq=3, n_batch=16, lag=lag)
    async with open_scripted_engine(backend) as engine:
        found = await engine.generate_many(prompts, stop=["tower", "日"])
        assert engine.stats().free_sequences == 3
    assert [c.text for c in found] == [c.text for c in expected]
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("lag", [0, 1, 30])
async def test_a_stop_text_costs_no_step_more(lag: int) -> None:
    backend = ScriptedBackend(lambda _: "abcdefgh" * 20, n_seq=1, n_draft_max=0, lag=lag)
    async with open_scripted_engine(backend) as engine:
        completion = await engine.generate("x", stop="fg")
        assert completion.text == "abcde"
        await engine.generate("y", max_tokens=1)  # its step comes behind what was under way
        assert backend.n_steps - 1 == completion.steps


async def test_an_app_that_keeps_python_busy_lets_the_model_run_ahead() -> None:
    backend = ScriptedBackend(lambda _: "x" * 100, n_seq=1, n_draft_max=0, lag=8)
    gate = backend.hold_step(12)
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x", max_tokens=50)
        await gate.reached()
        deltas = [await anext(generation) for _ in range(4)]
        assert [delta.text for delta in deltas] == ["x"] * 4, "of twelve that were generated"
        gate.release()
        assert (await generation).text == "x" * 50


# --------------------------------------------------------------------------- cancelling


@asynccontextmanager
async def held_request(stage: str) -> AsyncIterator[tuple[Engine, ScriptedBackend, Any, int]]:
    """An engine with one sequence, held in a step in which the next request is at ``stage``."""
    backend = ScriptedBackend(
        lambda prompt: prompt[:1] * 40, n_seq=1, n_batch=8, n_ctx=200, acceptance=0.5
    )
    n_before = 0 if stage != "waiting" else 3
    held = {"waiting": 2, "prompt": 1, "first token": 0, "generating": 5}[stage]
    gate = backend.hold_step(held)
    async with open_scripted_engine(backend) as engine:
        if n_before:
            engine.submit("z", max_tokens=n_before, speculation=0)
        try:
            yield engine, backend, gate, held
        finally:
            gate.release()


STAGES = ["waiting", "prompt", "first token", "generating"]


async def check_freed(engine: Engine, backend: ScriptedBackend, n_steps: int) -> None:
    """The sequence is free in the step after the held one."""
    after = await engine.generate("q", max_tokens=4, speculation=0)
    assert after.text == "qqqq"
    assert backend.n_steps == n_steps + 4
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 1)
    assert stats.finished["abort"] == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["generate", "await", "iterate"])
async def test_cancelling_the_task_that_waits_frees_the_sequence(stage: str, how: str) -> None:
    prompt = "y" * (30 if stage == "prompt" else 5)
    async with held_request(stage) as (engine, backend, gate, held):

        async def wait() -> None:
            if how == "generate":
                await engine.generate(prompt)
            elif how == "await":
                await engine.submit(prompt)
            else:
                async with engine.stream(prompt) as stream:
                    async for _ in stream:
                        pass

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await gate.reached()
            n_live = 2 if stage == "waiting" else 1
            await until(lambda: engine.stats().waiting + engine.stats().running == n_live)
            group.cancel_scope.cancel()
        gate.release()
        await check_freed(engine, backend, held + 1)


@pytest.mark.parametrize("stage", STAGES)
async def test_cancel_ends_the_request_with_what_there_was(stage: str) -> None:
    prompt = "y" * (30 if stage == "prompt" else 5)
    async with held_request(stage) as (engine, backend, gate, held):
        generation = engine.submit(prompt)
        await gate.reached()
        generation.cancel()
        generation.cancel()
        gate.release()
        completion = await generation
        assert completion.finish_reason == "abort"
        assert completion.prompt_token_ids == tuple(await engine.tokenize(prompt))
        assert completion.text == "y" * len(completion.token_ids)
        deltas = [delta async for delta in generation]
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["abort"]
        await check_freed(engine, backend, held + 1)


async def test_leaving_the_stream_block_early_ends_the_request() -> None:
    async with open_scripted_engine(ScriptedBackend(n_seq=1, n_ctx=FOREVER)) as engine:
        async with engine.stream("x", **ENDLESS) as stream:
            async for _ in stream:
                break
        assert (await stream).finish_reason == "abort"
        with pytest.raises(ZeroDivisionError):
            async with engine.stream("x", **ENDLESS) as stream:
                raise ZeroDivisionError
        assert (await stream).finish_reason == "abort"
        assert engine.stats().free_sequences == 1


async def test_a_timeout_frees_the_sequence() -> None:
    async with held_request("generating") as (engine, _, gate, _):
        with anyio.move_on_after(0) as scope:
            await engine.generate("x")
        assert scope.cancelled_caught
        gate.release()
        await engine.generate("q")
        assert engine.stats().finished["abort"] == 1
        assert engine.stats().free_sequences == 1


async def test_a_request_cancelled_after_its_end_keeps_its_end() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        generation = engine.submit("x")
        completion = await generation
        generation.cancel()
        await engine.generate("y")
        assert await generation is completion
        assert engine.stats().finished["abort"] == 0


async def test_cancelling_generate_many_cancels_all_of_them() -> None:
    backend = ScriptedBackend(lambda _: "y" * 100, n_seq=2)
    gate = backend.hold_step(3)
    async with open_scripted_engine(backend) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(engine.generate_many, ["x"] * 6)
            await gate.reached()
            group.cancel_scope.cancel()
        gate.release()
        await engine.generate("q")
        assert engine.stats().finished["abort"] == 6


async def test_a_storm_of_cancellations_leaves_every_sequence_free() -> None:
    chance = random.Random(5)
    backend = ScriptedBackend(n_seq=8)
    async with open_scripted_engine(backend) as engine:
        generations = []
        for i in range(100):
            generations.append(engine.submit(f"prompt {i}", max_tokens=1 + chance.randrange(60)))
            if chance.random() < 0.5:
                chance.choice(generations).cancel()
            await anyio.lowlevel.checkpoint()
        ends = Counter([(await generation).finish_reason for generation in generations])
        stats = engine.stats()
        assert {reason: n for reason, n in stats.finished.items() if n} == ends
        assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 8)
        await engine.generate("x")
    assert not backend.active


# ------------------------------------------------------------------------ several loops


def on_asyncio(main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend="asyncio")


def on_uvloop(main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})


def on_trio(main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend="trio")


async def test_loops_of_all_kinds_share_one_engine() -> None:
    backend = ScriptedBackend(lambda prompt: f"answer to {prompt}")
    texts: dict[str, list[str]] = {}
    async with open_scripted_engine(backend) as engine:

        def client(name: str, run: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
            async def main() -> None:
                done = await engine.generate_many([f"{name} {i}" for i in range(20)])
                texts[name] = [completion.text for completion in done]
                async with engine.stream(name) as stream:
                    texts[name].append("".join([delta.text async for delta in stream]))

            run(main)

        async with anyio.create_task_group() as group:
            for name, run in [("a", on_asyncio), ("u", on_uvloop), ("t", on_trio)]:
                group.start_soon(anyio.to_thread.run_sync, client, name, run)
            here = await engine.generate("here")
        assert here.text == "answer to here"
        for name in ("a", "u", "t"):
            expected = [f"answer to {name} {i}" for i in range(20)] + [f"answer to {name}"]
            assert texts[name] == expected


async def test_a_stream_that_nobody_reads_holds_up_nobody_and_keeps_its_own_tokens_alone() -> None:
    backend = ScriptedBackend(lambda _: "y" * 1000, n_ctx=2000)
    async with open_scripted_engine(backend) as engine:
        unread = engine.submit("x", max_tokens=200)
        assert len((await engine.generate("z", max_tokens=300)).token_ids) == 300
        completion = await unread
        kept = list(unread._deltas)
        assert sum(len(delta.token_ids) for delta in kept) == 200 >= len(kept)
        assert "".join([delta.text async for delta in unread]) == completion.text == "y" * 200
        assert not unread._deltas


async def test_who_waits_for_a_loop_that_is_gone_frees_the_queue() -> None:
    """Nothing is delivered to them meanwhile."""
    backend = ScriptedBackend(n_seq=1)
    gates = [backend.hold_step(0), backend.hold_step(1)]
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x")
        await gates[0].reached()

        async def submit_and_leave() -> None:
            for _ in range(3):
                engine.submit("y")

        await anyio.to_thread.run_sync(anyio.run, submit_and_leave)
        gates[0].release()
        await gates[1].reached()
        assert engine.stats().finished["abort"] == 3
        assert running.completion is None
        gates[1].release()
        assert (await running).finish_reason == "stop"


@pytest.mark.parametrize("kind", ["asyncio", "uvloop", "trio"])
async def test_a_loop_that_is_gone_loses_its_requests_and_nobody_elses(kind: str) -> None:
    backend = ScriptedBackend(lambda _: "y" * 50, n_seq=2, n_draft_max=0)
    gate = backend.hold_step(2)
    async with open_scripted_engine(backend) as engine:
        mine = engine.submit("mine")

        async def submit() -> None:
            engine.submit("theirs, running")
            engine.submit("theirs, waiting")

        def elsewhere() -> None:
            if kind == "trio":
                trio.run(submit)
                return
            loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
            loop.run_until_complete(submit())
            loop.close()

        await anyio.to_thread.run_sync(elsewhere)
        await gate.reached()
        gate.release()
        completion = await mine
        assert completion.text == "y" * 50
        stats = engine.stats()
        assert stats.finished == {"stop": 1, "length": 0, "abort": 2, "timeout": 0, "error": 0}
        assert (stats.running, stats.waiting) == (0, 0)


async def test_waiting_on_another_loop_is_refused() -> None:
    backend = ScriptedBackend()
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x")

        async def wait() -> None:
            await generation

        with pytest.raises(InvalidRequestError, match="loop that submitted"):
            await anyio.to_thread.run_sync(on_trio, wait)
        gate.release()
        await generation


async def test_submitting_without_a_loop_is_refused() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidRequestError, match="running event loop"):
            await anyio.to_thread.run_sync(engine.submit, "x")
        assert engine.stats().waiting == 0


# ------------------------------------------------------------------------------- errors


async def test_a_failed_step_ends_those_in_it_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend(lambda _: "answer", n_seq=2, n_draft_max=0)
    backend.fail_step(3, DecodeError("no more memory"))
    async with open_scripted_engine(backend) as engine:
        generations = [engine.submit("x") for _ in range(4)]
        failed, done = [], []
        for generation in generations:
            try:
                done.append(await generation)
            except DecodeError as error:
                failed.append(error)
        assert [completion.text for completion in done] == ["answer"] * len(done)
        assert len(failed) in (1, 2), "as many as ran when the step failed"
        for failure in failed:
            assert "no more memory" in str(failure)
            assert isinstance(failure.__cause__, DecodeError)
            assert failure.completion is not None
            assert failure.completion.finish_reason == "error"
            assert "answer".startswith(failure.completion.text)
        assert len({id(failure) for failure in failed}) == len(failed)
        assert (await engine.generate("y")).text == "answer"
        assert engine.stats().finished["error"] == len(failed)
    assert any("step.failed" in record.message for record in caplog.records)


async def test_an_error_ends_an_iteration_after_what_came_before_it() -> None:
    backend = ScriptedBackend(lambda _: "answer", n_draft_max=0)
    backend.fail_step(3)
    text = ""

    async def read(generation: Generation) -> None:
        nonlocal text
        async for delta in generation:
            text += delta.text

    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x")
        with pytest.raises(DecodeError) as caught:
            await read(generation)
        assert text == "ans"
        assert caught.value.completion is generation.completion
        assert generation.completion is not None
        assert generation.completion.text == "ans"
        assert "error" in repr(generation)


async def test_generate_many_stops_at_the_first_failure() -> None:
    backend = ScriptedBackend(n_seq=1, n_ctx=FOREVER)
    backend.fail_step(5)
    async with open_scripted_engine(backend) as engine:
        with pytest.raises(DecodeError):
            await engine.generate_many(["a", "b", "c"], **ENDLESS)
        await engine.generate("q", max_tokens=1)
        finished = engine.stats().finished
        assert (finished["error"], finished["abort"]) == (1, 2)


async def test_a_bad_prompt_among_many_starts_none_of_them() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParameterError, match="prompt: is empty"):
            await engine.generate_many(["a", "b", ""])
        with pytest.raises(InvalidParameterError, match="prompts: must be a list"):
            await engine.generate_many("abc")
        await engine.generate("q")
        assert engine.stats().running == engine.stats().waiting == 0


async def test_a_bug_ends_every_request_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend(n_seq=2)
    bug = RuntimeError("boom")
    gate = backend.hold_step(0)
    backend.fail_step(2, bug)
    n_tokens: list[int] = []
    async with open_scripted_engine(backend) as engine:
        generations = [engine.submit("x", ignore_eos=True, max_tokens=99) for _ in range(5)]
        gate.release()
        for generation in generations:
            with pytest.raises(EngineDeadError, match="boom") as caught:
                await generation
            assert caught.value.__cause__ is bug
            completion = generation.completion
            assert completion is not None
            assert completion is caught.value.completion
            assert completion.finish_reason == "error"
            assert completion.prompt_token_ids == (120,)
            assert completion.timings.total == pytest.approx(0.03)
            n_tokens.append(len(completion.token_ids))
        assert max(n_tokens) > 0, "what there was is kept"
        assert engine.closed
        for call in (engine.stats, engine.check_health, lambda: engine.submit("x")):
            with pytest.raises(EngineDeadError, match="boom"):
                call()
        for wait in (engine.generate("x"), engine.tokenize("x"), engine.drain()):
            with pytest.raises(EngineDeadError, match="boom"):
                await wait
        assert "closed" in repr(engine)
    assert any("engine.died" in r.message and r.levelno == logging.ERROR for r in caplog.records)
    assert backend.closed


async def test_a_stream_that_a_crash_ends_has_all_of_its_completions_text() -> None:
    backend = ScriptedBackend(lambda _: "xyzwv", n_draft_max=0)
    backend.fail_step(3, RuntimeError("boom"))
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x", stop="zwv")
        with pytest.raises(EngineDeadError):
            await generation
        seen = ""
        with suppress(EngineDeadError):
            async for delta in generation:
                seen += delta.text
        assert generation.completion is not None
        assert seen == generation.completion.text == "xyz", "also what was held back"


# --------------------------------------------------------------------- opening, closing


async def test_closing_aborts_what_runs_and_what_waits() -> None:
    backend = ScriptedBackend(lambda _: "y" * 100, n_seq=1, n_draft_max=0)
    gate = backend.hold_step(3)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x"), engine.submit("x")
        await gate.reached()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.aclose)
            group.start_soon(engine.aclose)
            await until(lambda: engine.closed)
            gate.release()
        assert running.completion is not None
        assert waiting.completion is not None
        assert (await running).finish_reason == (await waiting).finish_reason == "abort"
        assert (await running).text == "yyyy", "the step under way counts"
        assert engine.stats().finished["abort"] == 2
    await engine.aclose()


async def test_a_closed_engine_says_so() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        pass
    for call in (engine.check_health, lambda: engine.submit("x")):
        with pytest.raises(EngineClosedError):
            call()
    waits: list[Awaitable[object]] = [
        engine.tokenize("x"),
        engine.detokenize([65]),
        engine.generate("x"),
        engine.generate_many(["x"]),
    ]
    for wait in waits:
        with pytest.raises(EngineClosedError):
            await wait
    with pytest.raises(EngineClosedError):
        async with engine.stream("x"):
            pass


async def test_an_engine_closes_even_when_its_task_is_cancelled() -> None:
    backend = ScriptedBackend()
    with anyio.CancelScope() as scope:
        async with open_scripted_engine(backend) as engine:
            scope.cancel()
            await engine.generate("x")
    assert scope.cancelled_caught
    assert backend.closed


class SlowLoader:
    """Loads as long as it is asked to go on."""

    def __init__(self) -> None:
        self.begun = False
        self.stopped = False

    def __call__(self, report: Callable[[float], bool]) -> ScriptedBackend:
        while report(0.5):
            self.begun = True
        self.stopped = True
        raise ModelLoadError("stopped")


async def test_a_cancelled_opening_stops_loading() -> None:
    load = SlowLoader()
    async with anyio.create_task_group() as group:
        group.start_soon(Engine._start, load)
        await until(lambda: load.begun)
        group.cancel_scope.cancel()
    assert load.stopped


async def test_progress_is_reported_on_the_event_loop() -> None:
    shares: list[tuple[float, bool]] = []
    here = threading.get_ident()

    def load(report: Callable[[float], bool]) -> ScriptedBackend:
        assert report(0.0)
        assert report(1.0)
        return ScriptedBackend()

    engine = await Engine._start(
        load, progress=lambda share: shares.append((share, threading.get_ident() == here))
    )
    await engine.aclose()
    assert shares == [(0.0, True), (1.0, True)]


async def test_an_error_in_the_progress_callback_ends_the_opening() -> None:
    load = SlowLoader()

    def progress(share: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Engine._start(load, progress=progress)
    assert load.stopped


async def test_a_model_that_cannot_be_loaded_fails_the_opening() -> None:
    def load(report: Callable[[float], bool]) -> ScriptedBackend:
        raise ModelLoadError("not a GGUF")

    with pytest.raises(ModelLoadError, match="not a GGUF"):
        await Engine._start(load)


async def test_a_config_the_model_cannot_serve_fails_the_opening() -> None:
    backend = ScriptedBackend(mtp=False)
    backend.config = EngineConfig(speculation=2)
    with pytest.raises(InvalidParameterError, match=r"speculation: .*no MTP heads"):
        async with open_scripted_engine(backend):
            pass
    assert backend.closed


@pytest.mark.parametrize(
    ("parameter", "model", "config"),
    [
        ("n_seq", None, {"n_seq": 0}),
        ("n_seq", None, {"n_seq": 257}),
        ("n_sec", None, {"n_sec": 4}),
        ("kv_type", None, {"kv_type": "f17"}),
        ("model", 17, {}),
    ],
)
async def test_opening_names_the_bad_parameter(
    parameter: str, model: Any, config: dict[str, Any]
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        async with Engine.open(model, **config):
            pass
    assert caught.value.parameter == parameter


# ------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("prompt", "params", "parameter", "words"),
    [
        ("", {}, "prompt", "empty"),
        ([], {}, "prompt", "empty"),
        (b"bytes", {}, "prompt", "got bytes"),
        (17, {}, "prompt", "got int"),
        (None, {}, "prompt", "got NoneType"),
        ({1, 2}, {}, "prompt", "got set"),
        ([65, 10_000], {}, "prompt", "token 10000 at index 1 is out of range: n_vocab=270"),
        ([65, -1], {}, "prompt", "token -1 at index 1"),
        ([65, 2**80], {}, "prompt", "at index 1 is out of range"),
        ([65, "a"], {}, "prompt", "'a' at index 1"),
        ([65, 1.0], {}, "prompt", "1.0 at index 1"),
        ("\ud800", {}, "prompt", "not valid Unicode"),
        ([65] * 256, {}, "prompt", "256 tokens, but a sequence holds n_ctx=256"),
        ("a", {"temperature": -1}, "temperature", ">= 0"),
        ("a", {"temperature": float("nan")}, "temperature", "nan"),
        ("a", {"max_tokens": 0}, "max_tokens", ">= 1"),
        ("a", {"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ("a", {"stop_token_ids": [270]}, "stop_token_ids", "token 270 at index 0"),
        ("a", {"logit_bias": {3: 1, 270: 1}}, "logit_bias", "token 270 at index 1"),
        ("a", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most max_tokens=8"),
        ("a", {"speculation": 4}, "speculation", "deeper than n_draft_max=3"),
    ],
)
async def test_a_bad_request_is_refused_at_once_and_names_the_parameter(
    prompt: Any, params: dict[str, Any], parameter: str, words: str
) -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParameterError) as caught:
            engine.submit(prompt, **params)
        assert caught.value.parameter == parameter
        assert words in str(caught.value)
        with pytest.raises(InvalidParameterError):
            await engine.generate(prompt, **params)
        assert engine.stats().waiting == engine.stats().running == 0


async def test_the_longest_prompt_that_fits_yields_one_token() -> None:
    async with open_scripted_engine(ScriptedBackend(n_ctx=32)) as engine:
        completion = await engine.generate([65] * 31, ignore_eos=True)
        assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


async def test_text_and_tokens_are_checked() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        assert await engine.detokenize(await engine.tokenize("naïve 日本語")) == "naïve 日本語"
        assert b"".join(engine.token_bytes[i] for i in await engine.tokenize("é")) == "é".encode()
        not_text: list[Any] = [b"x", "\ud800", None]
        for bad in not_text:
            with pytest.raises(InvalidParameterError, match=r"^text: "):
                await engine.tokenize(bad)
        with pytest.raises(InvalidParameterError, match=r"^token_ids: token 999 at index 1"):
            await engine.detokenize([1, 999])
        assert await engine.detokenize([]) == ""


class SlowTokenizer(ScriptedBackend):
    """Tokenises long texts when told to, and remembers where."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.proceed = threading.Event()
        self.begun = threading.Event()
        self.threads: list[str] = []
        self.error: Exception | None = None

    def tokenize(self, text: str, **options: Any) -> list[int]:
        if len(text) > 1000:
            self.threads.append(threading.current_thread().name)
            self.begun.set()
            assert self.proceed.wait(30)
            if self.error is not None:
                raise self.error
        return super().tokenize(text, **options)


async def test_a_long_text_is_tokenised_off_the_loop() -> None:
    backend = SlowTokenizer(n_ctx=2000)
    async with open_scripted_engine(backend) as engine:
        long, short = engine.submit("a" * 1500), engine.submit("b")
        assert (await short).finish_reason == "stop", "short ones pass it by"
        assert engine.stats().waiting == 1
        backend.proceed.set()
        assert (await long).usage.prompt_tokens == 1500
        assert backend.threads[0].startswith("mtpbatch-tokenizer")


async def test_a_long_text_found_too_long_raises_when_awaited() -> None:
    backend = SlowTokenizer()
    backend.proceed.set()
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("a" * 1500)
        with pytest.raises(PromptTooLongError, match="1500 tokens"):
            await generation
        assert generation.completion is None
        with pytest.raises(PromptTooLongError):
            await engine.generate("a" * 1500)
        with pytest.raises(InvalidParameterError, match="not valid Unicode"):
            await engine.generate("\ud800" * 1500)
        assert engine.stats().waiting == 0


async def test_a_tokenizer_that_breaks_ends_the_request() -> None:
    backend = SlowTokenizer()
    backend.error = RuntimeError("broken")
    backend.proceed.set()
    async with open_scripted_engine(backend) as engine:
        with pytest.raises(InternalError, match="broken"):
            await engine.generate("a" * 1500)


async def test_cancelling_while_a_long_text_is_tokenised() -> None:
    backend = SlowTokenizer(n_ctx=2000)
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("a" * 1500)
        generation.cancel()
        completion = await generation
        assert (completion.finish_reason, completion.token_ids) == ("abort", ())
        backend.proceed.set()
        await engine.generate("b" * 1500)
        assert engine.stats().finished["abort"] == 1


async def test_closing_waits_for_the_tokeniser() -> None:
    backend = SlowTokenizer(n_ctx=2000)
    async with open_scripted_engine(backend) as engine:
        generations = [engine.submit("a" * 1500) for _ in range(3)]
        await until(backend.begun.is_set)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.aclose)
            for generation in generations:
                assert (await generation).finish_reason == "abort"
            assert not backend.closed
            backend.proceed.set()
    assert backend.closed


# ------------------------------------------------------------------ processes, interpreter


def run_script(source: str) -> None:
    """Run a program of its own; any warning, error output or hang fails."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "end\n"


def test_a_forked_child_is_told_that_the_engine_is_its_parents() -> None:
    run_script(
        """
        import asyncio, os, warnings
        import mtpbatch
        from mtpbatch.testing import ScriptedBackend, open_scripted_engine

        def refused(call):
            try:
                result = call()
                if hasattr(result, "send"):
                    result.send(None)
            except mtpbatch.WrongProcessError as error:
                return "forked child" in str(error)
            return False

        async def main():
            backend = ScriptedBackend()
            gate = backend.hold_step(0)
            async with open_scripted_engine(backend) as engine:
                generation = engine.submit("x")
                await gate.reached()
                with warnings.catch_warnings(action="ignore"):
                    child = os.fork()
                if not child:
                    calls = [
                        lambda: engine.submit("x"),
                        lambda: engine.generate("x"),
                        lambda: engine.generate_many(["x"]),
                        lambda: engine.stream("x").__aenter__(),
                        lambda: engine.tokenize("x"),
                        lambda: engine.detokenize([1]),
                        lambda: engine.stats(),
                        lambda: engine.aclose(),
                        lambda: generation.cancel(),
                        lambda: generation.__await__(),
                    ]
                    os._exit(0 if all([refused(call) for call in calls]) else 1)
                _, status = os.waitpid(child, 0)
                assert status == 0
                gate.release()
                assert (await generation).finish_reason == "stop"
            print("end")

        asyncio.run(main())
        """
    )


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_engine_somebody_forgot_does_not_keep_the_interpreter(busy: bool, backend: str) -> None:
    run_script(
        f"""
        import anyio
        from mtpbatch.testing import ScriptedBackend
        from mtpbatch import Engine

        class Endless(ScriptedBackend):
            def close(self):
                super().close()
                print("end")

        async def main():
            global engine
            scripted = Endless(lambda _: "y" * 1000, n_ctx=10**6)
            engine = await Engine._start(lambda report: scripted)
            if {busy}:
                async with engine.stream("x", max_tokens=10**6, ignore_eos=True) as stream:
                    await stream.__anext__()
                for _ in range(9):
                    engine.submit("x", max_tokens=10**6, ignore_eos=True)

        anyio.run(main, backend={backend!r})
        """
    )


def test_a_child_that_inherits_an_engine_exits_by_itself() -> None:
    run_script(
        """
        import asyncio, os, sys, warnings
        from mtpbatch import Engine
        from mtpbatch.testing import ScriptedBackend

        async def main():
            return await Engine._start(lambda report: ScriptedBackend())

        engine = asyncio.run(main())
        with warnings.catch_warnings(action="ignore"):
            child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0
            print("end")
        """
    )
