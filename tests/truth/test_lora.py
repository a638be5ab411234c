"""LoRA adapters give what llama.cpp gives with them, and what numpy's sum of the weights gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest

import loops
import mtpbatch
import random_adapter
import random_model
from greedy_script import GREEDY
from mtpbatch.native import Batch, Context, Model, MtpSession

PROMPTS = ("In the beginning", "def fib(n):\n", "And it came to pass", "import os\n")
COUNT = 40
SCALES = (1.0, -0.5)
# Where the best two logits are closer than this, the order of summation may decide.
TIE = 1e-3


@pytest.fixture(scope="module")
def adapters(demo_f32_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Two adapters of the demo model's matrices, but for its head: llama_cpp loads none."""
    folder = tmp_path_factory.mktemp("adapters")
    paths = [folder / "first.gguf", folder / "second.gguf"]
    for seed, path in enumerate(paths):
        random_adapter.write_random_adapter(
            path, demo_f32_path, adapted=r"blk\.[0-3]\..*(attn|ffn|ssm_out).*", size=0.4, seed=seed
        )
    return dict(zip(map(str, paths), SCALES, strict=True))


LLAMA_CPP = """
import ctypes, json, sys
import llama_cpp
import numpy as np

path, adapters, count, tie, prompts = json.load(sys.stdin)
llama = llama_cpp.Llama(
    path, n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
)
loaded = [llama_cpp.llama_adapter_lora_init(llama.model, name.encode()) for name in adapters]
assert all(loaded)
pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
scales = (ctypes.c_float * len(loaded))(*adapters.values())
assert llama_cpp.llama_set_adapters_lora(llama.ctx, pointers, len(loaded), scales) == 0
prompts = [llama.tokenize(prompt.encode(), add_bos=False) for prompt in prompts]
"""


@pytest.fixture(scope="module")
def expected(demo_f32_path: Path, adapters: dict[str, float]) -> list[list[int]]:
    """llama.cpp's own tokens with both adapters, up to the first near-tie."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP + GREEDY],
        input=json.dumps([str(demo_f32_path), adapters, COUNT, TIE, PROMPTS]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts: list[list[int]] = json.loads(done.stdout)
    assert sum(map(len, texts)) > 0.9 * COUNT * len(texts)  # ties are rare
    return texts


def generate(path: Path, lora: dict[str, float], depth: int) -> list[mtpbatch.Completion]:
    async def run() -> list[mtpbatch.Completion]:
        async with mtpbatch.Engine.open(
            path, n_seq=4, n_ctx=256, n_threads=1, kv_type="f32", speculation=depth, lora=lora
        ) as engine:
            return await engine.generate_many(PROMPTS, max_tokens=COUNT, ignore_eos=True)

    return anyio.run(run)


@pytest.mark.parametrize("depth", [0, 3])
def test_the_engine_gives_llama_cpps_text(
    demo_f32_path: Path, adapters: dict[str, float], expected: list[list[int]], depth: int
) -> None:
    completions = generate(demo_f32_path, adapters, depth)
    for completion, truth in zip(completions, expected, strict=True):
        assert list(completion.token_ids[: len(truth)]) == truth
        assert (completion.drafted > 0) == (depth > 0)
    plain = generate(demo_f32_path, {}, depth)
    assert any(a.text != b.text for a, b in zip(plain, completions, strict=True))


def test_adapters_are_sums_of_weights(
    demo_f32_path: Path, adapters: dict[str, float], tmp_path: Path
) -> None:
    merged = tmp_path / "merged.gguf"
    by_path = {Path(path): scale for path, scale in adapters.items()}
    random_adapter.merge(demo_f32_path, by_path, merged)
    with Model(demo_f32_path, lora=adapters) as adapted, Model(merged) as truth:
        tokens = adapted.tokenize("".join(PROMPTS))
        np.testing.assert_allclose(logits(adapted, tokens), logits(truth, tokens), atol=1e-4)


def test_heads_draft_with_the_adapter_experts_included(tmp_path: Path) -> None:
    model, adapter, merged = (tmp_path / f"{name}.gguf" for name in ("glm", "adapter", "merged"))
    random_model.write_random_glm4moe(model, vocab=300)
    random_adapter.write_random_adapter(adapter, model, adapted=r"blk\..*|output\.weight", size=0.3)
    random_adapter.merge(model, {adapter: 1.0}, merged)
    tokens = list(range(60, 90))
    drafts = drafted_with(model, {str(adapter): 1.0}, tokens)
    assert drafts == drafted_with(merged, {}, tokens)
    assert drafts != drafted_with(model, {}, tokens)


def test_embeddings_of_tokens_are_adapted_as_well(dense_path: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    random_adapter.write_random_adapter(
        adapter, dense_path, adapted=r"(token_embd|output)\.weight", size=0.3
    )
    random_adapter.merge(dense_path, {adapter: 1.0}, merged)
    tokens = list(range(60, 90))
    truth = logits_of(merged, {}, tokens)
    np.testing.assert_allclose(logits_of(dense_path, {str(adapter): 1.0}, tokens), truth, atol=1e-4)


def test_an_adapter_of_the_head_changes_drafts_and_not_the_text(
    demo_f32_path: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "head.gguf"
    random_adapter.write_random_adapter(adapter, demo_f32_path, adapted=r"blk\.4\..*", size=2.0)
    plain = generate(demo_f32_path, {}, 3)
    adapted = generate(demo_f32_path, {str(adapter): 1.0}, 3)
    assert [c.token_ids for c in adapted] == [c.token_ids for c in plain]
    assert sum(c.accepted for c in adapted) < sum(c.accepted for c in plain)


def logits(model: Model, tokens: list[int]) -> np.ndarray:
    """Of every token."""
    with Context(model, n_ctx=256, n_threads=1, kv_type="f32") as context:
        batch = Batch()
        rows = batch.add_sequence(tokens, 0, 0, outputs="all")
        context.decode(batch)
        return np.stack([context.logits(row) for row in rows])


def logits_of(path: Path, lora: dict[str, float], tokens: list[int]) -> np.ndarray:
    with Model(path, lora=lora) as model:
        return logits(model, tokens)


def drafted_with(path: Path, lora: dict[str, float], prompt: list[int]) -> loops.Stream:
    with Model(path, lora=lora) as model:
        target = Context(model, n_ctx=256, n_threads=1, kv_type="f32", n_rs_seq=3)
        session = MtpSession(target, Context.mtp(target), 1, 3)
        return loops.drafted(target, session, {0: prompt}, COUNT, lambda seq_id, step: 3)[0]
