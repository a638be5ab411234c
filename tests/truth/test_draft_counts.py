"""What is drafted and accepted is what a numpy simulation of MTP drafting drafts and accepts.

A wrong hidden row, a cache entry too many or a rejected token left behind changes no text, only
these counts.
"""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import mtpbatch
from reference.qwen35_numpy import Reference

PROMPTS = (
    "And it came to pass in those days, that",
    "def __init__(self, name):\n",
    "In",
)
N_TOKENS = 64
N_SEQ = 4


async def _generate(
    path: Path, prompts: list[str], depth: int, *, kv_unified: bool = True
) -> list[mtpbatch.Completion]:
    async with mtpbatch.Engine.open(
        path,
        n_seq=N_SEQ,
        n_ctx=256,
        n_draft_max=4,
        n_threads=1,
        kv_type="f32",
        kv_unified=kv_unified,
    ) as engine:
        return await engine.generate_many(
            prompts, max_tokens=N_TOKENS, ignore_eos=True, speculation=depth
        )


@pytest.fixture(scope="module")
def reference(demo_f32_path: Path) -> Reference:
    return Reference(demo_f32_path)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("depth", [1, 3])
def test_counts_of_one_sequence_equal_the_simulation(
    demo_f32_path: Path, reference: Reference, prompt: str, depth: int
) -> None:
    (done,) = anyio.run(_generate, demo_f32_path, [prompt], depth)
    simulated = reference.simulate_drafting(done.prompt_token_ids, N_TOKENS, depth)
    assert list(done.token_ids) == simulated.tokens
    assert (done.drafted, done.accepted) == (simulated.drafted, simulated.accepted)
    assert list(done.accepted_by_depth[:depth]) == simulated.accepted_by_depth
    assert done.steps == simulated.steps + 1  # the prompt's own decode gives the first token


@pytest.mark.parametrize("kv_unified", [True, False])
def test_acceptance_does_not_depend_on_the_sequence_id_or_the_neighbours(
    demo_f32_path: Path, kv_unified: bool
) -> None:
    """The same prompt first and last among others counts as it does alone."""
    first, *others = PROMPTS
    alone = anyio.run(_generate, demo_f32_path, [first], 3)[0]
    prompts = [first, *others, first]
    assert len(prompts) == N_SEQ

    async def together() -> list[mtpbatch.Completion]:
        return await _generate(demo_f32_path, prompts, 3, kv_unified=kv_unified)

    completions = anyio.run(together)
    for done in (completions[0], completions[-1]):
        assert done.token_ids == alone.token_ids
        assert (done.drafted, done.accepted) == (alone.drafted, alone.accepted)
        assert done.accepted_by_depth == alone.accepted_by_depth


def test_acceptance_after_a_long_undrafted_stretch_is_what_it_would_have_been(
    demo_f32_path: Path, reference: Reference
) -> None:
    """A prompt longer than a batch, whose pairs wait for the draft context, changes nothing."""

    async def ask() -> mtpbatch.Completion:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=2, n_ctx=512, n_batch=48, n_threads=1, kv_type="f32"
        ) as engine:
            prompt = (engine.tokenize(" ".join(PROMPTS)) * 20)[:330]
            return await engine.generate(prompt, max_tokens=N_TOKENS, ignore_eos=True)

    done = anyio.run(ask)
    simulated = reference.simulate_drafting(done.prompt_token_ids, N_TOKENS, 3)
    assert list(done.token_ids) == simulated.tokens
    assert (done.drafted, done.accepted) == (simulated.drafted, simulated.accepted)
