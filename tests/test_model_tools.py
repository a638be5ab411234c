"""The tools that make models, and the numpy reference that says what the models compute."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mtpbatch.native import Batch, Context, Model
from random_model import (
    RANDOM_SHAPE,
    demo_tokenizer,
    write_random,
    write_random_dense,
    write_random_gemma4,
    write_random_glm4moe,
    write_random_step35,
)
from random_model import main as random_model_main
from reference.qwen35_numpy import Reference
from tinymtp import gguf_file
from tinymtp.shape import Shape
from tinymtp.tokenizer import Tokenizer
from widen_model import DEMO_MODEL, widen

TEXT = "In the beginning was the word.\n\n    def __init__(self):\n\treturn {'é': 12}  # it's\r\n"
SMALL = dataclasses.replace(RANDOM_SHAPE, width=64, ff=96, state_dim=16, vocab=320)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.gguf"
    write_random(path, SMALL)
    return path


def test_tokenizer_gives_back_any_text() -> None:
    tokenizer = demo_tokenizer(2048)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_trained_tokenizer_joins_what_is_frequent(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train("the cat and the hat and the bat " * 5, vocab=265)
    assert len(tokenizer.tokens) == 265
    assert len(tokenizer.encode(" the")) == 1
    tokenizer.save(tmp_path / "merges.json")
    assert Tokenizer.load(tmp_path / "merges.json").tokens == tokenizer.tokens


def test_special_tokens_are_not_recognised_in_text() -> None:
    tokenizer = demo_tokenizer(512)
    assert max(tokenizer.encode("<|im_end|>")) < tokenizer.ordinary
    assert tokenizer.decode([tokenizer.end_of_turn]) == ""


def test_a_written_model_reads_back(random_model: Path, tmp_path: Path) -> None:
    first = gguf_file.read(random_model)
    assert first.shape == SMALL
    assert first.about == {"general.name": "random qwen35"}
    gguf_file.write(tmp_path / "again.gguf", first, "f32")
    assert (tmp_path / "again.gguf").read_bytes() == random_model.read_bytes()


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("q8_0", 1e-2)])
def test_smaller_kinds_stay_close(
    random_model: Path, tmp_path: Path, kind: gguf_file.Kind, error: float
) -> None:
    exact = gguf_file.read(random_model)
    path = tmp_path / "small.gguf"
    gguf_file.write(path, exact, kind)
    for name, weight in gguf_file.read(path).weights.items():
        assert np.abs(weight - exact.weights[name]).max() <= error * np.abs(weight).max()
    assert path.stat().st_size < random_model.stat().st_size


def test_weights_must_fit_the_shape(random_model: Path, tmp_path: Path) -> None:
    model = gguf_file.read(random_model)
    other_size = dataclasses.replace(model, shape=dataclasses.replace(model.shape, ff=128))
    with pytest.raises(ValueError, match="shape"):
        gguf_file.write(tmp_path / "wrong.gguf", other_size, "f32")
    other_names = dataclasses.replace(model, shape=dataclasses.replace(model.shape, mtp=False))
    with pytest.raises(ValueError, match="names"):
        gguf_file.write(tmp_path / "wrong.gguf", other_names, "f32")


def test_only_qwen35_files_are_read(tmp_path: Path) -> None:
    write_random_dense(tmp_path / "dense.gguf")
    with pytest.raises(ValueError, match="not a qwen35 model"):
        gguf_file.read(tmp_path / "dense.gguf")


def test_f32_copy_holds_the_same_numbers_and_metadata(random_model: Path, tmp_path: Path) -> None:
    small, copy = tmp_path / "q8_0.gguf", tmp_path / "f32.gguf"
    gguf_file.write(small, gguf_file.read(random_model), "q8_0")
    gguf_file.to_f32(small, copy)
    before, after = gguf_file.read(small), gguf_file.read(copy)
    assert (after.shape, after.about) == (before.shape, before.about)
    assert after.tokenizer.tokens == before.tokenizer.tokens
    assert all(np.array_equal(after.weights[name], before.weights[name]) for name in before.weights)
    reader = gguf.GGUFReader(copy)
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    unchanged = set(gguf.GGUFReader(small).fields) - {"general.file_type"}
    assert unchanged <= set(reader.fields)


def test_f32_copy_of_another_architecture(tmp_path: Path) -> None:
    write_random_dense(tmp_path / "dense.gguf", kind="q8_0")
    gguf_file.to_f32(tmp_path / "dense.gguf", tmp_path / "f32.gguf")
    field = gguf.GGUFReader(tmp_path / "f32.gguf").fields["general.architecture"]
    assert field.contents() == "llama"


def write_gemma4_beside(path: Path, **how: Any) -> None:
    write_random_gemma4(path, path.with_suffix(".assistant"), **how)


@pytest.mark.parametrize(
    "write", [write_random, write_random_step35, write_random_glm4moe, write_gemma4_beside]
)
def test_a_seed_gives_the_same_files_and_another_different_ones(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    def digests(seed: int) -> list[str]:
        write(tmp_path / "seeded.gguf", seed=seed)
        files = sorted(tmp_path.iterdir())
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    first = digests(1)
    assert first == digests(1)
    assert not set(first) & set(digests(2))


@pytest.mark.parametrize("architecture", ["qwen35", "step35", "glm4moe", "gemma4", "llama"])
def test_the_command_writes_every_architecture(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    command = ["random_model.py", str(out), "--architecture", architecture, "--width", "64"]
    monkeypatch.setattr(sys, "argv", command)
    random_model_main()
    field = gguf.GGUFReader(out).fields["general.architecture"]
    assert field.contents() == architecture
    assert (tmp_path / "out-assistant.gguf").exists() == (architecture == "gemma4")


def test_without_mtp_the_file_says_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_random(path, dataclasses.replace(SMALL, mtp=False))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("qwen35.nextn_predict_layers") is None
    assert not [tensor.name for tensor in reader.tensors if "nextn" in tensor.name]
    field = reader.get_field("qwen35.block_count")
    assert field is not None
    assert field.contents() == SMALL.layers


def test_a_random_model_writes_printable_ascii(random_model: Path) -> None:
    tokenizer = gguf_file.read(random_model).tokenizer
    text = tokenizer.decode(Reference(random_model).greedy(tokenizer.encode("Hello"), 50))
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


# In a process of its own: a process that has imported llama_cpp writes llama.cpp's log.
LOAD_ALONE = """
import sys
import llama_cpp
params = llama_cpp.llama_model_default_params()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
print(llama_cpp.llama_model_n_layer_nextn(model), llama_cpp.llama_model_n_embd_out(model))
"""


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """What llama.cpp makes of a model without drafting."""
    text = list(prompt)
    with Context(model, n_ctx=256, kv_type="f32", n_threads=1) as context:
        while len(text) < len(prompt) + count:
            batch = Batch()
            length = context.length(0)
            rows = batch.add_sequence(text[length:], length, 0)
            context.decode(batch)
            text.append(int(context.logits(rows[-1]).argmax()))
    return text[len(prompt) :]


def tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def normalised(rows: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    scale = np.sqrt(np.square(rows).mean(-1, keepdims=True))
    return np.asarray(rows / scale * weight, dtype=np.float32)


@pytest.mark.parametrize("mtp_heads", [1, 3])
def test_a_random_step35_model_has_the_heads_asked_for(tmp_path: Path, mtp_heads: int) -> None:
    write_random_step35(tmp_path / "step35.gguf", mtp_heads=mtp_heads)
    with Model(tmp_path / "step35.gguf") as model:
        assert (model.n_layer, model.n_mtp_heads) == (2, mtp_heads)
        text = model.detokenize(greedy(model, model.tokenize("Hello"), 50))
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


def test_a_random_glm4moe_model_runs(tmp_path: Path) -> None:
    write_random_glm4moe(tmp_path / "glm4moe.gguf")
    with Model(tmp_path / "glm4moe.gguf") as model:
        assert (model.n_layer, model.n_mtp_heads, model.keeps_recurrent_state) == (2, 1, False)
        text = model.detokenize(greedy(model, model.tokenize("Hello"), 50))
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


def test_a_random_gemma4_model_runs_and_its_assistant_loads(tmp_path: Path) -> None:
    path, assistant_path = tmp_path / "gemma4.gguf", tmp_path / "assistant.gguf"
    write_random_gemma4(path, assistant_path)
    with Model(path) as model:
        assert (model.n_layer, model.n_mtp_heads, model.n_embd) == (4, 0, 128)
        text = model.detokenize(greedy(model, model.tokenize("Hello"), 50))
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    asked = [sys.executable, "-c", LOAD_ALONE, str(assistant_path)]
    facts = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    assert facts == ["2", "128"]  # layers, and the width of the model's hidden rows


def test_without_mixing_every_step35_head_says_what_the_trunk_says(tmp_path: Path) -> None:
    path = tmp_path / "step35.gguf"
    write_random_step35(path, mix=0.0)
    weights = tensors(path)
    assert not [
        name
        for name, weight in weights.items()
        if name.endswith(("attn_output.weight", "ffn_down.weight")) and weight.any()
    ]
    embeddings = weights["token_embd.weight"]
    hidden = np.random.default_rng(0).standard_normal(embeddings.shape)
    says = normalised(embeddings, weights["output_norm.weight"]) @ weights["output.weight"].T
    for block in (2, 3, 4):
        scaled = normalised(embeddings, weights[f"blk.{block}.nextn.enorm.weight"])
        both = np.hstack([scaled, hidden]) @ weights[f"blk.{block}.nextn.eh_proj.weight"].T
        drafts = normalised(both, weights["output_norm.weight"]) @ weights["output.weight"].T
        np.testing.assert_allclose(drafts, says, atol=1e-4)


def test_without_mixing_the_gemma4_assistant_says_what_the_model_says(tmp_path: Path) -> None:
    path, assistant_path = tmp_path / "gemma4.gguf", tmp_path / "assistant.gguf"
    write_random_gemma4(path, assistant_path, mix=0.0)
    weights, assistant = tensors(path), tensors(assistant_path)
    for layers in (weights, assistant):
        assert not [
            name
            for name, weight in layers.items()
            if name.endswith(("post_attention_norm.weight", "post_ffw_norm.weight"))
            and weight.any()
        ]
    embeddings = weights["token_embd.weight"] * np.sqrt(128)
    hidden = np.random.default_rng(0).standard_normal(embeddings.shape)
    says = normalised(embeddings, weights["output_norm.weight"]) @ weights["output.weight"].T
    both = np.hstack([embeddings, hidden]) @ assistant["nextn.pre_projection.weight"].T
    drafts = normalised(both, assistant["output_norm.weight"]) @ assistant["token_embd.weight"].T
    np.testing.assert_allclose(drafts, says, atol=1e-4)


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rope_sections"):
        Shape(rope_dims=32)
    with pytest.raises(ValueError, match="multiples"):
        Shape(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="two others"):
        write_random_gemma4(tmp_path / "gemma4.gguf", tmp_path / "assistant.gguf", layers=3)


@pytest.mark.parametrize("width", [192, 768])
def test_widening_changes_no_logits(tmp_path: Path, width: int) -> None:
    path = tmp_path / "wide.gguf"
    wide_model = widen(gguf_file.read(DEMO_MODEL), layers=9, ff=640, width=width, vocab=2100)
    gguf_file.write(path, wide_model, "q8_0")
    demo, wide = Reference(DEMO_MODEL), Reference(path)
    tokens = demo_tokenizer(2048).encode(TEXT)
    hidden, logits = demo.trunk(tokens)
    wide_hidden, wide_logits = wide.trunk(tokens)
    np.testing.assert_allclose(wide_logits[:, :2048], logits, atol=1e-9)
    drafts, wide_drafts = demo.mtp(tokens, hidden)[1], wide.mtp(tokens, wide_hidden)[1]
    np.testing.assert_allclose(wide_drafts[:, :2048], drafts, atol=1e-9)
    for both in (wide_logits, wide_drafts):
        assert (both[:, 2048:].max(1) < both[:, :2048].max(1)).all()


def test_a_model_does_not_shrink_and_its_width_grows_in_powers_of_4() -> None:
    demo = gguf_file.read(DEMO_MODEL)
    with pytest.raises(ValueError, match="only grow"):
        widen(demo, layers=4, ff=8)
    with pytest.raises(ValueError, match="power of 4"):
        widen(demo, layers=4, ff=512, width=384)


def test_reference_gives_the_same_whole_and_piecewise(random_model: Path) -> None:
    reference = Reference(random_model)
    tokens = reference.greedy([72, 105], 20)
    whole = reference.trunk([72, 105, *tokens])[1]
    assert whole[1:-1].argmax(-1).tolist() == tokens


def test_drafting_does_not_change_the_text(random_model: Path) -> None:
    reference = Reference(random_model)
    for depth in (0, 1, 3):
        drafting = reference.simulate_drafting([72, 105], 30, depth)
        assert drafting.tokens == reference.greedy([72, 105], 30)
        assert drafting.steps + drafting.accepted == len(drafting.tokens) - 1
        assert drafting.accepted == sum(drafting.accepted_by_depth)
        assert drafting.accepted_by_depth == sorted(drafting.accepted_by_depth, reverse=True)


def test_first_drafts_follow_the_mtp_block(random_model: Path) -> None:
    """Piecewise drafting finds what one pass over the finished text finds."""
    reference = Reference(random_model)
    prompt, count = [72, 105, 33], 25
    drafting = reference.simulate_drafting(prompt, count, 1)
    text = [*prompt, *drafting.tokens]
    hidden = reference.trunk(text)[0]
    guesses = reference.mtp(text, np.vstack([np.zeros_like(hidden[:1]), hidden[:-1]]))[1].argmax(-1)
    at, accepted = len(prompt), 0
    while at < len(text) - 2:
        hit = int(guesses[at]) == text[at + 1]
        accepted += hit
        at += 1 + hit
    assert drafting.accepted == accepted


def test_less_mixing_makes_drafts_better(tmp_path: Path) -> None:
    def acceptance(mix: float) -> float:
        write_random(tmp_path / "mixed.gguf", SMALL, mix=mix)
        drafting = Reference(tmp_path / "mixed.gguf").simulate_drafting([72, 105], 40, 1)
        return drafting.accepted / drafting.drafted

    assert acceptance(0.0) == 1.0
    assert acceptance(1.0) < 0.5
