"""The scripted model keeps its word, so that apps can be tested with it."""

from __future__ import annotations

import pytest

from mtpbatch.testing import ScriptedBackend, VirtualClock, open_scripted_engine
from mtpbatch.types import (
    NO_RESULT,
    Admission,
    Plan,
    PlanEntry,
    SamplingParams,
    TokenLogprobs,
)


@pytest.mark.anyio
async def test_the_example_of_the_module() -> None:
    backend = ScriptedBackend(lambda prompt: f"You said: {prompt}")
    async with open_scripted_engine(backend) as engine:
        assert (await engine.generate("hello")).text == "You said: hello"


@pytest.mark.anyio
async def test_acceptance_can_follow_a_pattern() -> None:
    backend = ScriptedBackend(lambda _: "xyzw" * 8, acceptance=[True, True, False])
    async with open_scripted_engine(backend) as engine:
        completion = await engine.generate("q", max_tokens=13)
        # Drafts of the tokens 2, 5, 8 and 11 are wrong, so that steps end with these.
        assert (completion.accepted_by_depth, completion.steps) == ((4, 3, 0), 6)


@pytest.mark.anyio
@pytest.mark.parametrize(("acceptance", "steps"), [(0.0, 13), (1.0, 4)])
async def test_acceptance_decides_how_many_steps_an_answer_takes(
    acceptance: float, steps: int
) -> None:
    backend = ScriptedBackend(lambda _: "xyzw" * 8, acceptance=acceptance)
    async with open_scripted_engine(backend) as engine:
        completion = await engine.generate("q", max_tokens=13)
        assert (completion.text, completion.steps) == ("xyzwxyzwxyzwx", steps)


@pytest.mark.anyio
async def test_the_model_is_certain_of_each_token() -> None:
    async with open_scripted_engine(ScriptedBackend(lambda _: "xyz")) as engine:
        done = await engine.generate("abq", logprobs=2, prompt_logprobs=0)
        x, y, z, end = done.token_ids
        assert done.logprobs == tuple(TokenLogprobs(t, 0.0, 1, ((t, 0.0),)) for t in (x, y, z, end))
        assert done.prompt_logprobs == tuple(
            TokenLogprobs(t, 0.0, 1) for t in done.prompt_token_ids[1:]
        )
        async with engine.stream("abq", logprobs=2) as deltas:
            seen = [delta async for delta in deltas]
        assert tuple(t for d in seen for t in d.logprobs or ()) == done.logprobs


def test_what_a_waiting_plan_releases_leaves_before_the_plans_ahead_of_it() -> None:
    """As with a real model: a cancelled request does not wait for plans to be begun."""
    backend = ScriptedBackend(lambda _: "abcdef" * 20)
    admissions = tuple(Admission(s, SamplingParams(), 1, (), 50) for s in range(2))
    prompts = tuple(PlanEntry(s, (65 + s,), True, 0) for s in range(2))
    decodes = tuple(PlanEntry(s, (), True, 0) for s in range(2))
    [first] = backend.exchange(Plan((), admissions, prompts, number=1), wait=True)
    assert all(len(entry.token_ids) == 1 for entry in first.entries)
    backend.exchange(Plan((), (), decodes, number=2), wait=False)
    backend.exchange(Plan((0,), (), ()), wait=False)
    # Admitted by a plan that waits as well: it leaves when that has been begun.
    backend.exchange(Plan((), (admissions[0],), (prompts[0],), number=3), wait=False)
    backend.exchange(Plan((0,), (), ()), wait=False)
    [second] = backend.exchange(None, wait=True)
    assert [len(entry.token_ids) for entry in second.entries] == [0, 1]
    [third] = backend.exchange(None, wait=True)
    assert third.entries == (NO_RESULT,)
    backend.exchange(Plan((1,), (), ()), wait=False)
    backend.wake()
    assert backend.exchange(None, wait=True) == []
    assert not backend.active


def test_its_answers_are_the_same_every_time() -> None:
    one, other = ScriptedBackend(), ScriptedBackend()
    assert one.answer("prompt", 50) == other.answer("prompt", 50)
    assert one.answer("prompt", 50) != one.answer("another", 50)


def test_its_vocabulary_splits_characters_and_joins_letters() -> None:
    backend = ScriptedBackend()
    assert len(backend.tokenize("日")) == 3
    assert len(backend.tokenize(" the")) == 1
    assert backend.detokenize(backend.tokenize("the old €5 tower 日本語")) == (
        "the old €5 tower 日本語"
    )


def test_a_virtual_clock_moves_when_told_to() -> None:
    clock = VirtualClock(5.0)
    clock.advance(1.5)
    assert clock() == 6.5
    with pytest.raises(ValueError, match="backwards"):
        clock.advance(-1.0)
