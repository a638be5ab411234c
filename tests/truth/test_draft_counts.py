"""Draft and accept counts are those of a numpy simulation of MTP drafting."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import loops
import mtpbatch
from mtpbatch.native import Context, Model, MtpSession
from mtpbatch.types import Completion
from reference.qwen35_numpy import Drafting, Reference

PROMPTS = (
    "And it came to pass in those days, that",
    "def fib(n):\n    if n < 2:\n",
    "In the",
    "import os\nimport sys\n\n\nclass",
)
COUNT = 48


@pytest.fixture(scope="module")
def prompts(demo_f32_path: Path) -> list[list[int]]:
    with Model(demo_f32_path) as model:
        return [model.tokenize(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=[1, 3])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def simulated(demo_f32_path: Path, prompts: list[list[int]], depth: int) -> list[Drafting]:
    reference = Reference(demo_f32_path)
    found = [reference.simulate_drafting(prompt, COUNT, depth) for prompt in prompts]
    assert sum(drafting.accepted for drafting in found) > 0
    return found


def check(done: Completion, truth: Drafting) -> None:
    assert list(done.token_ids) == truth.tokens
    assert done.drafted == truth.drafted
    assert done.accepted == truth.accepted
    by_depth = (*done.accepted_by_depth, 0, 0, 0)
    assert list(by_depth[: len(truth.accepted_by_depth)]) == truth.accepted_by_depth


@pytest.mark.parametrize("n_seq", [1, 4])
def test_engine(
    demo_f32_path: Path,
    prompts: list[list[int]],
    depth: int,
    simulated: list[Drafting],
    n_seq: int,
) -> None:
    """One request at a time, and all at once."""

    async def generate() -> list[Completion]:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=n_seq, n_ctx=256, n_threads=1, kv_type="f32", speculation=depth
        ) as engine:
            return await engine.generate_many(prompts, max_tokens=COUNT, ignore_eos=True)

    for done, truth in zip(anyio.run(generate), simulated, strict=True):
        check(done, truth)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_the_first_and_the_last_sequence_agree(
    demo_f32_path: Path,
    prompts: list[list[int]],
    depth: int,
    simulated: list[Drafting],
    kv_unified: bool,
) -> None:
    """With other prompts between them, on a session driven by hand."""
    n_seq = 6
    with Model(demo_f32_path) as model:
        target = Context(
            model,
            n_seq=n_seq,
            n_ctx=256,
            n_rs_seq=depth,
            n_threads=1,
            kv_type="f32",
            kv_unified=kv_unified,
        )
        session = MtpSession(target, Context.mtp(target), n_seq, depth)
    same, *others = prompts
    beside = {s: others[s % len(others)] for s in range(1, n_seq - 1)}
    asked = {0: same, **beside, n_seq - 1: same}
    streams = loops.drafted(target, session, asked, COUNT, lambda *_: depth)
    for s in (0, n_seq - 1):
        assert streams[s].tokens[:COUNT] == simulated[0].tokens
        assert streams[s].drafted == simulated[0].drafted
        assert streams[s].accepted == simulated[0].accepted
    statistics = session.statistics()
    assert statistics.drafted == sum(stream.drafted for stream in streams.values())
    assert statistics.accepted == sum(stream.accepted for stream in streams.values())
