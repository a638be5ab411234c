"""Sampler picks what llama.cpp's own chain picks from the whole vocabulary, draw after draw."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtpbatch._llama_cpp import require_llama_cpp
from mtpbatch.exceptions import InvalidParameterError, NativeError
from mtpbatch.native import Sampler

Logits = npt.NDArray[np.float32]

QWEN_VOCAB = 248_320
N_ROWS = 4
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


# libllama by ctypes: importing llama_cpp would put its logging into the way of other tests.
SUFFIX = "dylib" if sys.platform == "darwin" else "so"
libllama = ctypes.CDLL(str(require_llama_cpp() / f"libllama.{SUFFIX}"))
for name, arguments in {
    "chain_init": [ctypes.c_bool],  # a struct of this one
    "chain_add": [ctypes.c_void_p, ctypes.c_void_p],
    "init_top_k": [ctypes.c_int32],
    "init_top_p": [ctypes.c_float, ctypes.c_size_t],
    "init_min_p": [ctypes.c_float, ctypes.c_size_t],
    "init_temp": [ctypes.c_float],
    "init_dist": [ctypes.c_uint32],
    "apply": [ctypes.c_void_p, ctypes.c_void_p],
    "free": [ctypes.c_void_p],
}.items():
    function = getattr(libllama, f"llama_sampler_{name}")
    function.argtypes = arguments
    function.restype = ctypes.c_void_p if "init" in name else None


class Candidates(ctypes.Structure):
    """``llama_token_data_array``"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


@contextmanager
def chain(temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> Iterator[int]:
    samplers = [
        libllama.llama_sampler_init_top_k(top_k),
        libllama.llama_sampler_init_top_p(top_p, 1),
        libllama.llama_sampler_init_min_p(min_p, 1),
        libllama.llama_sampler_init_temp(temperature),
        libllama.llama_sampler_init_dist(seed),
    ]
    made = libllama.llama_sampler_chain_init(True)
    for sampler in samplers:
        libllama.llama_sampler_chain_add(made, sampler)
    try:
        yield made
    finally:
        libllama.llama_sampler_free(made)


def pick(chain: int, logits: Logits) -> int:
    """What a chain picks from all candidates."""
    data = np.zeros(len(logits), CANDIDATE)
    data["id"] = np.arange(len(logits))
    data["logit"] = logits
    candidates = Candidates(data.ctypes.data, len(logits), -1, False)
    libllama.llama_sampler_apply(chain, ctypes.byref(candidates))
    return int(data["id"][candidates.selected])


def shaped(shape: str, vocab: int, seed: int) -> Logits:
    rng = np.random.default_rng(seed)
    size = (N_ROWS, vocab)
    logits = rng.normal(0, 2.5, size)
    match shape:
        case "flat":
            logits *= 1e-3
        case "equal":
            logits[:] = rng.normal()
        case "peaked":
            logits[:, rng.integers(vocab, size=5)] += 15
        case "language model":
            logits += np.log(1 / (1 + np.arange(vocab))) + 8
            logits[:, rng.integers(vocab, size=30)] += rng.exponential(6, 30)
        case "holes":
            logits[rng.random(size) < 0.7] = -np.inf
            logits[:, rng.integers(vocab)] = 1  # one row of nothing has no right answer
        case "ties":
            logits = np.round(logits)
        case "ties at the top":
            logits = np.minimum(logits, np.sort(logits)[:, -min(vocab, 60)][:, None])
        case "near ties":
            logits = np.round(logits * 8) / 8 + 4
        case "high":
            logits += 40
        case "low":
            logits -= 40
        case "huge":
            logits *= 10.0 ** rng.integers(2, 37)
        case "ascending":
            logits.sort()
        case "descending":
            logits = -np.sort(-logits)
        case _:
            assert shape == "normal"
    return logits.astype(np.float32)


SHAPES = [
    *("normal", "flat", "equal", "peaked", "language model", "holes", "ties", "ties at the top"),
    *("near ties", "high", "low", "huge", "ascending", "descending"),
]

mixes = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.01, 3) | st.just(1.0),
        "top_k": st.just(0) | st.integers(2, 100) | st.integers(100, 1000),
        "top_p": st.just(1.0) | st.sampled_from([0.5, 0.9, 0.95, 0.999]) | st.floats(1e-4, 1),
        "min_p": st.just(0.0) | st.floats(1e-6, 1),
        "seed": st.integers(0, 2**32 - 2),
    }
)
CHAT = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "seed": 1}
NUCLEUS = {**CHAT, "top_k": 0}
MIN_P = {**NUCLEUS, "top_p": 1.0, "min_p": 0.05}
HEAT = {**MIN_P, "min_p": 0.0}


@settings(max_examples=400, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.integers(1, 5000) | st.integers(30_000, 50_000),
    seed=st.integers(0, 2**32),
    params=mixes,
    n_threads=st.sampled_from([1, 3]),
)
@example(shape="language model", vocab=QWEN_VOCAB, seed=1, params=CHAT, n_threads=3)
@example(shape="language model", vocab=QWEN_VOCAB, seed=2, params=NUCLEUS, n_threads=1)
@example(shape="peaked", vocab=QWEN_VOCAB, seed=3, params=NUCLEUS, n_threads=3)
@example(shape="near ties", vocab=QWEN_VOCAB, seed=4, params=NUCLEUS, n_threads=3)
@example(shape="ties", vocab=QWEN_VOCAB, seed=5, params={**CHAT, "top_k": 300}, n_threads=3)
@example(shape="ties", vocab=QWEN_VOCAB, seed=6, params=CHAT, n_threads=3)
@example(shape="language model", vocab=QWEN_VOCAB, seed=7, params=MIN_P, n_threads=3)
@example(shape="language model", vocab=QWEN_VOCAB, seed=8, params=HEAT, n_threads=3)
def test_it_picks_what_the_chain_picks(
    shape: str, vocab: int, seed: int, params: dict[str, Any], n_threads: int
) -> None:
    logits = shaped(shape, vocab, seed)
    with chain(**params) as truth, Sampler(**params, n_threads=n_threads) as sampler:
        expected = [pick(truth, row) for row in (*logits, *logits)]
        assert sampler.sample(logits) + sampler.sample(logits) == expected


@pytest.mark.parametrize(
    "cut",
    [{"top_k": k} for k in (10, 100, 130, 150, 170, 300)]
    + [{"top_p": share} for share in (0.02, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.8)],
    ids=str,
)
@pytest.mark.parametrize("steps", [4, 32])
def test_equals_are_told_apart_as_in_the_chain(cut: dict[str, float], steps: int) -> None:
    """With so much heat that all that is kept is picked alike, order is all that counts."""
    params: dict[str, Any] = {**HEAT, **cut, "temperature": 1000.0}
    rng = np.random.default_rng(1)
    logits = (np.round(rng.normal(0, 2, (32, 40_000)) * steps) / steps).astype(np.float32)
    with chain(**params) as truth, Sampler(**params) as sampler:
        for _ in range(4):
            assert sampler.sample(logits) == [pick(truth, row) for row in logits]


@settings(deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
    params=st.sampled_from([{}, {"temperature": 0.8, "top_k": 1}, {"temperature": 1e-7}]),
)
@example(shape="language model", vocab=QWEN_VOCAB, seed=1, params={})
def test_greedy_takes_the_first_of_the_best(
    shape: str, vocab: int, seed: int, params: dict[str, Any]
) -> None:
    logits = shaped(shape, vocab, seed)
    with Sampler(**params) as sampler:
        assert sampler.sample(logits) == np.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize(
    "params",
    [{}, CHAT, {**CHAT, "top_k": 300}, NUCLEUS, MIN_P, HEAT],
    ids=["greedy", "top_k", "large top_k", "top_p", "min_p", "temperature"],
)
@pytest.mark.parametrize("vocab", [1, 100, 5000, 50_000])
def test_what_is_not_a_number_is_not_picked(params: dict[str, Any], vocab: int) -> None:
    rng = np.random.default_rng(1)
    logits = shaped("normal", vocab, 1)
    logits[rng.random(logits.shape) < 0.5] = np.nan
    logits[:, 0] = (0, 0, 0, np.nan)
    without = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    logits = logits[:3] if vocab == 1 else logits
    with Sampler(**params) as sampler, Sampler(**params) as other:
        picked = sampler.sample(logits)
        assert picked == other.sample(without[: len(logits)])
    assert not np.isnan(logits[range(len(logits)), picked]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params", [{}, CHAT, {**CHAT, "top_k": 300}, NUCLEUS, MIN_P, HEAT], ids=str
)
@pytest.mark.parametrize("vocab", [1, 100, 5000, 50_000])
def test_rows_that_say_nothing_still_give_a_token(
    value: float, params: dict[str, Any], vocab: int
) -> None:
    with Sampler(**params) as sampler:
        (token,) = sampler.sample(np.full((1, vocab), value, np.float32))
    assert 0 <= token < vocab


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_many_calls_of_many_shapes(n_threads: int) -> None:
    rng = np.random.default_rng(1)
    with Sampler(n_threads=n_threads) as sampler:
        assert sampler.sample(np.empty((0, 10), np.float32)) == []
        for vocab in (1, 65, 300_000):
            for n_rows in [*range(20)] * 2:
                logits = rng.random((n_rows, vocab), np.float32)
                assert sampler.sample(logits) == logits.argmax(axis=1).tolist()


def test_a_seed_is_not_needed() -> None:
    logits = np.zeros((8, 1000), np.float32)
    with Sampler(temperature=1) as one, Sampler(temperature=1) as other:
        assert one.sample(logits) != other.sample(logits)
    last = 2**32 - 1  # to llama.cpp: a random one
    with Sampler(temperature=1, seed=last) as one, Sampler(temperature=1, seed=last) as other:
        assert one.sample(logits) == other.sample(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2),
        ("seed", 2**32),
        ("n_threads", 0),
        ("n_threads", 1000),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Sampler(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros(10, np.float32),
        np.zeros((2, 0), np.float32),
        np.zeros((2, 10), np.float64),
        np.zeros((1, 2, 3), np.float32),
        [[1.0, 2.0]],
        None,
    ],
    ids=lambda logits: f"{getattr(logits, 'dtype', logits)} {np.shape(logits)}",
)
def test_other_arrays_are_refused(logits: Any) -> None:
    with Sampler() as sampler, pytest.raises(InvalidParameterError, match="float32 array of") as e:
        sampler.sample(logits)
    assert e.value.parameter == "logits"


def test_a_temperature_that_float32_cannot_hold_makes_nothing_possible() -> None:
    logits = np.full((50, 2000), -np.inf, np.float32)
    logits[:, :5] = [5, 4, 3, 2, 1]
    with Sampler(temperature=1e39, seed=1) as sampler:
        assert set(sampler.sample(logits)) == set(range(5))


def test_strided_logits() -> None:
    logits = shaped("normal", 100, 1)[::2, ::-1]
    with Sampler() as sampler:
        assert sampler.sample(logits) == logits.argmax(axis=1).tolist()


def test_a_closed_one_refuses() -> None:
    sampler = Sampler()
    sampler.close()
    sampler.close()
    assert repr(sampler) == "<Sampler: closed>"
    with pytest.raises(NativeError, match="closed"):
        sampler.sample(np.zeros((1, 1), np.float32))
