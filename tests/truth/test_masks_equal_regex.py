"""Answers under a regular expression: llama.cpp picks among what a regex engine says may come.

That is found out with the ``regex`` package alone: tokens after which the text is still the
beginning of a match, and those that end it where it is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import regex

import mtpbatch
from mtpbatch.options import Depth

PROMPT = "In the beginning"
N_TOKENS = 40
# What leaves a choice at each byte: text that can only be as it is comes in the tokens that the
# tokenizer makes of it, which a regular expression does not know.
PATTERNS = (
    r"[a-z]{3,8} \d{2}",
    r"[toa][hnf][ed]?([ -][a-z]{3}){3,5}[.,]",
    r"[A-Z][a-z]+, [a-z ]{10,20}!",
    r"([0-9]{1,4}[;,] ?){3}[a-z]{3}",
    r"([A-Z][a-z]{2,7}[ .]?){2,4}",
    r"[^\n]{12}",
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "top_k": 0, "seed": 0},
    {"temperature": 1.0, "top_k": 0, "seed": 11},
    {"temperature": 1.3, "top_k": 8, "seed": 3},
)

LLAMA_CPP = """
import ctypes, json, math, sys
import llama_cpp
import numpy as np
import regex

path, prompt, n_tokens, patterns, samplings = json.load(sys.stdin)
llama = llama_cpp.Llama(
    path, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
)
vocab = llama_cpp.llama_model_get_vocab(llama.model)
buffer = ctypes.create_string_buffer(64)
pieces = []
for token in range(llama.n_vocab()):
    n = llama_cpp.llama_token_to_piece(vocab, token, buffer, 64, 0, False)
    pieces.append(buffer.raw[:n])
ends = [llama_cpp.llama_vocab_is_eog(vocab, token) for token in range(llama.n_vocab())]

def forbidden(pattern, text):
    for piece, end in zip(pieces, ends):
        if end:
            yield not pattern.fullmatch(text)
        else:
            yield not piece or not pattern.fullmatch(text + piece, partial=True)

def chain(temperature, top_k, seed):
    made = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if temperature == 0:
        parts = [llama_cpp.llama_sampler_init_greedy()]
    else:
        parts = [llama_cpp.llama_sampler_init_top_k(top_k)] if top_k else []
        parts += [llama_cpp.llama_sampler_init_temp(temperature)]
        parts += [llama_cpp.llama_sampler_init_dist(seed)]
    for part in parts:
        llama_cpp.llama_sampler_chain_add(made, part)
    return made

def pick(sampler, logits):
    data = (llama_cpp.llama_token_data * len(logits))(*(
        llama_cpp.llama_token_data(i, float(logit), 0) for i, logit in enumerate(logits)
    ))
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    return array.data[array.selected].id

answers = []
for sampling in samplings:
    for pattern in patterns:
        sampler = chain(**sampling)
        pattern = regex.compile(pattern.encode())
        llama.reset()
        fed = llama.tokenize(prompt.encode())
        tokens, text = [], b""
        while len(tokens) < n_tokens:
            llama.eval(fed)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            logits = np.ctypeslib.as_array(logits, (llama.n_vocab(),)).copy()
            logits[list(forbidden(pattern, text))] = -math.inf
            tokens.append(pick(sampler, logits))
            if ends[tokens[-1]]:
                break
            text += pieces[tokens[-1]]
            fed = tokens[-1:]
        llama_cpp.llama_sampler_free(sampler)
        answers.append(tokens)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def expected(demo_f32_path: Path) -> list[list[int]]:
    """Tokens for each sampling and each pattern, decoded one by one; from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP],
        input=json.dumps([str(demo_f32_path), PROMPT, N_TOKENS, PATTERNS, SAMPLINGS]),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("speculation", [0, 3, "auto"])
def test_tokens_are_picked_among_those_that_may_come(
    demo_f32_path: Path, expected: list[list[int]], speculation: Depth
) -> None:
    """All answers at once, and as many between them that may be anything."""
    asked = [{"regex": pattern, **sampling} for sampling in SAMPLINGS for pattern in PATTERNS]

    async def generate() -> tuple[list[mtpbatch.Completion], mtpbatch.Completion]:
        async with mtpbatch.Engine.open(
            demo_f32_path, n_seq=8, n_ctx=256, n_threads=1, kv_type="f32", speculation=speculation
        ) as engine:
            bound = [engine.submit(PROMPT, max_tokens=N_TOKENS, **params) for params in asked]
            free = [engine.submit(PROMPT, max_tokens=N_TOKENS) for _ in asked]
            texts = {(await one).token_ids for one in free}
            assert texts == {(await engine.generate(PROMPT, max_tokens=N_TOKENS)).token_ids}
            return [await one for one in bound], await free[0]

    found, free = anyio.run(generate)
    n_ended = 0
    for done, params, tokens in zip(found, asked, expected, strict=True):
        assert list(done.token_ids) == tokens
        if done.finish_reason == "stop":
            n_ended += 1
            assert regex.fullmatch(params["regex"], done.text)
        else:
            assert regex.fullmatch(params["regex"], done.text, partial=True)
    assert n_ended > len(found) / 2
    if speculation != "auto":  # which drafts where it pays
        assert any(done.accepted for done in found) == (speculation != 0)
    assert free.finish_reason == "length"
