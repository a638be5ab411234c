"""Several answers to one prompt on real models: computed once, and nothing else for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mtpbatch
import random_model

pytestmark = pytest.mark.anyio

N = 6  # more than there are sequences


@pytest.fixture(scope="module")
def model_paths(
    demo_f32_path: Path, dense_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    glm = tmp_path_factory.mktemp("models") / "glm.gguf"
    random_model.write_random_glm4moe(glm, vocab=300, mix=0.3)
    return {"recurrent": demo_f32_path, "attention": glm, "without heads": dense_path}


@pytest.mark.parametrize(
    ("kind", "speculation"),
    [
        ("recurrent", 0),
        ("recurrent", 3),
        ("recurrent", "auto"),
        ("attention", 0),
        ("attention", 3),
        ("without heads", 0),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_they_are_those_of_requests_of_their_own(
    model_paths: dict[str, Path], kind: str, speculation: Any
) -> None:
    params: dict[str, Any] = {
        "max_tokens": 12,
        "temperature": 1.0,
        "ignore_eos": True,
        "speculation": speculation,
    }
    prompt = [(7 * i) % 290 for i in range(149)]
    async with mtpbatch.Engine.open(
        model_paths[kind], n_seq=4, n_ctx=256, n_batch=64, kv_type="f32", n_threads=1
    ) as engine:
        alone = [
            await engine.generate(prompt, seed=40 + i, reuse_prefix=False, **params)
            for i in range(N)
        ]
        n_prompt = engine.stats().prompt_tokens
        assert n_prompt == N * len(prompt)
        answers = await engine.generate_n(prompt, N, seed=40, **params)
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
        assert len({a.token_ids for a in answers}) > 1
        cached = sorted(a.usage.cached_tokens for a in answers)
        assert cached == [0] + [len(prompt) - 1] * (N - 1)
        assert engine.stats().prompt_tokens - n_prompt == len(prompt) + N - 1
        if speculation != "auto":  # which need not draft yet
            assert any(a.drafted for a in answers) == bool(speculation)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_without_snapshots_each_of_them_computes_the_prompt(demo_f32_path: Path) -> None:
    async with mtpbatch.Engine.open(
        demo_f32_path, n_seq=2, n_ctx=256, snapshot_memory=0, kv_type="f32", n_threads=1
    ) as engine:
        answers = await engine.generate_n([5] * 100, 3, max_tokens=4, ignore_eos=True)
        assert [a.usage.cached_tokens for a in answers] == [0, 0, 0]
        assert engine.stats().prompt_tokens == 300
        assert len({a.token_ids for a in answers}) == 1, "without a temperature they are the same"
