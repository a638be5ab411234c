"""``mtpbatch generate``: prompts in, text or JSON records out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import msgspec

from mtpbatch.engine import Engine
from mtpbatch.generation import Generation


async def generate(
    prompts: Sequence[str],
    model: str | None,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Run all prompts at once; write their texts in order, or records as they end."""
    async with Engine.open(model, **config) as engine:
        generations = [engine.submit(prompt, **params) for prompt in prompts]
        if as_json:
            async with anyio.create_task_group() as tasks:
                for prompt, generation in zip(prompts, generations, strict=True):
                    tasks.start_soon(_write_record, prompt, generation)
        else:
            for prompt, generation in zip(prompts, generations, strict=True):
                await _write_text(prompt, generation, headed=len(prompts) > 1)


async def _write_text(prompt: str, generation: Generation, *, headed: bool) -> None:
    """Stream one text; those after it run meanwhile and are kept by their handles."""
    if headed:
        print(f"==> {prompt}")
    async for delta in generation:
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print()


async def _write_record(prompt: str, generation: Generation) -> None:
    record = {"prompt": prompt, **msgspec.to_builtins(await generation)}
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    sys.stdout.flush()
