"""Whatever requests ask of sampling, they get llama.cpp's tokens: in company, drafted or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import mtpbatch

COUNT = 40
PROMPTS = (
    "And it came to pass in those days, And it came to pass in those days, ",
    "def fib(n):\n    if n < 2:\n",
)
WARM: dict[str, Any] = {"temperature": 0.8, "seed": 7}
DRY: dict[str, Any] = {"dry_multiplier": 2.0, "dry_sequence_breakers": ()}
CASES: dict[str, dict[str, Any]] = {
    "typical_p": {**WARM, "typical_p": 0.5},
    "typical_p after top_k": {**WARM, "typical_p": 0.5, "top_k": 40},
    "xtc": {**WARM, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.8},
    "dry": DRY,
    "dry in a window": {**DRY, "dry_penalty_last_n": 12, "dry_base": 2.5, "dry_allowed_length": 3},
    "dry_sequence_breakers": {**DRY, "dry_sequence_breakers": ("\n", ",", ":", " the", "f n <")},
    "logit_bias": {"logit_bias": {265: -100.0, 10: 2.5, 44: -1.5}},
    "bad_words": {"bad_words": ("the", " LORD", "return self", "Egypt", " -")},
    "min_tokens": {"min_tokens": 12, "logit_bias": {2047: 60.0}},
    "all at temperature 0": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.2,
        "dry_multiplier": 0.8,
        "logit_bias": {265: -2.0},
        "bad_words": ("and", "return self"),
    },
    "all": {
        **WARM,
        "top_k": 60,
        "typical_p": 0.9,
        "top_p": 0.97,
        "min_p": 0.01,
        "xtc_probability": 0.3,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.2,
        "dry_multiplier": 0.8,
        "logit_bias": {265: -2.0},
        "bad_words": ("and", "return self"),
        "min_tokens": 30,
    },
    "one seed": WARM,
}

# Each case alone, one token after the other, with llama.cpp's samplers over the whole vocabulary.
LLAMA_CPP = r"""
import ctypes, json, sys
import llama_cpp as L
import numpy as np

path, count, prompts, cases = json.load(sys.stdin)
llama = L.Llama(
    path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
)
n_vocab, vocab = llama.n_vocab(), L.llama_model_get_vocab(llama.model)
eog = [t for t in range(n_vocab) if L.llama_vocab_is_eog(vocab, t)]

def generate(prompt, asked):
    bias = [(int(t), b) for t, b in asked.get("logit_bias", {}).items()]
    biases = (L.llama_logit_bias * len(bias))(*bias)
    breakers = [t.encode() for t in asked.get("dry_sequence_breakers", ["\n", ":", '"', "*"])]
    last_n = asked.get("dry_penalty_last_n", 256)
    for_all = L.llama_sampler_init_penalties(n_vocab, 256, asked.get("repetition_penalty", 1), 0, 0)
    for_answer = L.llama_sampler_init_penalties(
        n_vocab, 256, 1, asked.get("frequency_penalty", 0), asked.get("presence_penalty", 0)
    )
    dry = L.llama_sampler_init_dry(
        vocab,
        asked.get("dry_multiplier", 0),
        asked.get("dry_base", 1.75),
        asked.get("dry_allowed_length", 2),
        last_n,
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )
    chain = [L.llama_sampler_init_logit_bias(n_vocab, len(bias), biases), for_all, for_answer, dry]
    if "temperature" in asked:
        seed = asked["seed"]
        chain += [
            L.llama_sampler_init_top_k(asked.get("top_k", 0)),
            L.llama_sampler_init_typical(asked.get("typical_p", 1), 1),
            L.llama_sampler_init_top_p(asked.get("top_p", 1), 1),
            L.llama_sampler_init_min_p(asked.get("min_p", 0), 1),
            L.llama_sampler_init_xtc(
                asked.get("xtc_probability", 0),
                asked.get("xtc_threshold", 0.1),
                1,
                seed ^ 0x9E3779B9,
            ),
            L.llama_sampler_init_temp(asked["temperature"]),
            L.llama_sampler_init_dist(seed),
        ]
    else:
        chain.append(L.llama_sampler_init_greedy())
    banned = [
        llama.tokenize(text.encode(), add_bos=False, special=True)
        for word in asked.get("bad_words", ())
        for text in (word, " " + word.lstrip())
    ]
    fed = llama.tokenize(prompt.encode(), special=True)
    for token in fed:
        L.llama_sampler_accept(for_all, token)
        L.llama_sampler_accept(dry, token)
    llama.reset()
    answer = []
    while len(answer) < count and not (answer and answer[-1] in eog and "min_tokens" in asked):
        llama.eval(fed)
        logits = np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), (n_vocab,)).copy()
        for *before, last in banned:
            if answer[len(answer) - len(before) :] == before:
                logits[last] = -np.inf
        if len(answer) < asked.get("min_tokens", 0):
            logits[eog] = -np.inf
        # What is impossible has no place in a typical set.
        possible = np.flatnonzero(np.isfinite(logits))
        data = (L.llama_token_data * len(possible))(*((t, logits[t], 0) for t in possible))
        candidates = L.llama_token_data_array(data, len(possible), -1, False)
        for sampler in chain:
            L.llama_sampler_apply(sampler, ctypes.byref(candidates))
        answer.append(candidates.data[candidates.selected].id)
        for sampler in (for_all, for_answer, dry):
            L.llama_sampler_accept(sampler, answer[-1])
        fed = answer[-1:]
    for sampler in chain:
        L.llama_sampler_free(sampler)
    return answer

json.dump([[generate(prompt, asked) for prompt in prompts] for asked in cases], sys.stdout)
"""


def ends(asked: dict[str, Any]) -> dict[str, Any]:
    return {**asked, "max_tokens": COUNT, "ignore_eos": "min_tokens" not in asked}


@pytest.fixture(scope="module")
def expected(demo_f32_path: Path) -> dict[str, list[list[int]]]:
    """llama.cpp's tokens, by case; from a process of its own."""
    cases = [*CASES.values(), {}]
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP],
        input=json.dumps([str(demo_f32_path), COUNT, PROMPTS, cases]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    texts = json.loads(done.stdout)
    return dict(zip([*CASES, "nothing"], texts, strict=True))


async def generate_all(path: Path, speculation: Any) -> list[mtpbatch.Completion]:
    """All cases after all prompts, five at a time."""
    async with mtpbatch.Engine.open(
        path, n_seq=5, n_ctx=256, n_threads=1, kv_type="f32", speculation=speculation
    ) as engine:
        generations = [
            engine.submit(prompt, **ends(asked)) for asked in CASES.values() for prompt in PROMPTS
        ]
        return [await generation for generation in generations]


@pytest.mark.parametrize("speculation", [0, 3, "auto"])
def test_tokens_are_those_of_the_chain(
    demo_f32_path: Path, expected: dict[str, list[list[int]]], speculation: Any
) -> None:
    done = iter(anyio.run(generate_all, demo_f32_path, speculation))
    for case in CASES:
        completions = [next(done) for _ in PROMPTS]
        assert [list(c.token_ids) for c in completions] == expected[case], case
        if speculation == 3:
            assert all(c.drafted > c.accepted for c in completions), case
            assert any(c.accepted for c in completions), case


def test_each_parameter_changes_the_answer(expected: dict[str, list[list[int]]]) -> None:
    """Or a test of it could not fail."""
    for case, texts in expected.items():
        plain = expected["one seed" if "temperature" in CASES.get(case, {}) else "nothing"]
        assert (texts != plain) == (case not in ("one seed", "nothing")), case
    assert expected["dry"] != expected["dry_sequence_breakers"]
    assert [len(text) for text in expected["min_tokens"]] == [13, 13]
