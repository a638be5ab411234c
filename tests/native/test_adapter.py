"""LoRA adapters that cannot be used are refused with a reason, and never end the process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import mtpbatch
import random_adapter
import random_model
from mtpbatch import InvalidParameterError, ModelLoadError
from mtpbatch.native import Batch, Context, Model, MtpSession
from mtpbatch.native._library import call, lib

Q = "blk.0.attn_q.weight"
WIDTH, VOCAB, RANK = 64, 512, 4


@pytest.fixture(scope="module")
def adapter(dense_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "adapter.gguf"
    random_adapter.write_random_adapter(path, dense_path)
    return path


def pair(name: str = Q, *, rows: int = WIDTH, columns: int = WIDTH) -> dict[str, Any]:
    return {
        f"{name}.lora_a": np.ones((RANK, columns), np.float32),
        f"{name}.lora_b": np.ones((rows, RANK), np.float32),
    }


Change = Callable[[gguf.GGUFWriter], None]


def write(
    path: Path,
    tensors: dict[str, Any],
    *,
    architecture: str = "llama",
    kind: str = "lora",
    general_type: str = "adapter",
    change: Change = lambda writer: None,
) -> Path:
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type(general_type)
        writer.add_string("adapter.type", kind)
        change(writer)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def refused(model: Path, adapter: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Model(model, lora={str(adapter): 1.0})
    assert str(caught.value).startswith(f"{adapter}: ")
    return str(caught.value)


def test_a_file_that_is_missing_or_none_or_cut_off(
    dense_path: Path, adapter: Path, tmp_path: Path
) -> None:
    assert "no such file" in refused(dense_path, tmp_path / "missing.gguf")
    other = tmp_path / "text.gguf"
    other.write_text("no adapter")
    assert "not a GGUF file" in refused(dense_path, other)
    whole = adapter.read_bytes()
    for share, reason in ((0.9, "corrupted or incomplete"), (0.01, "could not read the file")):
        cut = tmp_path / f"cut-{share}.gguf"
        cut.write_bytes(whole[: int(share * len(whole))])
        assert reason in refused(dense_path, cut)


def test_a_model_is_no_adapter(dense_path: Path) -> None:
    assert "adapts nothing" in refused(dense_path, dense_path)


def test_an_adapter_of_another_architecture_or_shape(
    dense_path: Path, demo_path: Path, adapter: Path, tmp_path: Path
) -> None:
    assert "made for another model" in refused(demo_path, adapter)
    other = write(tmp_path / "arch.gguf", pair(), architecture="qwen35")
    assert "arch mismatch" in refused(dense_path, other)
    wide = write(tmp_path / "wide.gguf", pair(columns=WIDTH + 32))
    assert "incorrect shape" in refused(dense_path, wide)
    missing = write(tmp_path / "layer.gguf", pair("blk.7.attn_q.weight"))
    assert "no tensor blk.7.attn_q.weight" in refused(dense_path, missing)


def test_matrices_that_do_not_fit_together(dense_path: Path, tmp_path: Path) -> None:
    half = pair()
    del half[f"{Q}.lora_b"]
    assert "missing one component" in refused(dense_path, write(tmp_path / "half.gguf", half))
    ranks = pair()
    ranks[f"{Q}.lora_b"] = np.ones((WIDTH, RANK + 1), np.float32)
    assert "not transposed" in refused(dense_path, write(tmp_path / "ranks.gguf", ranks))
    odd = {**pair(), "blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}
    assert "unexpected suffix" in refused(dense_path, write(tmp_path / "odd.gguf", odd))
    whole = {name: tensor.astype(np.int32) for name, tensor in pair().items()}
    assert "is of type i32" in refused(dense_path, write(tmp_path / "types.gguf", whole))


def test_matrices_of_experts_that_llama_cpp_would_run_past(tmp_path: Path) -> None:
    model = tmp_path / "glm.gguf"
    random_model.write_random_glm4moe(model, vocab=300)
    name = "blk.2.ffn_up_exps.weight"  # of two experts; this adapter has one
    one = write(tmp_path / "one.gguf", pair(name, rows=128), architecture="glm4moe")
    assert "does not fit" in refused(model, one)


def test_weights_that_llama_cpp_cannot_adapt(dense_path: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    reader = gguf.GGUFReader(dense_path)
    with closing(gguf.GGUFWriter(tmp_path / "nvfp4.gguf", "llama")) as writer:
        for key, found in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                sub_type = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, found.contents(), found.types[0], sub_type=sub_type)
        kind = gguf.GGMLQuantizationType.NVFP4
        n_bytes = gguf.quants.quant_shape_to_byte_shape((128, WIDTH), kind)
        for tensor in reader.tensors:
            if tensor.name == name:
                writer.add_tensor(name, np.zeros(n_bytes, np.uint8), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    adapter = write(tmp_path / "adapter.gguf", pair(name, rows=128))
    assert "weights of type nvfp4" in refused(tmp_path / "nvfp4.gguf", adapter)


def test_embeddings_that_are_the_output_matrix_too(
    demo_path: Path, dense_path: Path, tmp_path: Path
) -> None:
    name = "token_embd.weight"
    flipped = {
        f"{name}.lora_a": np.ones((VOCAB, RANK), np.float32),
        f"{name}.lora_b": np.ones((WIDTH, RANK), np.float32),
    }
    with Model(dense_path, lora={str(write(tmp_path / "good.gguf", flipped)): 1.0}) as model:
        decode(model)
    flipped[f"{name}.lora_b"] = np.ones((WIDTH, RANK + 1), np.float32)
    assert "different ranks" in refused(dense_path, write(tmp_path / "ranks.gguf", flipped))
    tied = {
        f"{name}.lora_a": np.ones((2048, RANK), np.float32),
        f"{name}.lora_b": np.ones((192, RANK), np.float32),
    }
    of_demo = write(tmp_path / "tied.gguf", tied, architecture="qwen35")
    assert "cannot adapt token_embd.weight" in refused(demo_path, of_demo)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.add_uint32("adapter.lora.alpha", 8), "adapter.lora.alpha is of type u32"),
        (lambda w: w.add_float32("adapter.lora.alpha", float("nan")), "alpha is not a number"),
        (lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2]), "activated LoRA"),
    ],
)
def test_metadata_that_cannot_be_used(
    dense_path: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    assert reason in refused(dense_path, write(tmp_path / "odd.gguf", pair(), change=change))


def test_another_kind_of_adapter(dense_path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "kind.gguf", pair(), kind="control")
    assert "adapter.type to be 'lora'" in refused(dense_path, other)
    typed = write(tmp_path / "typed.gguf", pair(), general_type="model")
    assert "general.type to be 'adapter'" in refused(dense_path, typed)


def test_more_adapters_than_graphs_have_nodes_for(demo_path: Path, tmp_path: Path) -> None:
    """As many as are let through run, on the architecture whose graphs are fullest."""
    adapters = {}
    for seed in range(8):
        path = tmp_path / f"{seed}.gguf"
        random_adapter.write_random_adapter(path, demo_path, adapted="blk.*", seed=seed)
        adapters[str(path)] = 0.1
    with pytest.raises(ModelLoadError, match="too many adapters"):
        Model(demo_path, lora=adapters)
    while True:
        adapters.popitem()
        try:
            model = Model(demo_path, lora=adapters)
        except ModelLoadError:
            continue
        break
    assert len(adapters) >= 4
    with model:
        decode(model)


def test_adapters_come_before_contexts(dense_path: Path, adapter: Path) -> None:
    model = Model(dense_path)
    context = Context(model, n_ctx=64)
    with pytest.raises(mtpbatch.ContextError, match="before the model's contexts"):
        call(lib.mtpbatch_model_add_adapter, model._native, str(adapter).encode(), 1.0)
    context.close()
    call(lib.mtpbatch_model_add_adapter, model._native, str(adapter).encode(), 1.0)


def test_a_state_fits_the_same_adapters_only(demo_f32_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    random_adapter.write_random_adapter(path, demo_f32_path)

    def saved(lora: dict[str, float], restore: bytes | None = None) -> bytes:
        with Model(demo_f32_path, lora=lora) as model:
            target = Context(model, n_ctx=64, n_rs_seq=1, n_threads=1)
            session = MtpSession(target, Context.mtp(target), 1, 1)
            if restore is not None:
                session.restore(0, restore)
            return session.save(0)

    state = saved({str(path): 1.0})
    saved({str(path): 1.0}, state)
    for lora in ({}, {str(path): 0.5}):
        with pytest.raises(mtpbatch.MtpStateError):
            saved(lora, state)


@pytest.mark.anyio
async def test_the_engine_names_the_parameter_or_the_file(dense_path: Path, tmp_path: Path) -> None:
    values: list[Any] = ["adapter.gguf", {"adapter.gguf": "much"}, {"adapter.gguf": float("inf")}]
    for wrong in values:
        with pytest.raises(InvalidParameterError, match=r"^lora: .*finite number"):
            async with mtpbatch.Engine.open(dense_path, lora=wrong):
                pass
    with pytest.raises(ModelLoadError, match=r"missing\.gguf: no such file"):
        async with mtpbatch.Engine.open(dense_path, lora={str(tmp_path / "missing.gguf"): 1.0}):
            pass


def decode(model: Model) -> None:
    context = Context(model, n_ctx=64, n_threads=1)
    batch = Batch()
    batch.add_sequence([1, 2, 3], 0, 0)
    context.decode(batch)
    if model.n_mtp_heads:
        target = Context(model, n_ctx=64, n_rs_seq=2, n_threads=1)
        session = MtpSession(target, Context.mtp(target), 1, 2)
        target.decode(batch)
        session.process(batch)
        session.draft(0, 3, 4)
