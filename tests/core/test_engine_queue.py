"""How requests come in and how they end: the bounded queue, timeouts, and every stage of a request.

The real engine on a scripted model, whose clock moves when it is told to: nothing sleeps.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from mtpbatch import (
    Completion,
    Delta,
    Engine,
    EngineDeadError,
    EngineOverloaded,
    Generation,
    InvalidParameterError,
    PromptTooLongError,
    SamplingOptions,
)
from mtpbatch.testing import ScriptedBackend, StepGate, open_scripted_engine
from mtpbatch.types import Plan, StepResult
from patience import until

pytestmark = pytest.mark.anyio

ENDLESS: dict[str, Any] = {"max_tokens": 10**6, "ignore_eos": True}


async def until_there_are(n_requests: int, engine: Engine) -> None:
    await until(lambda: engine.stats().waiting + engine.stats().running == n_requests)


class Model(ScriptedBackend):
    """Tokenises long texts when told to, and is held soon after it has parked somebody."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda prompt: prompt[:1] * 500, n_draft_max=0, **options)
        self.tokenising = threading.Event()
        self.may_tokenise = threading.Event()
        self.parked_gate: StepGate | None = None
        self.seeds: list[int] = []

    def tokenize(self, text: str, **options: Any) -> list[int]:
        if len(text) > 1000:
            self.tokenising.set()
            assert self.may_tokenise.wait(30)
        return super().tokenize(text, **options)

    def exchange(self, plan: Plan | None, **waiting: Any) -> list[StepResult]:
        if plan is not None:
            self.seeds += [admission.seed for admission in plan.admit]
            if plan.park and self.parked_gate is None:
                self.parked_gate = self.hold_step(self.n_steps + 2)  # a plan before it may wait
        return super().exchange(plan, **waiting)


# ------------------------------------------------------------------------ stages of a request

STAGES = ["tokenising", "in line", "queued", "mid-prefill", "mid-step", "parked", "delivering"]
BEFORE_IT_BEGINS = STAGES[:3]


class Scene:
    """An engine in which one request is at a stage, and the step under way is held."""

    def __init__(self, stage: str, **params: Any) -> None:
        self.stage = stage
        self.prompt = "y" * {"tokenising": 1500, "mid-prefill": 30}.get(stage, 5)
        self.params = ENDLESS | params
        self.deltas: list[Delta] = []
        self.completions: list[Completion] = []
        self.scope = anyio.CancelScope()  # of the task that waits
        self.over = anyio.Event()  # so is that task
        self.go_on = anyio.Event()  # for a consumer that has stopped reading
        sizes = {"n_cells": 60, "n_ctx": 60, "n_seq": 2} if stage == "parked" else {"n_seq": 1}
        n_waiting = 0 if stage == "in line" else 5
        self.backend = Model(**{"n_ctx": 2000, "n_batch": 8} | sizes, max_waiting=n_waiting)
        self.blocker: Generation | None = None
        self.gates: list[StepGate] = []
        if stage in ("in line", "queued", "parked"):
            self.gates.append(self.backend.hold_step(0))
        if stage != "parked":
            self.gates.append(self.backend.hold_step(1 if stage == "mid-prefill" else 5))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Engine]:
        """The block is entered when the request is at its stage."""
        try:
            async with open_scripted_engine(self.backend) as engine:
                if self.stage in ("in line", "queued", "parked"):
                    self.blocker = engine.submit("z", **ENDLESS)
                    await self.gates[0].reached()
                async with anyio.create_task_group() as group:
                    group.start_soon(self.ask, engine)
                    await self.reach(engine)
                    yield engine
        finally:
            self.release()

    async def ask(self, engine: Engine) -> None:
        with self.scope:
            if self.stage == "delivering":
                async with engine.stream(self.prompt, **self.params) as stream:
                    self.deltas.append(await anext(stream))
                    await self.go_on.wait()
                    self.deltas += [delta async for delta in stream]
                    self.completions.append(await stream)
            else:
                self.completions.append(await engine.generate(self.prompt, **self.params))
        self.over.set()

    async def reach(self, engine: Engine) -> None:
        if self.stage == "tokenising":
            await until(self.backend.tokenising.is_set)
            return
        if self.blocker is not None:
            await until_there_are(2, engine)
            self.gates.pop(0).release()
        if self.stage == "parked":
            await until(lambda: self.backend.parked_gate is not None)
            assert self.backend.parked_gate is not None
            self.gates.append(self.backend.parked_gate)
        if self.stage == "delivering":
            await until(lambda: bool(self.deltas))
        await self.gates[0].reached()
        assert bool(self.backend.parked) == (self.stage == "parked")

    def release(self) -> None:
        for gate in self.gates:
            gate.release()
        self.backend.may_tokenise.set()
        self.go_on.set()

    async def check_freed(self, engine: Engine, reason: str) -> None:
        """All that the request had is free for others."""
        ends = [reason, "length"]
        if self.blocker is not None:
            self.blocker.cancel()
            ends.append((await self.blocker).finish_reason)
        assert (await engine.generate("q", max_tokens=1)).text == "q"
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_sequences == stats.n_seq
        assert {end: n for end, n in stats.finished.items() if n} == Counter(ends)
        if self.stage in BEFORE_IT_BEGINS:
            assert stats.prompt_tokens == len(ends) - 1, "it was never prefilled"
        assert not self.backend.parked
        assert engine._intake.live == {}
        assert len(engine._intake._timeouts) == 0
        assert len(engine._intake._backlog) == 0


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelling_the_task_frees_everything_within_one_step(stage: str) -> None:
    scene = Scene(stage)
    async with scene.open() as engine:
        n_steps = scene.backend.n_steps
        scene.scope.cancel()
        await scene.over.wait()
        scene.release()
        await scene.check_freed(engine, "abort")
        if scene.blocker is None:
            assert scene.backend.n_steps == n_steps + 1, "the next step is the other request's"
    assert scene.completions == []
    assert not scene.backend.active


@pytest.mark.parametrize("stage", STAGES)
async def test_a_timeout_ends_a_request_at_every_stage(stage: str) -> None:
    scene = Scene(stage, timeout=100.0)
    async with scene.open() as engine:
        scene.backend.clock.advance(100.0)
        if stage != "tokenising":
            scene.release()
        await scene.over.wait()
        scene.release()
        await scene.check_freed(engine, "timeout")
    [completion] = scene.completions
    assert completion.finish_reason == "timeout"
    assert completion.text == "y" * len(completion.token_ids), "what there was is kept"
    if stage in ("mid-step", "delivering"):
        assert len(completion.token_ids) == 6, "the step under way counts"
    else:
        assert bool(completion.token_ids) == (stage == "parked")
    n_prompt = 0 if stage == "tokenising" else len(scene.prompt)
    assert completion.usage.prompt_tokens == len(completion.prompt_token_ids) == n_prompt
    assert completion.usage.completion_tokens == len(completion.token_ids)
    assert completion.timings.total >= 100.0
    assert bool(completion.timings.first_token) == bool(completion.token_ids)
    if stage == "delivering":
        assert "".join(delta.text for delta in scene.deltas) == completion.text
        assert [d.finish_reason for d in scene.deltas if d.finish_reason] == ["timeout"]


@pytest.mark.parametrize("stage", STAGES)
async def test_a_queue_timeout_ends_only_who_has_not_begun(stage: str) -> None:
    scene = Scene(stage, queue_timeout=50.0, timeout=100.0)
    async with scene.open() as engine:
        clock = scene.backend.clock
        later = scene.backend.hold_step(scene.backend.n_steps + 2)
        clock.advance(50.0)
        if stage in BEFORE_IT_BEGINS:
            if stage == "tokenising":
                later.release()
            else:
                scene.release()
            await scene.over.wait()
            later.release()
        else:
            scene.release()
            await later.reached()
            assert engine.stats().finished["timeout"] == 0
            clock.advance(50.0)
            later.release()
            await scene.over.wait()
        scene.release()
        await scene.check_freed(engine, "timeout")
    assert (scene.completions[0].timings.total >= 100.0) == (stage not in BEFORE_IT_BEGINS)


async def test_who_asks_for_no_timeout_has_none() -> None:
    backend = Model(n_seq=1)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        generation = engine.submit("x", max_tokens=3)
        await gate.reached()
        backend.clock.advance(1e9)
        gate.release()
        assert (await generation).finish_reason == "length"


# ----------------------------------------------------------------------- the bounded queue


async def test_submit_raises_at_once_when_the_queue_is_full() -> None:
    backend = Model(n_seq=2, max_waiting=3)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        generations = [engine.submit(f"{i}abc", max_tokens=3) for i in range(5)]
        await gate.reached()
        with pytest.raises(EngineOverloaded) as caught:
            engine.submit("x", max_tokens=3)
        error = caught.value
        assert error.running + error.waiting == 5
        assert (error.max_waiting, error.max_waiting_tokens) == (3, None)
        with pytest.raises(EngineOverloaded):
            engine.submit("x" * 1500)  # not even tokenised
        assert not backend.tokenising.is_set()
        generations[4].cancel()
        gate.release()
        assert (await generations[4]).finish_reason == "abort"
        assert (await engine.submit("x", max_tokens=3)).text == "xxx", "there is room again"
        for number, generation in enumerate(generations[:4]):
            assert (await generation).text == str(number) * 3
        assert engine.stats().finished["abort"] == 1


async def test_any_call_is_rejected_at_once_if_the_engine_is_opened_so() -> None:
    backend = Model(n_seq=1, max_waiting=0, on_full="reject")
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x", max_tokens=3)

        async def stream() -> None:
            async with engine.stream("y"):
                pytest.fail("the block was entered")

        async def stream_chat() -> None:
            async with engine.stream_chat([{"role": "user", "content": "y"}]):
                pytest.fail("the block was entered")

        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: engine.generate("y"),
            lambda: engine.generate_many(["y"]),
            lambda: engine.generate_n("y", 2),
            lambda: engine.chat([{"role": "user", "content": "y"}]),
            stream,
            stream_chat,
        ]
        for call in calls:
            with pytest.raises(EngineOverloaded, match="max_waiting=0"):
                await call()
        gate.release()
        assert (await running).text == "xxx"
        assert sum(engine.stats().finished.values()) == 1


async def test_tasks_wait_for_room_and_come_in_the_order_of_their_calls() -> None:
    backend = Model(n_seq=1, max_waiting=0)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:

        async def ask(number: int) -> None:
            # The most urgent ones come last: in line that counts for nothing.
            params: SamplingOptions = {"max_tokens": 2, "priority": -number, "seed": number}
            if number % 2:
                await engine.generate(f"{number}", **params)
            else:
                async with engine.stream(f"{number}", **params) as stream:
                    await stream

        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(ask, number)
                await until_there_are(number + 1, engine)
            with pytest.raises(EngineOverloaded):
                engine.submit("x")
            gate.release()
    assert backend.seeds == list(range(12))


async def test_prompts_are_taken_as_there_is_room_for_them() -> None:
    backend = Model(n_seq=2, max_waiting=3)
    gate = backend.hold_step(0)
    taken = 0

    def prompts() -> Any:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield f"{number % 10}"

    async with open_scripted_engine(backend) as engine, anyio.create_task_group() as group:

        async def ask() -> None:
            done = await engine.generate_many(prompts(), max_tokens=2)
            assert [c.text for c in done] == [f"{n % 10}" * 2 for n in range(40)]

        group.start_soon(ask)
        await gate.reached()
        await until_there_are(6, engine)
        assert taken == 6, "five have room, and one waits for it"
        gate.release()
    assert taken == 40


async def test_an_error_of_the_apps_own_prompts_is_raised_as_it_is() -> None:
    def prompts() -> Any:
        yield "a"
        raise ZeroDivisionError

    async with open_scripted_engine(Model()) as engine:
        with pytest.raises(ZeroDivisionError):
            await engine.generate_many(prompts(), **ENDLESS)
        await engine.generate("q", max_tokens=1)
        assert engine.stats().running == engine.stats().waiting == 0


async def test_the_tokens_of_prompts_that_wait_are_bounded() -> None:
    backend = Model(n_seq=1, n_ctx=4000, max_waiting_tokens=1600)
    backend.may_tokenise.set()
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("a" * 1900, max_tokens=1)  # a sequence is free for it
        await gate.reached()
        fits = engine.submit("b" * 1500, max_tokens=1)
        await until(lambda: engine._intake._backlog._n_tokens == 1500)
        too_much = engine.submit("c" * 1500, max_tokens=1)
        await anyio.to_thread.run_sync(lambda: engine._tokenizer.submit(int, 1500).result())
        with pytest.raises(EngineOverloaded, match="1500 tokens"):
            engine.submit("d" * 101)
        small = engine.submit("e" * 100, max_tokens=1)
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                assert (await engine.generate("f" * 900, max_tokens=1)).text == "f"

            group.start_soon(wait)
            await until(lambda: len(engine._intake._backlog._line) == 1)
            gate.release()
        with pytest.raises(EngineOverloaded) as caught:
            await too_much
        assert (caught.value.waiting, caught.value.waiting_tokens) == (1, 1500)
        for generation, text in ((running, "a"), (fits, "b"), (small, "e")):
            assert (await generation).text == text


async def test_the_room_that_one_loop_frees_is_anothers() -> None:
    backend = Model(n_seq=1, max_waiting=0)
    gate = backend.hold_step(0)
    texts: list[str] = []
    async with open_scripted_engine(backend) as engine:
        mine = engine.submit("m", max_tokens=2)
        await gate.reached()

        def elsewhere(kind: str) -> None:
            async def ask() -> None:
                async with engine.stream(kind[0], max_tokens=2) as stream:
                    texts.append((await stream).text)

            anyio.run(ask, backend=kind)

        async with anyio.create_task_group() as group:
            for kind in ("asyncio", "trio"):
                group.start_soon(anyio.to_thread.run_sync, elsewhere, kind)
            await until_there_are(3, engine)
            gate.release()
        assert (await mine).text == "mm"
    assert sorted(texts) == ["aa", "tt"]


async def test_a_storm_of_tasks_that_come_and_go_loses_no_room() -> None:
    backend = Model(n_seq=2, max_waiting=2, max_waiting_tokens=20)
    async with open_scripted_engine(backend) as engine:

        async def ask(number: int) -> None:
            with anyio.CancelScope() as scope:
                if number % 3 == 0:
                    scope.cancel()
                await engine.generate("x" * (1 + number % 17), max_tokens=1 + number % 5)

        async with anyio.create_task_group() as group:
            for number in range(120):
                group.start_soon(ask, number)
                await anyio.lowlevel.checkpoint()
        await engine.generate("x", max_tokens=1)
        finished = engine.stats().finished
        assert finished["length"] + finished["abort"] == 121
        assert 1 <= finished["abort"] <= 40, "some may have ended by then"
        assert len(engine._intake._backlog) == 0


@pytest.mark.parametrize("end", ["closed", "died"])
async def test_who_stands_in_line_is_told_of_the_engines_end(end: str) -> None:
    backend = Model(n_seq=1, max_waiting=0)
    gate = backend.hold_step(1)
    if end == "died":
        backend.fail_step(1, RuntimeError("boom"))
    ends: list[str] = []
    async with open_scripted_engine(backend) as engine:
        engine.submit("x", **ENDLESS)

        async def ask() -> None:
            try:
                async with engine.stream("y") as stream:
                    ends.append((await stream).finish_reason)
            except EngineDeadError:
                ends.append("died")

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await gate.reached()
            await until(lambda: engine.stats().waiting == 1)
            if end == "closed":
                group.start_soon(engine.aclose)
                await until(lambda: engine.closed)
            gate.release()
    assert ends == ["abort" if end == "closed" else "died"]


# --------------------------------------------------------------------------------- metadata


async def test_metadata_comes_back_with_the_completion() -> None:
    given: dict[str, str | int | float | bool | None] = {
        "user": "u-17",
        "attempt": 2,
        "share": 0.5,
        "beta": True,
        "trace": None,
    }
    async with open_scripted_engine(Model()) as engine:
        done = await engine.generate("x", max_tokens=1, metadata=given)
        assert done.metadata == given
        assert done.metadata is not given
        assert (await engine.generate("x", max_tokens=1)).metadata == {}
        many = await engine.generate_many(["x", "y"], max_tokens=1, metadata=given)
        assert [done.metadata for done in many] == [given, given]


@pytest.mark.parametrize("metadata", [{"a": [1]}, {"a": object()}, {1: "a"}, "text", None])
async def test_metadata_is_plain(metadata: Any) -> None:
    async with open_scripted_engine(Model()) as engine:
        with pytest.raises(InvalidParameterError, match=r"^metadata: must be a dict, each key"):
            engine.submit("x", metadata=metadata)


@pytest.mark.parametrize("name", ["timeout", "queue_timeout"])
@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "soon"])
async def test_a_bad_timeout_names_itself(name: str, seconds: Any) -> None:
    async with open_scripted_engine(Model()) as engine:
        with pytest.raises(InvalidParameterError, match=f"^{name}: "):
            engine.submit("x", **{name: seconds})


# ------------------------------------------------------------------------ n answers of a prompt


@pytest.mark.parametrize("truncates", [True, False], ids=["truncates", "recurrent"])
async def test_n_answers_compute_their_prompt_once(truncates: bool) -> None:
    backend = Model(n_seq=3, n_ctx=2000, truncates=truncates)
    backend.may_tokenise.set()
    async with open_scripted_engine(backend) as engine:
        done = await engine.generate_n("x" * 1500, 7, seed=2**32 - 3, max_tokens=4)
        assert [completion.text for completion in done] == ["xxxx"] * 7
        assert sorted(c.usage.cached_tokens for c in done) == [0, *[1499] * 6]
        assert engine.stats().prompt_tokens == 1500 + 6
        assert sorted(backend.seeds) == [0, 1, 2, 3, 2**32 - 3, 2**32 - 2, 2**32 - 1]


@pytest.mark.parametrize(
    ("model", "params"), [({"snapshot_memory": 0}, {}), ({}, {"reuse_prefix": False})]
)
async def test_n_answers_compute_their_prompt_n_times_if_nothing_may_be_kept(
    model: dict[str, Any], params: dict[str, Any]
) -> None:
    async with open_scripted_engine(Model(**model)) as engine:
        done = await engine.generate_n([65] * 100, 3, max_tokens=2, **params)
        assert [c.usage.cached_tokens for c in done] == [0, 0, 0]
        assert engine.stats().prompt_tokens == 300


async def test_n_answers_without_a_seed_have_different_ones() -> None:
    backend = Model()
    async with open_scripted_engine(backend) as engine:
        await engine.generate_n("x", 5, max_tokens=1)
        assert len(set(backend.seeds)) == 5


async def test_n_submitted_answers_are_those_of_generate_n() -> None:
    """They share the prompt, have the same seeds, and have deltas only if somebody follows."""
    backend = Model(n_seq=3, n_ctx=2000)
    async with open_scripted_engine(backend) as engine:
        for followed in (True, False):
            generations = engine.submit_n(
                [65] * 500,
                3,
                followed=followed,
                seed=2**32 - 1,
                max_tokens=4,
                reuse_prefix=followed,
            )
            done = [await generation for generation in generations]
            assert [sum([1 async for _ in g]) > 0 for g in generations] == [followed] * 3
            cached = [c.usage.cached_tokens for c in done]
            assert sorted(cached) == ([0, 499, 499] if followed else [0, 0, 0])
        assert sorted(backend.seeds) == [0, 0, 1, 1, 2**32 - 1, 2**32 - 1]


async def test_of_n_submitted_answers_all_or_none_are_begun() -> None:
    async with open_scripted_engine(Model(n_seq=1, max_waiting=2)) as engine:
        with pytest.raises(EngineOverloaded):
            engine.submit_n("x", 4, **ENDLESS)
        await until(lambda: engine.stats().finished["abort"] == 3)
        assert [(await g).finish_reason for g in engine.submit_n("x", 3, max_tokens=1)] == [
            "length"
        ] * 3


async def test_a_submitted_request_tells_when_it_is_in_the_queue_or_why_it_never_is() -> None:
    backend = Model(n_seq=1, n_ctx=64)
    backend.may_tokenise.set()
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        running, waiting = engine.submit("x", max_tokens=1), engine.submit("x", max_tokens=1)
        await waiting.entered()
        assert waiting.completion is None
        gate.release()
        with pytest.raises(PromptTooLongError):
            await engine.submit("x" * 2000).entered()
        await running
        await waiting
        await waiting.entered()


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2", None])
async def test_the_number_of_answers_is_checked(n: Any) -> None:
    async with open_scripted_engine(Model()) as engine:
        with pytest.raises(InvalidParameterError, match=r"^n: must be a whole number, at least 1"):
            await engine.generate_n("x", n)
        with pytest.raises(InvalidParameterError, match=r"^n: must be a whole number, at least 1"):
            engine.submit_n("x", n)
        with pytest.raises(InvalidParameterError, match=r"^prompt: is empty"):
            await engine.generate_n("", 2)


async def test_cancelling_n_answers_cancels_all_of_them() -> None:
    backend = Model(n_seq=2)
    gate = backend.hold_step(3)
    async with open_scripted_engine(backend) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.generate_n("x", 6, **ENDLESS))
            await gate.reached()
            group.cancel_scope.cancel()
        gate.release()
        await engine.generate("q", max_tokens=1)
        assert engine.stats().finished["abort"] == 6
