"""Answers that keep to a form, on the packaged model, with drafts and without."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import pytest

import mtpbatch
import random_schemas
from mtpbatch.structured.trial import Trial
from mtpbatch.types import GrammarSource, Isolation

pytestmark = pytest.mark.anyio

PROMPT = "And it came to pass"
MAX_TOKENS = 120


class Person(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    age: Annotated[int, msgspec.Meta(ge=0, le=120)]


class Pet(pydantic.BaseModel):
    name: str
    legs: int = pydantic.Field(ge=0, le=8)


POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "y": {"enum": ["up", "down"]},
    },
    "required": ["x", "y"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json_schema": POINT},
    {"json_schema": json.dumps(POINT)},
    {"json_schema": Person},
    {"json_schema": Pet},
    {"regex": r"[a-z]{3,9}( [a-z]{2,5}){2}\."},
    {"choice": ("yes", "no", 'neither "yes" nor\nno', "né")},
    {"grammar": 'start: "<" WORD ("," WORD){0,3} ">"\nWORD: /[a-z]{1,4}/'},
    {"grammar": 'root ::= "(" item ")"\nitem ::= [0-9]{1,3} | "x" [0-9] "y"'},
]


def fits(text: str, form: dict[str, Any]) -> bool:
    """Whether a text is as asked for, by whoever knows nothing of grammars."""
    match form:
        case {"json_schema": dict() | str()}:
            return random_schemas.is_valid(text, POINT)
        case {"json_schema": kind} if kind is Person:
            return isinstance(msgspec.json.decode(text, type=Person), Person)
        case {"json_schema": _}:
            return isinstance(Pet.model_validate_json(text), Pet)
        case {"regex": pattern}:
            return re.fullmatch(pattern, text) is not None
        case {"choice": texts}:
            return text in texts
        case {"grammar": grammar} if "root" in grammar:
            return re.fullmatch(r"\(([0-9]{1,3}|x[0-9]y)\)", text) is not None
        case _:
            return re.fullmatch(r"<[a-z]{1,4}(,[a-z]{1,4}){0,3}>", text) is not None


@pytest.fixture
async def engine(demo_f32_path: Path, isolation: Isolation) -> AsyncIterator[mtpbatch.Engine]:
    async with mtpbatch.Engine.open(
        demo_f32_path, n_seq=6, n_ctx=256, n_threads=1, kv_type="f32", isolation=isolation
    ) as engine:
        yield engine
        assert engine.stats().running == 0, "a test left a request running"


async def ask_all(
    engine: mtpbatch.Engine, asked: list[dict[str, Any]], **params: Any
) -> list[mtpbatch.Completion]:
    generations = [engine.submit(PROMPT, **one, **params) for one in asked]
    return [await generation for generation in generations]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["best", "sampled"])
async def test_answers_fit_and_are_the_same_with_drafts(
    engine: mtpbatch.Engine, sampling: dict[str, Any]
) -> None:
    """Half of those that run are free to say anything, and say what they say alone."""
    asked = [one for form in FORMS for one in (form, {})]
    free = await engine.generate(PROMPT, max_tokens=MAX_TOKENS, speculation=0, **sampling)
    texts = []
    for depth in (0, 3, "auto"):
        found = await ask_all(engine, asked, max_tokens=MAX_TOKENS, speculation=depth, **sampling)
        texts.append([done.token_ids for done in found])
        assert {done.token_ids for done in found[1::2]} == {free.token_ids}
        for done, form in zip(found[::2], FORMS, strict=True):
            assert done.finish_reason == "stop"
            assert fits(done.text, form), done.text
        if depth != "auto":
            assert any(done.accepted for done in found[::2]) == (depth == 3)
    assert texts[0] == texts[1] == texts[2]


async def test_texts_that_can_only_be_as_they_are_come_in_the_models_tokens(
    engine: mtpbatch.Engine,
) -> None:
    text = "In the beginning God created the heaven"
    done = await engine.generate(PROMPT, choice=[text])
    assert done.text == text
    assert list(done.token_ids[:-1]) == await engine.tokenize(text, add_special=False)
    assert done.token_ids[-1] in engine.model.eog_token_ids


async def test_an_answer_that_is_cut_off_says_so(engine: mtpbatch.Engine) -> None:
    done = await engine.generate(PROMPT, regex="(ab){100}", max_tokens=10)
    assert done.finish_reason == "length"
    assert ("ab" * 100).startswith(done.text)


async def test_it_may_be_followed_and_chatted_with(engine: mtpbatch.Engine) -> None:
    async with engine.stream(PROMPT, choice=["yes", "no"]) as deltas:
        text = "".join([delta.text async for delta in deltas])
    assert text in ("yes", "no")
    answer = await engine.chat([{"role": "user", "content": "Well?"}], choice=["yes", "no"])
    assert answer.content in ("yes", "no")


async def test_what_cannot_be_done_is_refused_before_it_takes_a_sequence(
    engine: mtpbatch.Engine,
) -> None:
    for params in ({"regex": "(?=a)"}, {"json_schema": {"type": "array", "uniqueItems": True}}):
        generation = engine.submit(PROMPT, **params)
        with pytest.raises(mtpbatch.InvalidParameterError, match=f"^{next(iter(params))}: cannot"):
            await generation
        assert generation.completion is None
    with pytest.raises(mtpbatch.InvalidParameterError, match="json_schema: must be"):
        engine.submit(PROMPT, json_schema=7)
    assert engine.stats().prompt_tokens == 0


async def test_a_grammar_that_takes_too_much_later_ends_its_request_alone(
    engine: mtpbatch.Engine,
) -> None:
    """The bomb lies further on than grammars are tried."""
    alone = await engine.generate(PROMPT, max_tokens=60, speculation=3)
    async with engine.stream(PROMPT, max_tokens=60, speculation=3) as neighbour:
        with pytest.raises(mtpbatch.GrammarError, match="too many expressions") as caught:
            await engine.generate(
                PROMPT, regex="[a-z ]{100}((a{100}){100}){100}", max_tokens=200, speculation=3
            )
        assert (await neighbour).token_ids == alone.token_ids
    completion = caught.value.completion
    assert completion is not None
    assert completion.finish_reason == "error"
    assert re.fullmatch(r"[a-z ]{80,100}a*", completion.text)
    assert (await engine.generate(PROMPT, choice=["yes"])).text == "yes"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_an_answer_of_which_all_that_is_left_is_forbidden_ends_alone(
    engine: mtpbatch.Engine, temperature: float
) -> None:
    """Not with "stop", and not by a word that is forbidden."""
    word = "".join(engine.token_bytes[token].decode() for token in await engine.tokenize("self"))
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_tokens": 40}
    alone = await engine.generate(PROMPT, **asked)
    found = set()
    for speculation in (0, 3):
        neighbour = engine.submit(PROMPT, **asked)
        generation = engine.submit(
            PROMPT,
            regex=f"(one two three )+{word}",
            bad_words=["two", "tw", "t", "w", "o", word],
            speculation=speculation,
            **asked,
        )
        with pytest.raises(mtpbatch.GrammarError, match="forbidden by bad_words") as caught:
            await generation
        completion = caught.value.completion
        assert completion is not None
        assert completion.finish_reason == "error"
        assert "".join([delta.text for delta in generation._deltas]) == completion.text
        assert (await neighbour).token_ids == alone.token_ids
        found.add((completion.text, completion.token_ids))
    assert len(found) == 1
    [(text, _)] = found
    assert "one two three ".startswith(text)


@pytest.mark.parametrize("form", [{"choice": ("yes", "no")}, {"min_tokens": 60}], ids=str)
async def test_xtc_from_a_probability_of_0_on_takes_nothing_that_cannot_come(
    engine: mtpbatch.Engine, form: dict[str, Any]
) -> None:
    done = await engine.generate(
        PROMPT,
        **form,
        temperature=1.0,
        seed=1,
        xtc_probability=1.0,
        xtc_threshold=0.0,
        stop_token_ids=[0] if "min_tokens" in form else [],
        max_tokens=60,
    )
    assert len(done.token_ids) == 60 if "min_tokens" in form else done.text in form["choice"]


@pytest.mark.parametrize("isolation", ["none"])
async def test_who_is_cancelled_while_its_grammar_is_compiled_ends_at_once(
    engine: mtpbatch.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, released = Trial.compile, threading.Event()

    def held(self: Trial, source: GrammarSource) -> str:
        assert released.wait(30)
        return compile_(self, source)

    monkeypatch.setattr(Trial, "compile", held)
    generation = engine.submit(PROMPT, regex="abc")
    generation.cancel()
    assert (await generation).finish_reason == "abort"
    assert generation.completion is not None
    assert generation.completion.usage.prompt_tokens == 0
    released.set()
    assert (await engine.generate(PROMPT, regex="abc")).text == "abc"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_paused_answers_go_on_where_they_were(demo_f32_path: Path) -> None:
    """With too few cells for all, and with none to keep the states of those that pause."""
    asked = [{"regex": rf"([a-z]{{{n},{n + 9}}} ){{99}}", "seed": n} for n in range(1, 5)]
    answers = []
    scarce: dict[str, Any] = {"n_cells": 300, "snapshot_memory": 0}
    for memory in ({}, scarce, {**scarce, "snapshot_memory": 64}):
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=4, n_ctx=256, n_threads=1, kv_type="f32", **memory
        ) as engine:
            found = await ask_all(engine, asked, max_tokens=200, temperature=0.8)
            answers.append([done.token_ids for done in found])
            assert (engine.stats().preemptions > 0) == ("n_cells" in memory)
    assert answers[0] == answers[1] == answers[2]


async def test_closing_ends_answers_under_way(demo_path: Path) -> None:
    async with mtpbatch.Engine.open(demo_path, n_seq=2, n_ctx=512, n_threads=1) as engine:
        generation = engine.submit(PROMPT, regex="[a-z ]{400}", max_tokens=400)
        await anext(generation)
        waiting = engine.submit(PROMPT, regex="[a-z]{3}")
    assert (await generation).finish_reason == "abort"
    assert (await waiting).finish_reason in ("abort", "stop")


@pytest.mark.parametrize("isolation", ["none"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_random_schemas(engine: mtpbatch.Engine) -> None:
    """`tools/random_schemas.py` does the same with any number of them."""
    for depth in (0, 3):
        counts = await random_schemas.check(
            engine, range(40), max_tokens=80, temperature=1.0, speculation=depth
        )
        assert counts["stop"] >= 20
        assert counts["refused"] <= 8
