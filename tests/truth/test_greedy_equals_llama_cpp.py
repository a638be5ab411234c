"""What the engine says in company is what llama.cpp says alone, with drafts and without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import mtpbatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports is not ours to mend
    import llama_cpp

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep.\n\nimport os\nimport sys\n\n\nclass Queue:\n"
    "    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self.items = []\n\n"
)
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 21, 34, 47, 63, 64, 65, 89, 144)  # n_batch is 64
N_TOKENS = 48
N_CTX = 256


@pytest.fixture(scope="module")
def prompts(demo_f32_path: Path) -> list[list[int]]:
    """Sixteen prompts of different lengths and beginnings, as token ids."""
    llm = llama_cpp.Llama(str(demo_f32_path), vocab_only=True, verbose=False)
    tokens = llm.tokenize((TEXT * 2).encode(), add_bos=False)
    return [tokens[7 * i : 7 * i + length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(demo_f32_path: Path, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Greedy answers of llama-cpp-python, one sequence at a time."""
    return [tuple(tokens) for tokens in _one_by_one(demo_f32_path, prompts)]


def _one_by_one(path: Path, prompts: list[list[int]]) -> Iterator[list[int]]:
    llm = llama_cpp.Llama(
        str(path), n_ctx=N_CTX, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
    )
    for prompt in prompts:
        llm.reset()
        answer = []
        for token in llm.generate(prompt, temp=0.0):
            answer.append(token)
            if len(answer) == N_TOKENS:
                break
        yield answer


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_sixteen_at_once_equal_one_by_one(
    demo_f32_path: Path,
    prompts: list[list[int]],
    expected: list[tuple[int, ...]],
    depth: int,
    kv_unified: bool,
) -> None:
    async def ask() -> list[mtpbatch.Completion]:
        async with mtpbatch.Engine.open(
            demo_f32_path,
            n_seq=16,
            n_ctx=N_CTX,
            n_batch=64,
            n_draft_max=3,
            n_threads=1,
            kv_type="f32",
            kv_unified=kv_unified,
        ) as engine:
            return await engine.generate_many(
                prompts, max_tokens=N_TOKENS, ignore_eos=True, speculation=depth
            )

    completions = anyio.run(ask)
    assert [done.token_ids for done in completions] == expected
    if depth:
        assert all(done.accepted > 0 for done in completions)
    else:
        assert all(done.drafted == 0 for done in completions)


def test_more_requests_than_sequences_equal_one_by_one(
    demo_f32_path: Path, prompts: list[list[int]], expected: list[tuple[int, ...]]
) -> None:
    """Sequences that come and go at different times: continuous batching changes nothing."""

    async def ask() -> list[mtpbatch.Completion]:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=3, n_ctx=N_CTX, n_batch=32, n_threads=1, kv_type="f32"
        ) as engine:
            generations = [
                engine.submit(prompt, max_tokens=8 + 8 * (i % 6), ignore_eos=True)
                for i, prompt in enumerate(prompts)
            ]
            return [await generation for generation in generations]

    for i, done in enumerate(anyio.run(ask)):
        assert done.token_ids == expected[i][: 8 + 8 * (i % 6)]
