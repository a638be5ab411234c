"""Sampled tokens follow the model's distribution, drafted or not.

Many requests of a few tokens, one seed each, and chi-square tests of the first, second and third
token against the softmax that numpy computes. The seeds are fixed, so that chance plays no part.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import loops
import random_model
from mtpbatch.native import NativeBackend
from mtpbatch.types import Admission, EngineConfig, Plan, PlanEntry, SamplingParams
from reference.qwen35_numpy import Reference

PROMPT = (40, 50, 60, 70, 80)
N_SEQ = 64
SEEDS = random.Random(1).choices(range(2**32), k=40 * N_SEQ)
LENGTH = 4
LEAST_P = 1e-3  # a wrong sampler is off by many orders of magnitude

FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.3, "typical_p": 0.7},
    {
        "temperature": 1.2,
        "top_k": 12,
        "min_p": 0.02,
        "logit_bias": {60: 2.0, 61: -1.0},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "xtc_probability": 0.4,
        "xtc_threshold": 0.15,
    },
]

Probabilities = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose best token is likely, but not certain, and whose head often guesses it."""
    path = tmp_path_factory.mktemp("models") / "sampling.gguf"
    shape = dataclasses.replace(random_model.RANDOM_SHAPE, vocab=280, width=64, ff=64, layers=2)
    random_model.write_random(path, shape, mix=0.2, seed=3)
    return path


@dataclasses.dataclass(slots=True)
class Samples:
    texts: list[tuple[int, ...]]
    drafted: int = 0
    accepted: int = 0


Sample = Callable[[int, int], Samples]


@pytest.fixture(scope="module")
def sample(model_path: Path) -> Sample:
    """Samples for a draft depth and an index of FILTERS, made once."""
    return cache(lambda depth, index: _sample(model_path, depth, FILTERS[index]))


def _sample(path: Path, depth: int, params: dict[str, Any]) -> Samples:
    """LENGTH tokens after PROMPT for each of the seeds."""
    config = EngineConfig(n_seq=N_SEQ, n_ctx=16, n_threads=1, kv_type="f32")
    backend = NativeBackend(path, config)
    sampling = SamplingParams(**params)
    samples = Samples([])
    release: tuple[int, ...] = ()
    for start in range(0, len(SEEDS), N_SEQ):
        admit = tuple(
            Admission(s, sampling, SEEDS[start + s], (), LENGTH, history=PROMPT)
            for s in range(N_SEQ)
        )
        active = {s: PlanEntry(s, PROMPT, True, 0) for s in range(N_SEQ)}
        found: list[tuple[int, ...]] = [()] * N_SEQ
        while active:
            result = loops.execute(backend, Plan(release, admit, tuple(active.values())))
            release, admit = (), ()
            for s, outcome in zip(list(active), result.entries, strict=True):
                found[s] += outcome.token_ids
                samples.drafted += outcome.n_drafted
                samples.accepted += outcome.n_accepted
                active[s] = PlanEntry(s, (), True, min(depth, LENGTH - len(found[s]) - 1))
                if outcome.finish_reason:
                    del active[s]
        release = tuple(range(N_SEQ))
        samples.texts += found
    backend.close()
    return samples


class Truth:
    """The model's next-token distributions, with the filters of a request."""

    def __init__(self, path: Path, params: dict[str, Any]) -> None:
        self._reference = Reference(path)
        self._params = params
        self.after = cache(self._after)

    def _after(self, tokens: tuple[int, ...]) -> Probabilities:
        _, logits = self._reference.trunk([*PROMPT, *tokens])
        logits = self._edited(logits[-1], Counter(tokens))
        order = np.argsort(-logits)
        if top_k := self._params.get("top_k"):
            order = order[:top_k]
        shares = _softmax(logits[order])
        if typical_p := self._params.get("typical_p"):
            surprise = -np.log(shares)
            nearest = np.argsort(abs(surprise - (shares * surprise).sum()))
            keep = int(np.searchsorted(np.cumsum(shares[nearest]), typical_p, side="right")) + 1
            order = order[np.sort(nearest[:keep])]
            shares = _softmax(logits[order])
        if top_p := self._params.get("top_p"):
            keep = int(np.searchsorted(np.cumsum(shares), top_p)) + 1
            order = order[:keep]
            shares = shares[:keep]
        if min_p := self._params.get("min_p"):
            order = order[shares >= min_p * shares[0]]
            shares = _softmax(logits[order])
        excluded = max(int((shares >= self._params.get("xtc_threshold", 1)).sum()) - 1, 0)
        chance = self._params.get("xtc_probability", 0)
        result = np.zeros(len(logits))
        for kept, weight in ((order, 1 - chance), (order[excluded:], chance)):
            result[kept] += weight * _softmax(logits[kept] / self._params["temperature"])
        return result

    def _edited(self, logits: Probabilities, answer: Counter[int]) -> Probabilities:
        logits = logits.astype(np.float64)
        for token, bias in self._params.get("logit_bias", {}).items():
            logits[token] += bias
        for token in {*PROMPT, *answer}:
            penalty = self._params.get("repetition_penalty", 1)
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        for token, count in answer.items():
            logits[token] -= self._params.get("presence_penalty", 0)
            logits[token] -= count * self._params.get("frequency_penalty", 0)
        return logits


def _softmax(logits: Probabilities) -> Probabilities:
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum())


def chi_square_p(counts: Counter[int], expected: Probabilities) -> float:
    """The chance of a worse fit; tokens expected fewer than 5 times count as one."""
    observed = np.zeros(len(expected))
    for token, count in counts.items():
        observed[token] = count
    assert observed[expected == 0].sum() == 0, "a token was sampled that the filters exclude"
    common = expected >= 5
    rest = expected[~common].sum()
    observed, expected = (
        np.append(observed[common], observed[~common].sum()),
        np.append(expected[common], rest),
    )
    if rest < 1:
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(expected) - 1
    if freedom < 1:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal.
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


every_filter = pytest.mark.parametrize("index", range(len(FILTERS)), ids=map(str, FILTERS))


@every_filter
def test_tokens_follow_the_model(model_path: Path, sample: Sample, index: int) -> None:
    check(model_path, sample(0, index).texts, FILTERS[index])


@every_filter
@pytest.mark.parametrize("depth", [1, 3])
def test_drafted_tokens_follow_the_model(
    model_path: Path, sample: Sample, index: int, depth: int
) -> None:
    """And each seed gives the very tokens that it gives undrafted."""
    samples = sample(depth, index)
    check(model_path, samples.texts, FILTERS[index])
    assert samples.texts == sample(0, index).texts
    assert 0.05 * samples.drafted < samples.accepted < 0.95 * samples.drafted


def check(path: Path, texts: list[tuple[int, ...]], params: dict[str, Any]) -> None:
    """The first token, and the second and third after the commonest texts before them.

    After each of the commonest alone, and after many together: those sums vary a little less
    than a chi-square allows for, as each part has its own distribution.
    """
    truth = Truth(path, params)
    for position in range(3):
        following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            following[text[:position]][text[position]] += 1
        commonest = sorted(following, key=lambda prefix: -following[prefix].total())[:40]
        together: Counter[int] = Counter()
        expected = np.zeros_like(truth.after(()))
        for prefix in commonest:
            counts = following[prefix]
            share = truth.after(prefix) * counts.total()
            if counts.total() >= 100:
                assert chi_square_p(counts, share) > LEAST_P, prefix
            together += counts
            expected += share
        assert chi_square_p(together, expected) > LEAST_P, position
        assert together.total() > 200
