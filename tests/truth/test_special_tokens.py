"""Texts with many special tokens have llama.cpp's own tokens, though they are done in pieces."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

import random_model
from mtpbatch.native import Model
from tinymtp import gguf_file
from tinymtp.tokenizer import Tokenizer

LLAMA_CPP = """
import json, sys
import llama_cpp

path, texts = json.load(sys.stdin)
params = llama_cpp.llama_model_default_params()
params.vocab_only = True
model = llama_cpp.llama_model_load_from_file(path.encode(), params)
vocab = llama_cpp.llama_model_get_vocab(model)
found = []
for text, add_special, parse_special in texts:
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) * 2 + 2))()
    n = llama_cpp.llama_tokenize(
        vocab, data, len(data), tokens, len(tokens), add_special, parse_special
    )
    assert n >= 0
    found.append(tokens[:n])
json.dump(found, sys.stdout)
"""

CONTROL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>", "abc", "aa", " x", "|>")
USER_DEFINED = ("ab", "bcd", "ca", "b\n", "🌍")
PARTS = (*CONTROL, *USER_DEFINED, *"abcd <\n", "user\n", " hello", "é")
VOCAB = 512


def add_bpe(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab: int) -> None:
    special = {*CONTROL, *USER_DEFINED}
    tokens = [token for token in tokenizer.tokens[:480] if token not in special]
    merges = [" ".join(merge) for merge in tokenizer.merges if "".join(merge) in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_merges(merges)
    _add_tokens(writer, tokens, [gguf.TokenType.NORMAL] * len(tokens), vocab)


def add_spm(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab: int) -> None:
    normal = ["▁", *"abcdehlorsu<|>", "▁h", "ell", "▁hell", "▁hello", "us", "user", "▁a", "bc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *normal]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(normal)
    writer.add_tokenizer_model("llama")
    writer.add_token_scores([float(-index) for index in range(vocab)])
    writer.add_add_space_prefix(True)
    _add_tokens(writer, tokens, types, vocab)


def _add_tokens(writer: gguf.GGUFWriter, tokens: list[str], types: list[Any], vocab: int) -> None:
    tokens = [*tokens, *CONTROL, *USER_DEFINED]
    types = [*types, *[gguf.TokenType.CONTROL] * len(CONTROL)]
    types += [gguf.TokenType.USER_DEFINED] * len(USER_DEFINED)
    fillers = [f"[filler {index}]" for index in range(len(tokens), vocab)]
    writer.add_token_list(tokens + fillers)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(fillers))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def add_stripping(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab: int) -> None:
    """By a model's name llama.cpp knows that its special tokens take the spaces behind them."""
    writer.add_name("phi-3")
    add_spm(writer, tokenizer, vocab)


@pytest.fixture(scope="module", params=["demo", add_bpe, add_spm, add_stripping])
def vocabulary(
    request: pytest.FixtureRequest, demo_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model file with special tokens that overlap, but for the demo model's."""
    if request.param == "demo":
        return demo_path
    path = tmp_path_factory.mktemp("vocabularies") / f"{request.param.__name__}.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "add_tokenizer", request.param)
        random_model.write_random_dense(path, vocab=VOCAB, layers=1)
    return path


def texts() -> list[tuple[str, bool, bool]]:
    """Those of chats, and random ones; each with ``add_special`` and ``parse_special``."""
    found = ["<|im_start|>user\nw<|im_end|>\n" * n for n in (1, 31, 32, 33, 64, 65, 2000)]
    found += ["ab" * 300, "abc" * 300, "aa" * 300, "a" * 601, "🌍" * 300, "<|im_end|>" * 300, ""]
    for seed in range(60):
        choose = random.Random(seed)
        parts = choose.sample(PARTS, choose.randint(2, len(PARTS)))
        found.append("".join(choose.choices(parts, k=choose.randint(100, 1000))))
    return [
        (text, add, parse) for text in found for add in (True, False) for parse in (True, False)
    ]


def test_texts_in_pieces_have_the_tokens_of_the_whole(vocabulary: Path) -> None:
    asked = texts()
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP],
        input=json.dumps([str(vocabulary), asked]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    n_pieces = 0

    def count() -> None:
        nonlocal n_pieces
        n_pieces += 1

    with Model(vocabulary) as model:
        for (text, add, parse), expected in zip(asked, json.loads(done.stdout), strict=True):
            tokens = model.tokenize(text, add_special=add, parse_special=parse, check=count)
            assert tokens == expected, (text, add, parse)
    assert (n_pieces == 0) if "stripping" in vocabulary.name else (n_pieces > 100), n_pieces
