"""Embeddings are those of numpy, and of llama.cpp with its own pooling, one text at a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import gguf
import numpy as np
import pytest

import mtpbatch
import random_adapter
import random_model
from mtpbatch import ContextError
from mtpbatch.native import Batch, Context, Embedder, Executor, Model
from reference.qwen35_numpy import Reference

TEXTS = (
    "In the beginning God created the heaven and the earth.",
    "a",
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "And it came to pass in those days. " * 8,
    "the",
    "Moab",
)

LLAMA_CPP = """
import json, sys
import llama_cpp

path, pooling, texts = json.load(sys.stdin)
model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
params = llama_cpp.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.embeddings, params.pooling_type = True, pooling
params.type_k = params.type_v = 0
params.flash_attn_type = 0
rows = []
for tokens in texts:
    context = llama_cpp.llama_init_from_model(model, params)
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(tokens))) == 0
    row = llama_cpp.llama_get_embeddings_seq(context, 0)
    rows.append(row[: llama_cpp.llama_model_n_embd_out(model)])
    llama_cpp.llama_free(context)
json.dump(rows, sys.stdout)
"""
MEAN, FIRST, LAST, RANK = 1, 2, 3, 4


def llama_cpp(path: Path, pooling: int, texts: list[list[int]]) -> np.ndarray:
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP],
        input=json.dumps([str(path), pooling, texts]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


def with_key(source: Path, path: Path, key: str, value: int | bool) -> Path:
    """A copy of a model file that says one thing more."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, found in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", key):
            sub_type = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, found.contents(), found.types[0], sub_type=sub_type)
    if isinstance(value, bool):
        writer.add_bool(key, value)
    else:
        writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def embed(path: Path, **options: Any) -> mtpbatch.Embeddings:
    async def run() -> mtpbatch.Embeddings:
        async with mtpbatch.Engine.open(
            path, n_seq=2, n_ctx=256, n_threads=1, kv_type="f32", **options
        ) as engine:
            return await engine.embed(TEXTS, normalize=False)

    return anyio.run(run)


def tokens_of(path: Path) -> list[list[int]]:
    with Model(path) as model:
        return [model.tokenize(text) for text in TEXTS]


@pytest.mark.parametrize("n_ubatch", [512, 16], ids=["whole", "in pieces"])
@pytest.mark.parametrize("speculation", [0, 3])
def test_a_hybrid_models_are_numpys(demo_f32_path: Path, n_ubatch: int, speculation: int) -> None:
    reference = Reference(demo_f32_path)
    texts = tokens_of(demo_f32_path)
    truth = [reference.trunk(tokens)[0].mean(0) for tokens in texts]
    found = embed(demo_f32_path, n_ubatch=n_ubatch, speculation=speculation)
    np.testing.assert_allclose(found.vectors, truth, atol=1e-4)
    assert found.vectors.dtype == np.float32
    assert found.prompt_tokens == sum(map(len, texts))


@pytest.mark.parametrize("pooling", [None, MEAN, FIRST, LAST])
@pytest.mark.parametrize("n_ubatch", [512, 16], ids=["whole", "in pieces"])
def test_batched_texts_are_llama_cpps_alone(
    dense_path: Path, tmp_path: Path, pooling: int | None, n_ubatch: int
) -> None:
    path = dense_path
    if pooling is not None:
        path = with_key(dense_path, tmp_path / "pooled.gguf", "llama.pooling_type", pooling)
    truth = llama_cpp(path, pooling or MEAN, tokens_of(path))
    np.testing.assert_allclose(embed(path, n_ubatch=n_ubatch).vectors, truth, atol=1e-4)


def test_hybrid_models_are_llama_cpps_alone(demo_f32_path: Path) -> None:
    truth = llama_cpp(demo_f32_path, MEAN, tokens_of(demo_f32_path))
    np.testing.assert_allclose(embed(demo_f32_path).vectors, truth, atol=1e-4)


def test_a_hybrid_model_without_heads(tmp_path: Path) -> None:
    path = tmp_path / "headless.gguf"
    random_model.write_random(path, dataclasses.replace(random_model.RANDOM_SHAPE, mtp=False))
    truth = llama_cpp(path, MEAN, tokens_of(path))
    np.testing.assert_allclose(embed(path, n_ubatch=16).vectors, truth, atol=1e-4)


def test_embeddings_are_those_of_the_adapted_model(demo_f32_path: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    random_adapter.write_random_adapter(adapter, demo_f32_path, size=0.3)
    random_adapter.merge(demo_f32_path, {adapter: 1.0}, merged)
    found = embed(demo_f32_path, lora={str(adapter): 1.0}).vectors
    np.testing.assert_allclose(found, embed(merged).vectors, atol=1e-4)
    assert abs(found - embed(demo_f32_path).vectors).max() > 0.1


# ------------------------------------------------------------------------ the native API


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("llama.pooling_type", RANK, "a reranker"),
        ("llama.pooling_type", 9, "not known: 9"),
        ("llama.attention.causal", False, "tokens see those after them"),
    ],
)
def test_models_that_embed_nothing(
    dense_path: Path, tmp_path: Path, key: str, value: int | bool, reason: str
) -> None:
    odd = Model(with_key(dense_path, tmp_path / "odd.gguf", key, value))
    with pytest.raises(ContextError, match=reason):
        Embedder(odd, n_ctx=64)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    random_model.write_random_neobert(tmp_path / "encoder.gguf")
    with Model(tmp_path / "encoder.gguf") as model:
        for make in (Embedder, Context):
            with pytest.raises(ContextError, match="is an encoder"):
                make(model, n_ctx=64)


@pytest.mark.parametrize("kind", ["dense_path", "demo_f32_path"])
def test_a_dropped_text_leaves_no_trace(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    texts = tokens_of(path)
    with Model(path) as model:
        embedder = Embedder(model, n_ctx=256, n_ubatch=16, n_threads=1, kv_type="f32")
        alone = Embedder(model, n_ctx=256, n_ubatch=16, n_threads=1, kv_type="f32")
        dropped = embedder.add(texts[3])
        waiting = embedder.add(texts[2])
        assert embedder.step() == []  # the first text takes the whole decode, and more
        embedder.drop(dropped)
        embedder.drop(waiting)
        assert embedder.idle
        for text in texts:
            tickets = [embedder.add(text), alone.add(text)]
            found, truth = run(embedder)[tickets[0]], run(alone)[tickets[1]]
            np.testing.assert_allclose(found, truth, atol=1e-5)
        embedder.close()
        alone.close()


@pytest.mark.parametrize(("kind", "n_texts"), [("dense_path", 32), ("demo_path", 8)])
def test_texts_share_a_decode(kind: str, n_texts: int, request: pytest.FixtureRequest) -> None:
    with Model(request.getfixturevalue(kind)) as model:
        embedder = Embedder(model, n_ctx=64, n_threads=1)
        tickets = [embedder.add([1 + i, 2, 3]) for i in range(n_texts)]
        assert [ticket for ticket, _ in embedder.step()] == tickets
        for n_tokens in (0, 65):
            with pytest.raises(ContextError, match=f"1 to n_ctx=64 tokens, got {n_tokens}"):
                embedder.add([1] * n_tokens)
        assert embedder.step() == []
        embedder.close()


def test_a_context_for_embeddings_does_nothing_else(demo_path: Path, dense_path: Path) -> None:
    with Model(demo_path) as model:
        context = Context(model, n_ctx=64, n_batch=8, n_threads=1, embeddings=True)
        with pytest.raises(ContextError, match="there are no embeddings"):
            context.embeddings()
        batch = Batch()
        batch.add_sequence([1, 2, 3], 0, 0)
        with pytest.raises(ContextError, match="row 0: every row"):
            context.decode(batch)
        with pytest.raises(ContextError, match="nor one for embeddings"):
            Context.mtp(context)
        with pytest.raises(ContextError, match="nor one for embeddings"):
            Executor(context)
        with pytest.raises(ContextError, match="n_rs_seq must be 0"):
            Context(model, n_ctx=64, n_rs_seq=3, embeddings=True)
        with pytest.raises(ContextError, match="n_batch must be at least n_seq"):
            Context(model, n_ctx=64, n_seq=9, n_batch=8, embeddings=True)
    with Model(dense_path) as model:
        plain = Context(model, n_ctx=64, n_threads=1)
        plain.decode(batch)
        with pytest.raises(ContextError, match="there are no embeddings"):
            plain.embeddings()


def run(embedder: Embedder) -> dict[int, np.ndarray]:
    done: dict[int, np.ndarray] = {}
    while not embedder.idle:
        done.update(embedder.step())
    return done
