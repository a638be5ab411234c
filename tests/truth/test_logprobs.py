"""Log probabilities are those of a softmax of llama.cpp's own logits, one sequence at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt
import pytest

import mtpbatch
from mtpbatch.native import Model
from mtpbatch.options import Depth
from mtpbatch.types import Completion, Delta, TokenLogprobs

TOLERANCE = 1e-4
COUNT = 24
LENGTHS = (1, 2, 3, 35, 36, 37, 72, 150)
PASSAGE = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, "
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n"
)
DEPTHS: tuple[int | str, ...] = (0, 3, "auto")

Matrix = npt.NDArray[np.float64]

LLAMA_CPP = """
import sys
import llama_cpp
import numpy as np

path, file = sys.argv[1:]
llama = llama_cpp.Llama(
    path, n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
)
rows = {}
for name, tokens in np.load(file).items():
    llama.reset()
    rows[name] = []
    for token in tokens:
        llama.eval([int(token)])
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        rows[name].append(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).copy())
np.savez(file, **rows)
"""

Truth = Callable[[Sequence[int]], Matrix]


@pytest.fixture(scope="module")
def truth(demo_f32_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """What llama-cpp-python makes of tokens: row i has the log probabilities of token i + 1.

    In a process of its own, token by token.
    """
    file = tmp_path_factory.mktemp("logits") / "rows.npz"
    known: dict[tuple[int, ...], Matrix] = {}

    def ask(tokens: Sequence[int]) -> Matrix:
        tokens = tuple(tokens)
        if tokens not in known:
            np.savez(file, tokens=np.array(tokens))
            subprocess.run(
                [sys.executable, "-c", LLAMA_CPP, str(demo_f32_path), str(file)],
                capture_output=True,
                timeout=120,
                check=True,
            )
            logits = np.load(file)["tokens"].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            known[tokens] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return known[tokens]

    return ask


@pytest.fixture(scope="module")
def prompts(demo_f32_path: Path) -> list[list[int]]:
    with Model(demo_f32_path) as model:
        text = model.tokenize(PASSAGE * 4, add_special=False)
    return [text[2 * i : 2 * i + length] for i, length in enumerate(LENGTHS)]


def check_token(told: TokenLogprobs, token: int, row: npt.NDArray[np.float64], k: int) -> None:
    assert told.token_id == token
    assert told.logprob == pytest.approx(row[token], abs=TOLERANCE)
    # Ranks may differ where others are as probable but for rounding.
    lowest = 1 + (row > row[token] + TOLERANCE).sum()
    highest = 1 + (row > row[token] - TOLERANCE).sum()
    assert lowest <= told.rank <= highest
    assert len({token for token, _ in told.top}) == len(told.top) == k
    best = np.sort(row)[::-1][:k]
    assert [logprob for _, logprob in told.top] == pytest.approx(list(best), abs=TOLERANCE)
    for other, logprob in told.top:
        assert logprob == pytest.approx(row[other], abs=TOLERANCE)
    if told.rank <= k:
        assert told.top[told.rank - 1] == (token, told.logprob)


def check(done: Completion, truth: Truth, k: int, prompt_k: int | None) -> None:
    prompt, answer = done.prompt_token_ids, done.token_ids
    rows = truth((*prompt, *answer))
    assert done.logprobs is not None
    assert len(done.logprobs) == len(answer)
    for i, told in enumerate(done.logprobs):
        check_token(told, answer[i], rows[len(prompt) - 1 + i], k)
    if prompt_k is None:
        assert done.prompt_logprobs is None
        return
    assert done.prompt_logprobs is not None
    assert len(done.prompt_logprobs) == len(prompt) - 1
    for i, told in enumerate(done.prompt_logprobs):
        check_token(told, prompt[i + 1], rows[i], prompt_k)


def close_to(left: Completion, right: Completion) -> None:
    """Two completions tell the same, but for rounding."""
    assert left.token_ids == right.token_ids
    for some, others in (
        (left.logprobs, right.logprobs),
        (left.prompt_logprobs, right.prompt_logprobs),
    ):
        assert some is not None
        assert others is not None
        assert [told.logprob for told in some] == pytest.approx(
            [told.logprob for told in others], abs=TOLERANCE
        )


def generate(path: Path, prompts: Sequence[list[int]], config: Any, **params: Any) -> Any:
    """Completions, and the engine's figures after them."""

    async def run() -> Any:
        given = {"n_seq": 4, "n_ctx": 256, "n_threads": 1, "kv_type": "f32"}
        async with mtpbatch.Engine.open(path, **(given | config)) as engine:
            asked = {"max_tokens": COUNT, "ignore_eos": True} | params
            done = await engine.generate_many(prompts, **asked)
            return done, engine.stats()

    return anyio.run(run)


@pytest.mark.parametrize(
    "config",
    [
        {"n_batch": 64},
        {"n_batch": 16},  # as few as there can be, and as many outputs
        {"n_batch": 64, "kv_unified": False},
        {"n_seq": 1, "n_batch": 128, "n_ubatch": 32},
    ],
    ids=["chunks", "tiny chunks", "split", "alone"],
)
@pytest.mark.parametrize("speculation", DEPTHS)
def test_all_positions(
    demo_f32_path: Path,
    prompts: list[list[int]],
    truth: Truth,
    speculation: Depth,
    config: dict[str, Any],
) -> None:
    """Several requests at once, whose prompts come in chunks, with more than one border."""
    done, stats = generate(
        demo_f32_path, prompts, config, logprobs=5, prompt_logprobs=3, speculation=speculation
    )
    for completion in done:
        check(completion, truth, 5, 3)
    assert stats.prompt_tokens == sum(LENGTHS)
    if speculation != 0:
        assert stats.accepted > 0


@pytest.mark.parametrize("speculation", DEPTHS)
def test_what_is_told_is_the_models_own_distribution(
    demo_f32_path: Path, prompts: list[list[int]], truth: Truth, speculation: Depth
) -> None:
    """Whatever cuts and temperature make of it; and asking changes no token."""
    how = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 3, "speculation": speculation}
    done, _ = generate(demo_f32_path, prompts, {"n_batch": 64}, logprobs=0, **how)
    for completion in done:
        check(completion, truth, 0, None)
    assert any(told.rank > 1 for completion in done for told in completion.logprobs)
    plain, _ = generate(demo_f32_path, prompts, {"n_batch": 64}, **how)
    assert [c.token_ids for c in plain] == [c.token_ids for c in done]
    assert all(c.logprobs is c.prompt_logprobs is None for c in plain)


@pytest.mark.parametrize("speculation", DEPTHS)
def test_a_stop_text_cuts_log_probabilities_with_the_tokens(
    demo_f32_path: Path, prompts: list[list[int]], truth: Truth, speculation: Depth
) -> None:
    async def run() -> None:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=2, n_ctx=256, n_threads=1, kv_type="f32", speculation=speculation
        ) as engine:
            ask: dict[str, Any] = {"ignore_eos": True, "logprobs": 2, "prompt_logprobs": 0}
            prompt = prompts[-1]
            whole = await engine.generate(prompt, max_tokens=COUNT, **ask)
            check(whole, truth, 2, 0)
            n_cut = 0
            for begin in range(0, len(whole.text) - 3, 2):
                stop = whole.text[begin : begin + 3]
                async with engine.stream(prompt, max_tokens=COUNT, stop=stop, **ask) as deltas:
                    seen: list[Delta] = [delta async for delta in deltas]
                done = await deltas
                assert done.finish_reason == "stop"
                n_cut += len(done.token_ids) < COUNT
                assert done.token_ids == whole.token_ids[: len(done.token_ids)]
                check(done, truth, 2, 0)
                assert all(len(d.logprobs or ()) == len(d.token_ids) for d in seen)
                assert tuple(t for d in seen for t in d.logprobs or ()) == done.logprobs
            assert n_cut > 3

    anyio.run(run)


def test_who_pauses_loses_and_doubles_nothing(
    demo_f32_path: Path, prompts: list[list[int]], truth: Truth
) -> None:
    """Answers that outgrow the cells pause, with their state or without; a prompt starts again."""
    asked = [prompts[3], prompts[4], prompts[5], prompts[6], prompts[3]]
    for memory in (0, 64):
        done, stats = generate(
            demo_f32_path,
            asked,
            {"n_batch": 16, "n_cells": 256, "snapshot_memory": memory},
            max_tokens=100,
            logprobs=1,
            prompt_logprobs=1,
            speculation=3,
        )
        assert stats.preemptions > 0
        for completion in done:
            check(completion, truth, 1, 1)


def test_a_prompt_that_is_scored_is_computed_and_may_be_saved(
    demo_f32_path: Path, prompts: list[list[int]], truth: Truth
) -> None:
    async def run() -> None:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=2, n_ctx=256, n_threads=1, kv_type="f32", n_batch=64
        ) as engine:
            ask: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
            for _ in range(2):
                done = await engine.generate(prompts[-1], logprobs=1, prompt_logprobs=1, **ask)
                assert done.usage.cached_tokens == 0
                check(done, truth, 1, 1)
            more = [*prompts[-1], *done.token_ids, 5]
            follower = await engine.generate(more, logprobs=1, **ask)
            assert follower.usage.cached_tokens >= len(prompts[-1])
            check(follower, truth, 1, None)
            assert engine.stats().prefix_queries == len(more)

    anyio.run(run)
