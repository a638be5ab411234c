"""The engine while its app keeps the GIL in one call of C code: steps need no Python."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import mtpbatch
from mtpbatch.native import NativeBackend
from mtpbatch.types import NO_RESULT, Plan, StepResult

pytestmark = pytest.mark.anyio


def keep_the_gil() -> None:
    """For about half a second, in which no other thread can run Python."""
    sum(range(30_000_000))


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps with a part in them that each exchange of an engine gave."""
    exchange, n_steps = NativeBackend.exchange, list[int]()

    def watched(self: NativeBackend, plan: Plan | None, **waiting: Any) -> list[StepResult]:
        results = exchange(self, plan, **waiting)
        n_steps.append(sum(set(result.entries) != {NO_RESULT} for result in results))
        return results

    monkeypatch.setattr(NativeBackend, "exchange", watched)
    return n_steps


@pytest.fixture
async def engine(dense_path: Path) -> AsyncIterator[mtpbatch.Engine]:
    async with mtpbatch.Engine.open(dense_path, n_seq=1, n_ctx=4096, n_threads=1) as engine:
        yield engine


async def test_hundreds_of_steps_pass_meanwhile(
    engine: mtpbatch.Engine, exchanged: list[int]
) -> None:
    async with engine.stream("In the", max_tokens=1000, ignore_eos=True) as deltas:
        await anext(deltas)
        keep_the_gil()
        done = await deltas
    assert len(done.token_ids) == 1000
    assert max(exchanged) > 200


async def test_neither_does_one_that_keeps_to_a_grammar_wait(
    demo_path: Path, exchanged: list[int]
) -> None:
    async with (
        mtpbatch.Engine.open(demo_path, n_seq=1, n_ctx=1024, n_threads=1) as engine,
        engine.stream("In the", max_tokens=900, regex="[a-z ]{5000}") as deltas,
    ):
        await anext(deltas)
        keep_the_gil()
        done = await deltas
    assert len(done.token_ids) == 900
    assert max(exchanged) > 30


async def test_none_pass_for_who_was_cancelled_before(
    engine: mtpbatch.Engine, exchanged: list[int]
) -> None:
    """The backend hears of it at once, not only the engine's thread, which needs the GIL."""
    async with engine.stream("In the", max_tokens=4000, ignore_eos=True) as deltas:
        await anext(deltas)
        deltas.cancel()
        keep_the_gil()
        done = await deltas
    assert done.finish_reason == "abort"
    assert max(exchanged) < 500
