"""Batched greedy decoding gives the tokens of llama-cpp-python's own, one sequence at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

import loops
import mtpbatch
from greedy_script import GREEDY
from mtpbatch.native import NativeBackend
from mtpbatch.types import Admission, EngineConfig, Plan, PlanEntry, SamplingParams

N_BATCH = 96
COUNT = 40
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 95, 96, 97, 144, 200, 230)
PASSAGES = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, ",
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n",
    "In the beginning God created the heaven and the earth. And the earth was without form, ",
)
# Where the best two logits are closer than this, the order of summation may decide.
TIE = 1e-3


@pytest.fixture(scope="module")
def prompts(demo_f32_path: Path) -> list[list[int]]:
    """16 prompts from one token to more than two batches, each starting somewhere else."""
    with mtpbatch.native.Model(demo_f32_path) as model:
        text = model.tokenize("".join(PASSAGES) * 8, add_special=False)
    return [text[3 * i : 3 * i + length] for i, length in enumerate(LENGTHS)]


LLAMA_CPP = """
import json, sys
import llama_cpp
import numpy as np

path, count, tie, prompts = json.load(sys.stdin)
llama = llama_cpp.Llama(
    path, n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
)
"""


@pytest.fixture(scope="module")
def expected(demo_f32_path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """llama-cpp-python's tokens, up to the first near-tie; from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP + GREEDY],
        input=json.dumps([str(demo_f32_path), COUNT, TIE, prompts]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    texts: list[list[int]] = json.loads(done.stdout)
    assert sum(map(len, texts)) > 0.9 * COUNT * len(texts)  # ties are rare
    return texts


def check(found: Sequence[Sequence[int]], expected: list[list[int]]) -> None:
    for tokens, truth in zip(found, expected, strict=True):
        assert list(tokens[: len(truth)]) == truth
        assert len(tokens) == COUNT


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_plans(
    demo_f32_path: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    depth: int,
    kv_unified: bool,
) -> None:
    """Prompts are fed in chunks while those that are done with theirs go on."""
    n = len(prompts)
    backend = NativeBackend(
        demo_f32_path,
        EngineConfig(
            n_seq=n,
            n_ctx=512,
            n_batch=N_BATCH,
            n_threads=1,
            kv_type="f32",
            kv_unified=kv_unified,
        ),
    )
    texts: list[list[int]] = [[] for _ in prompts]
    fed = [0] * n
    active = list(range(n))
    release: tuple[int, ...] = ()
    while active:
        admit: list[Admission] = []
        entries = []
        room = N_BATCH
        for i in (i for i in active if texts[i]):
            n_draft = min(depth, COUNT - len(texts[i]) - 1)
            entries.append(PlanEntry(i, (), True, n_draft))
            room -= 1 + n_draft
        for i in (i for i in active if not texts[i]):
            if room < 1:
                break
            if not fed[i]:
                admit.append(Admission(i, SamplingParams(), 0, (), COUNT))
            chunk = prompts[i][fed[i] : fed[i] + room]
            fed[i] += len(chunk)
            room -= len(chunk)
            entries.append(PlanEntry(i, tuple(chunk), fed[i] == len(prompts[i]), 0))
        result = loops.execute(backend, Plan(release, tuple(admit), tuple(entries)))
        for entry, outcome in zip(entries, result.entries, strict=True):
            texts[entry.seq_id] += outcome.token_ids
        release = tuple(
            entry.seq_id
            for entry, outcome in zip(entries, result.entries, strict=True)
            if outcome.finish_reason
        )
        active = [i for i in active if i not in release]
    backend.close()
    check(texts, expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_engine(
    demo_f32_path: Path, prompts: list[list[int]], expected: list[list[int]], depth: int
) -> None:
    """16 requests at once."""

    async def generate() -> list[mtpbatch.Completion]:
        async with mtpbatch.Engine.open(
            demo_f32_path,
            n_seq=16,
            n_ctx=512,
            n_batch=N_BATCH,
            n_threads=1,
            kv_type="f32",
            speculation=depth,
        ) as engine:
            return await engine.generate_many(prompts, max_tokens=COUNT, ignore_eos=True)

    done = anyio.run(generate)
    check([completion.token_ids for completion in done], expected)
    for completion in done:
        assert completion.finish_reason == "length"
        assert (completion.drafted > 0) == (depth > 0)
