"""Sampled tokens follow the model's own distribution, with drafts and without.

Token frequencies are compared by chi-square with the softmax of a numpy reference, for the token
after the prompt and for those after it, which drafts have a hand in. Seeds are fixed, so that the
outcome is too.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray

import mtpbatch
import random_model
from reference.qwen35_numpy import Reference

N_REQUESTS = 2500
N_TOKENS = 5
MOST_Z = 4.0  # standard deviations that the pooled statistic may lie above its mean
PROMPT = (70, 71, 72)

Distribution = NDArray[np.float64]


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with few tokens, whose head is sometimes right and often wrong."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    shape = dataclasses.replace(random_model.RANDOM_SHAPE, vocab=290, width=64, ff=64, layers=2)
    random_model.write_random(path, shape, mix=0.15, seed=3)
    return path


@pytest.fixture(scope="module")
def reference(small_path: Path) -> Reference:
    return Reference(small_path)


async def _sample(path: Path, depth: int, params: dict[str, Any]) -> list[mtpbatch.Completion]:
    async with mtpbatch.Engine.open(
        path, n_seq=32, n_ctx=32, n_draft_max=4, n_threads=1, kv_type="f32"
    ) as engine:
        generations = [
            engine.submit(
                PROMPT,
                max_tokens=N_TOKENS,
                seed=seed,
                ignore_eos=True,
                speculation=depth,
                **params,
            )
            for seed in range(N_REQUESTS)
        ]
        return [await generation for generation in generations]


def _expected(
    logits: Distribution,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Distribution:
    """The distribution that the parameters ask for: tails cut on the model's own, then heated."""
    order = np.argsort(-logits)
    if top_k:
        order = order[:top_k]
    p = np.exp(logits[order] - logits[order[0]])
    p /= p.sum()
    n_kept = int(np.searchsorted(np.cumsum(p), top_p) + 1) if top_p < 1 else len(p)
    order, p = order[:n_kept], p[:n_kept]
    order = order[p >= min_p * p[0]]
    heated = np.exp((logits[order] - logits[order[0]]) / temperature)
    result = np.zeros(len(logits))
    result[order] = heated / heated.sum()
    return result


def _chi_square(counts: Counter[int], expected: Distribution) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare tokens are counted together."""
    n = counts.total()
    often = [t for t in range(len(expected)) if expected[t] * n >= 5]
    pairs = [(counts[t], expected[t] * n) for t in often]
    rest = n - sum(e for _, e in pairs)
    if rest >= 5:
        pairs.append((n - sum(o for o, _ in pairs), rest))
    return sum((o - e) ** 2 / e for o, e in pairs), len(pairs) - 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 6},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
    ],
    ids=lambda params: " ".join(params),
)
def test_frequencies_pass_a_chi_square_test(
    small_path: Path, reference: Reference, params: dict[str, Any]
) -> None:
    answers = {}
    for depth in (0, 3):
        completions = anyio.run(_sample, small_path, depth, params)
        answers[depth] = [done.token_ids for done in completions]
        accepted = sum(done.accepted for done in completions)
        drafted = sum(done.drafted for done in completions)
        if depth:  # else the test would not see what verification does
            assert 0.1 * drafted < accepted < 0.9 * drafted

        statistic, freedom = 0.0, 0
        for n_known in range(N_TOKENS):
            after: dict[tuple[int, ...], Counter[int]] = {}
            for answer in answers[depth]:
                after.setdefault(answer[:n_known], Counter())[answer[n_known]] += 1
            for known, counts in after.items():
                if counts.total() < 100:
                    continue
                _, logits = reference.trunk([*PROMPT, *known])
                expected = _expected(logits[-1], **params)
                impossible = [t for t in counts if expected[t] == 0]
                assert not impossible, f"tokens that the parameters rule out: {impossible}"
                one, degrees = _chi_square(counts, expected)
                statistic += one
                freedom += degrees
        assert freedom > 20, "too few samples to tell anything"
        assert (statistic - freedom) / math.sqrt(2 * freedom) < MOST_Z

    # The same seed gives the same tokens; rounding may turn a draw that falls on a border.
    same = sum(a == b for a, b in zip(answers[0], answers[3], strict=True))
    assert same >= 0.998 * N_REQUESTS


def test_the_test_would_notice() -> None:
    """A distribution slightly off fails the chi-square test that the others pass."""
    random = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    drawn = Counter(random.choice(4, size=N_REQUESTS, p=p).tolist())
    statistic, freedom = _chi_square(drawn, p)
    assert (statistic - freedom) / math.sqrt(2 * freedom) < MOST_Z
    statistic, freedom = _chi_square(drawn, np.array([0.45, 0.3, 0.15, 0.1]))
    assert (statistic - freedom) / math.sqrt(2 * freedom) > MOST_Z
