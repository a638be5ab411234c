"""Embeddings beside generations, on the packaged model and on each event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

import mtpbatch
from mtpbatch.types import Isolation

pytestmark = pytest.mark.anyio

TEXTS = ["In the beginning", "def main(", "And it came to pass in those days", "import os\n"] * 4


@pytest.fixture
async def engine(demo_f32_path: Path, isolation: Isolation) -> AsyncIterator[mtpbatch.Engine]:
    sizes: dict[str, Any] = {"n_seq": 4, "n_ctx": 256, "n_batch": 32, "n_threads": 1}
    async with mtpbatch.Engine.open(
        demo_f32_path, kv_type="f32", isolation=isolation, **sizes
    ) as engine:
        yield engine


async def test_embeddings_and_generations_leave_each_other_alone(engine: mtpbatch.Engine) -> None:
    text = (await engine.generate(TEXTS[0], max_tokens=40, ignore_eos=True)).text
    alone = await engine.embed(TEXTS)
    together: list[mtpbatch.Embeddings] = []
    texts: list[str] = []

    async def embed() -> None:
        together.append(await engine.embed(TEXTS))

    async def generate() -> None:
        done = await engine.generate(
            TEXTS[0], max_tokens=40, ignore_eos=True, reuse_prefix=False, speculation=3
        )
        texts.append(done.text)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(embed)
            group.start_soon(generate)
    assert texts == [text] * 4
    for found in together:
        np.testing.assert_allclose(found.vectors, alone.vectors, atol=1e-5)
        assert found.prompt_tokens == alone.prompt_tokens
    np.testing.assert_allclose(np.linalg.norm(alone.vectors, axis=1), np.ones(16), rtol=1e-6)
    np.testing.assert_allclose(alone.vectors[:4], alone.vectors[4:8], atol=1e-5)


async def test_closing_the_engine_ends_who_waits(engine: mtpbatch.Engine) -> None:
    errors: list[str] = []

    async def embed() -> None:
        with pytest.raises(mtpbatch.EngineClosedError) as caught:
            await engine.embed(TEXTS * 1000)
        errors.append(str(caught.value))

    async with anyio.create_task_group() as group:
        group.start_soon(embed)
        await engine.embed(TEXTS[:1])  # meanwhile the other one has come in
        await engine.aclose()
    assert errors == ["the engine is closed; open another one"]


async def test_a_timeout_ends_the_wait_and_the_engine_goes_on(engine: mtpbatch.Engine) -> None:
    with anyio.move_on_after(0.05) as scope:
        await engine.embed(TEXTS * 1000)
    assert scope.cancelled_caught
    assert len((await engine.embed(TEXTS[:1])).vectors) == 1
