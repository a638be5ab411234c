"""The scripted model keeps its word, so that apps can be tested with it."""

from __future__ import annotations

import pytest

from mtpbatch.testing import ScriptedBackend, VirtualClock, open_scripted_engine


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
