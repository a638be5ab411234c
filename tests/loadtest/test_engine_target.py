"""An engine in this process, as a target: what is written down is what the engine says."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

import mtpbatch
from mtpbatch import InvalidParameterError
from mtpbatch.loadtest import datasets
from mtpbatch.loadtest.answer import Answer, RequestFailed, Tally
from mtpbatch.loadtest.arrivals import ClosedLoop, Level
from mtpbatch.loadtest.datasets import Prompt, Work
from mtpbatch.loadtest.driver import Load, Run
from mtpbatch.loadtest.targets import EngineTarget, open_engine
from mtpbatch.testing import Fixed
from patience import until

pytestmark = pytest.mark.anyio

SMALL: dict[str, Any] = {"n_seq": 3, "n_ctx": 256, "n_threads": 1}


def work_of(prompt: Prompt, max_tokens: int = 20) -> Work:
    return Work(prompt=prompt, prompt_tokens=None, max_tokens=max_tokens, cancel_after=None)


async def ask(target: EngineTarget, work: Work) -> Answer:
    answer = Answer(time.monotonic, Tally(), None, lambda: None)
    await target.ask(0, work, answer)
    return answer


async def test_an_answer_is_what_the_engine_says(demo_path: Path) -> None:
    params: dict[str, Any] = {"ignore_eos": True, "speculation": 3, "temperature": 0}
    async with mtpbatch.Engine.open(demo_path, **SMALL) as engine:
        answer = await ask(EngineTarget(engine, params), work_of("In the beginning"))
        done = await engine.generate("In the beginning", max_tokens=20, **params)
    assert answer.prompt_tokens == done.usage.prompt_tokens
    assert answer.output_tokens == sum(answer.tokens) == 20
    assert (answer.drafted, answer.accepted) == (done.drafted, done.accepted)
    assert answer.drafted
    # A chunk for each step: several tokens where drafts were accepted.
    assert len(answer.times) == answer.steps == done.steps < 20
    assert answer.finish_reason == "length"
    assert list(answer.times) == sorted(answer.times)


async def test_conversations_go_through_the_models_template(demo_path: Path) -> None:
    messages = ({"role": "user", "content": "In the beginning"},)
    async with mtpbatch.Engine.open(demo_path, **SMALL) as engine:
        text = engine.apply_chat_template(messages)
        tokens = await engine.tokenize(text, add_special=False)
        answer = await ask(EngineTarget(engine, {}), work_of(messages))
        by_ids = await ask(EngineTarget(engine, {}), work_of(tuple(tokens)))
    assert answer.prompt_tokens == by_ids.prompt_tokens == len(tokens)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("word " * 500, "prompt too long"),
        ((10**8,), "invalid parameter"),
        ("", "invalid parameter"),
    ],
)
async def test_what_an_engine_refuses_is_an_error_by_its_kind(
    demo_path: Path, prompt: Prompt, kind: str
) -> None:
    async with open_engine(str(demo_path), SMALL, {}) as target:
        with pytest.raises(RequestFailed) as caught:
            await ask(target, work_of(prompt))
    assert caught.value.kind == kind


async def test_a_full_engine_is_overloaded(demo_path: Path) -> None:
    config = SMALL | {"n_seq": 1, "max_waiting": 1, "on_full": "reject"}
    load = Load(arrivals=ClosedLoop(Level(6, 6)), n_requests=6, seconds=None, timeout=60)
    work = datasets.work(datasets.builtin(), Fixed(50), 1, 0.0, seed=1)
    async with open_engine(str(demo_path), config, {"ignore_eos": True}) as target:
        run = Run(target, load, work)
        observed = await run()
    assert set(run.tally.errors) == {"overloaded"}
    outcomes = [(record.outcome, record.error) for record in observed.requests]
    assert outcomes.count(("ok", None)) + outcomes.count(("error", "overloaded")) == 6
    assert ("ok", None) in outcomes


async def test_cancelled_requests_free_their_sequences(demo_path: Path) -> None:
    load = Load(arrivals=ClosedLoop(Level(3, 3)), n_requests=9, seconds=None, timeout=60)
    async with mtpbatch.Engine.open(demo_path, **SMALL) as engine:
        target = EngineTarget(engine, {"ignore_eos": True})
        work = datasets.work(datasets.builtin(), Fixed(100), 1, 1.0, seed=1)
        planned = list(itertools.islice(work, 9))
        observed = await Run(target, load, iter(planned))()
        with anyio.fail_after(60):
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
    for record, planned_one in zip(observed.requests, planned, strict=True):
        assert record.outcome == "cancelled"
        assert planned_one.cancel_after is not None
        # The chunk with that token was the last.
        before_last = record.output_tokens - (record.chunks[-1][1] if record.chunks else 0)
        assert before_last <= planned_one.cancel_after <= record.output_tokens


async def test_wrong_parameters_are_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(InvalidParameterError, match="params: temperature: must be"):
        async with open_engine("nowhere.gguf", {}, {"temperature": -1}):
            pass


async def test_the_record_says_with_which_settings_the_engine_was_opened(demo_path: Path) -> None:
    async with open_engine(str(demo_path), SMALL | {"n_draft_max": 2}, {}) as target:
        facts = target.facts
    assert facts["model"] == "demo.gguf (qwen35, 2.8M)"
    assert (facts["n_seq"], facts["n_ctx"], facts["n_draft_max"]) == (3, 256, 2)
