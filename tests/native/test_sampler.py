"""Sampler picks what llama.cpp's own chain picks from the whole vocabulary, draw after draw."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtpbatch._llama_cpp import require_llama_cpp
from mtpbatch.exceptions import InvalidParameterError, NativeError
from mtpbatch.native import Model, Sampler

Logits = npt.NDArray[np.float32]

QWEN_VOCAB = 248_320
N_ROWS = 4
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


# libllama by ctypes: importing llama_cpp would put its logging into the way of other tests.
SUFFIX = "dylib" if sys.platform == "darwin" else "so"
libllama = ctypes.CDLL(str(require_llama_cpp() / f"libllama.{SUFFIX}"))
FLOAT, INT = ctypes.c_float, ctypes.c_int32
for name, arguments in {
    "init_logit_bias": [INT, INT, ctypes.c_void_p],
    "init_penalties": [INT, INT, FLOAT, FLOAT, FLOAT],
    "init_dry": [ctypes.c_void_p, FLOAT, FLOAT, INT, INT, ctypes.c_void_p, ctypes.c_size_t],
    "init_top_k": [INT],
    "init_typical": [FLOAT, ctypes.c_size_t],
    "init_top_p": [FLOAT, ctypes.c_size_t],
    "init_min_p": [FLOAT, ctypes.c_size_t],
    "init_xtc": [FLOAT, FLOAT, ctypes.c_size_t, ctypes.c_uint32],
    "init_temp": [FLOAT],
    "init_dist": [ctypes.c_uint32],
    "init_greedy": [],
    "accept": [ctypes.c_void_p, INT],
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


class Chain:
    """llama.cpp's samplers in the order of its own tools, over all candidates."""

    def __init__(
        self,
        vocab: int,
        prompt: Sequence[int] = (),
        banned: Sequence[Sequence[int]] = (),
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        typical_p: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        dry_multiplier: float = 0.0,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_penalty_last_n: int = -1,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        self._banned = banned
        self._typical = typical_p < 1
        self._answer: list[int] = []
        bias = np.array(list((logit_bias or {}).items()), "i4, f4")
        n_last = 10_000  # more than there are
        dry_last = n_last if dry_penalty_last_n < 0 else dry_penalty_last_n
        make = {
            "logit_bias": (vocab, len(bias), bias.ctypes.data),
            "penalties": (vocab, n_last, repetition_penalty, 0, 0),
            "penalties of the answer": (vocab, n_last, 1, frequency_penalty, presence_penalty),
            "dry": (None, dry_multiplier, dry_base, dry_allowed_length, dry_last, None, 0),
        }
        if temperature:
            make |= {
                "top_k": (top_k,),
                "typical": (typical_p, 1),
                "top_p": (top_p, 1),
                "min_p": (min_p, 1),
                "xtc": (xtc_probability, xtc_threshold, 1, seed ^ 0x9E3779B9),
                "temp": (temperature,),
                "dist": (seed,),
            }
        else:
            make |= {"greedy": ()}
        self._samplers = {
            name: getattr(libllama, f"llama_sampler_init_{name.split()[0]}")(*arguments)
            for name, arguments in make.items()
        }
        for token in prompt:
            self._accept(token, "penalties", "dry")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sampler in self._samplers.values():
            libllama.llama_sampler_free(sampler)

    def pick(self, logits: Logits) -> int:
        """The next token of the answer."""
        data = np.zeros(len(logits), CANDIDATE)
        data["id"] = np.arange(len(logits))
        data["logit"] = logits
        for *before, last in self._banned:
            if self._answer[len(self._answer) - len(before) :] == before:
                data["logit"][last] = -np.inf
        candidates = Candidates(data.ctypes.data, len(logits), -1, False)
        for name, sampler in self._samplers.items():
            if name == "typical" and self._typical:  # takes the logarithm of probabilities
                left = data[: candidates.size]
                possible = left[~(left["logit"] - left["logit"].max() < -87)]
                candidates.size = len(possible)
                data[: candidates.size] = possible
            libllama.llama_sampler_apply(sampler, ctypes.byref(candidates))
            if name == "xtc":  # may leave an impossible token alone: then the one before those
                first = (candidates.data - data.ctypes.data) // CANDIDATE.itemsize
                possible = np.flatnonzero(data["logit"][: first + 1] > -np.inf)
                n_back = int(first - possible[-1]) if len(possible) else 0
                candidates.data -= n_back * CANDIDATE.itemsize
                candidates.size += n_back
        first = (candidates.data - data.ctypes.data) // CANDIDATE.itemsize
        token = int(data["id"][first + candidates.selected])
        self._answer.append(token)
        self._accept(token, "penalties", "penalties of the answer", "dry")
        return token

    def _accept(self, token: int, *names: str) -> None:
        for name in names:
            libllama.llama_sampler_accept(self._samplers[name], token)


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

cuts = {
    "temperature": st.floats(0.01, 3) | st.just(1.0),
    "top_k": st.just(0) | st.integers(2, 100) | st.integers(100, 1000),
    "top_p": st.just(1.0) | st.sampled_from([0.5, 0.9, 0.95, 0.999]) | st.floats(1e-4, 1),
    "min_p": st.just(0.0) | st.floats(1e-6, 1),
    "seed": st.integers(0, 2**32 - 2),
}
CHAT = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "seed": 1}
NUCLEUS = {**CHAT, "top_k": 0}
MIN_P = {**NUCLEUS, "top_p": 1.0, "min_p": 0.05}
HEAT = {**MIN_P, "min_p": 0.0}
LEAST_PROBABLE = {**HEAT, "xtc_probability": 1.0, "xtc_threshold": 0.0}


@settings(max_examples=400)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.integers(1, 5000) | st.integers(30_000, 50_000),
    seed=st.integers(0, 2**32),
    params=st.fixed_dictionaries(cuts),
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
    with Chain(vocab, **params) as truth, Sampler(**params, n_threads=n_threads) as sampler:
        expected = [truth.pick(row) for row in (*logits, *logits)]
        assert sampler.sample(logits) + sampler.sample(logits) == expected


# ------------------------------------------------------------ with biases, bans and penalties

rare = {"typical_p": st.just(1.0) | st.floats(0.01, 0.99)}
rare |= {"xtc_probability": st.just(0.0) | st.floats(0, 1), "xtc_threshold": st.floats(0, 0.5)}
edits = {
    "repetition_penalty": st.just(1.0) | st.floats(0.5, 3),
    "frequency_penalty": st.just(0.0) | st.floats(-2, 2),
    "presence_penalty": st.just(0.0) | st.floats(-2, 2),
    "dry_multiplier": st.just(0.0) | st.floats(0.1, 5),
    "dry_base": st.floats(1, 3),
    "dry_allowed_length": st.integers(1, 4),
    "dry_penalty_last_n": st.just(-1) | st.integers(0, 40),
}


class Scene(NamedTuple):
    """Rows of which a few tokens are likely, a prompt of these, biases and bans for them."""

    logits: Logits
    prompt: list[int]
    logit_bias: dict[int, float]

    @classmethod
    def make(cls, shape: str, vocab: int, seed: int) -> Self:
        rng = np.random.default_rng(seed)
        logits = np.repeat(shaped(shape, vocab, seed), 3, axis=0)
        likely = np.argsort(-logits[0])[: rng.integers(2, 12)]
        prompt = rng.choice(likely, rng.integers(0, 60)).tolist()
        some = rng.choice(vocab, rng.integers(0, min(vocab, 40)), replace=False)
        biased = {*some.tolist(), *likely[: rng.integers(0, 4)].tolist()}
        bias = {
            token: float(np.float32(rng.choice([-100, 100, *rng.normal(0, 3, 6)])))
            for token in biased
        }
        return cls(logits, prompt, bias if rng.random() < 0.5 else {})


@settings(max_examples=200)
@given(
    shape=st.sampled_from(SHAPES),
    vocab=st.integers(1, 3000) | st.integers(30_000, 40_000),
    seed=st.integers(0, 2**32),
    params=st.fixed_dictionaries({**cuts, **rare, **edits}),
    greedy=st.booleans(),
)
@example(shape="language model", vocab=QWEN_VOCAB, seed=1, params=CHAT, greedy=False)
@example(shape="peaked", vocab=QWEN_VOCAB, seed=3, params=NUCLEUS, greedy=False)
@example(
    shape="language model",
    vocab=QWEN_VOCAB,
    seed=2,
    params={**CHAT, "repetition_penalty": 1.3, "dry_multiplier": 0.8},
    greedy=False,
)
@example(shape="normal", vocab=3, seed=1, params=LEAST_PROBABLE, greedy=False)  # by a bias of 100
@example(shape="huge", vocab=3, seed=0, params=LEAST_PROBABLE, greedy=False)  # of probability 0
@example(shape="holes", vocab=300, seed=1, params=LEAST_PROBABLE, greedy=False)
def test_it_changes_rows_as_the_chain_does(
    tiny: Model, shape: str, vocab: int, seed: int, params: dict[str, Any], greedy: bool
) -> None:
    scene = Scene.make(shape, vocab, seed)
    params = {**params, "logit_bias": scene.logit_bias} | ({"temperature": 0.0} if greedy else {})
    with (
        Chain(vocab, scene.prompt, **params) as truth,
        Sampler(tiny, prompt=scene.prompt, dry_sequence_breakers=(), **params) as sampler,
    ):
        expected = [truth.pick(row) for row in (*scene.logits, *scene.logits)]
        assert sampler.sample(scene.logits) + sampler.sample(scene.logits) == expected


@pytest.mark.parametrize("greedy", [True, False])
def test_bad_words_do_not_come(tiny: Model, greedy: bool) -> None:
    """Of a word with several tokens only the last one is impossible, and after the others alone."""
    words = ("q", "xyz", " of")
    texts = ("q", " q", "xyz", " xyz", " of")
    spellings = [tiny.tokenize(text, add_special=False) for text in texts]
    (q,), (x, y, z) = spellings[0], spellings[2]
    logits = np.random.default_rng(1).normal(0, 1, (400, tiny.n_vocab)).astype(np.float32)
    logits[:, [t for spelling in spellings for t in spelling]] += 9
    params: dict[str, Any] = {} if greedy else {"temperature": 1.0, "seed": 1}
    with (
        Chain(tiny.n_vocab, (), spellings, **params) as truth,
        Sampler(tiny, bad_words=words, **params) as sampler,
        Sampler(**params) as free,
    ):
        picked = sampler.sample(logits)
        assert picked == [truth.pick(row) for row in logits]
        unbound = free.sample(logits)
    assert q in unbound
    assert q not in picked
    assert (x, y, z) in zip(unbound, unbound[1:], unbound[2:], strict=False)
    assert {(x, y), (y, z)} <= set(itertools.pairwise(picked))
    assert (x, y, z) not in zip(picked, picked[1:], picked[2:], strict=False)


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"dry_multiplier": 2.0},
        {"logit_bias": {5: -100.0, 6: 4.0}},
        {"temperature": 1.0, "seed": 1, "typical_p": 0.3},
        {"temperature": 1.0, "seed": 1, "xtc_probability": 0.5},
    ],
    ids=lambda params: next(iter(params)) if "seed" not in params else list(params)[-1],
)
def test_each_of_them_changes_what_is_picked(tiny: Model, params: dict[str, Any]) -> None:
    """As in the chain; and none of the tests above would notice nothing."""
    logits = np.random.default_rng(1).normal(0, 1, (40, 300)).astype(np.float32)
    logits[:, 5:9] += (6, 5.5, 5, 4.5)
    base = {name: value for name, value in params.items() if name in ("temperature", "seed")}
    prompt = [5, 6, 7] * 4
    with (
        Chain(300, prompt, **params) as truth,
        Sampler(tiny, prompt=prompt, dry_sequence_breakers=(), **params) as sampler,
        Sampler(**base) as plain,
    ):
        picked = sampler.sample(logits)
        assert picked == [truth.pick(row) for row in logits]
        assert picked != plain.sample(logits)


def test_the_prompt_counts_for_repetition_alone(tiny: Model) -> None:
    row = np.zeros((1, 300), np.float32)
    row[0, 7:9] = (2, 1.9)
    for name in ("presence_penalty", "frequency_penalty"):
        penalty: dict[str, Any] = {name: 1.0}
        with Sampler(prompt=[7, 7, 7], **penalty) as sampler:
            assert [sampler.sample(row) for _ in range(3)] == [[7], [8], [7]], name
    with Sampler(prompt=[7], repetition_penalty=1.1) as sampler:
        assert sampler.sample(row) == [8]


@pytest.mark.parametrize("banned", [{}, {0: -100.0}])
def test_what_is_typical_does_not_depend_on_impossible_tokens(banned: dict[int, float]) -> None:
    """llama.cpp alone takes the logarithm of a probability of 0 there, and cuts by nothing else."""
    logits = np.full(300, -np.inf, np.float32)
    logits[:11] = [0.0, *np.log([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])]
    shares = np.exp(logits[1:11].astype(np.float64))
    entropy = -(shares * np.log(shares)).sum()
    order = np.argsort(np.abs(-np.log(shares) - entropy), kind="stable")
    kept = order[: np.searchsorted(np.cumsum(shares[order]), 0.4, side="right") + 1]
    assert 0 not in kept, "the likeliest is not typical"
    logits[0] = -np.inf if not banned else 0.0
    with Sampler(temperature=1.0, seed=1, typical_p=0.4, logit_bias=banned) as sampler:
        picked = sampler.sample(np.tile(logits, (300, 1)))
    assert set(picked) <= {1, *range(2, 7)}
    assert set(picked) == {int(token) + 1 for token in kept}


@pytest.mark.parametrize("name", ["bad_words", "dry_multiplier"])
def test_what_needs_the_vocabulary_needs_the_model(name: str) -> None:
    with pytest.raises(InvalidParameterError, match="needs the model") as caught:
        Sampler(**dict[str, Any]({name: ("x",) if name == "bad_words" else 1.0}))
    assert caught.value.parameter == name


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "stop", "priority"])
def test_a_sampler_does_not_know_when_requests_end(name: str) -> None:
    with pytest.raises(InvalidParameterError, match="a sampler only picks") as caught:
        Sampler(**dict[str, Any]({name: "x" if name == "stop" else 3}))
    assert caught.value.parameter == name


@pytest.mark.parametrize("token", [-1, 2**31])
def test_a_prompt_is_of_token_ids(token: int) -> None:
    with pytest.raises(InvalidParameterError, match="must hold token ids") as caught:
        Sampler(prompt=[5, token])
    assert caught.value.parameter == "prompt"


def test_rows_shorter_than_the_tokens_it_knows() -> None:
    with Sampler(prompt=[5], repetition_penalty=2.0, logit_bias={1000: 5.0}) as sampler:
        assert sampler.sample(np.array([[1, 2, 0]], np.float32)) == [1]


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
    with Chain(40_000, **params) as truth, Sampler(**params) as sampler:
        for _ in range(4):
            assert sampler.sample(logits) == [truth.pick(row) for row in logits]


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
