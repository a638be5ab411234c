"""Write models as GGUF files, and read such files back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from numpy.typing import NDArray

from tinymtp.shape import Shape
from tinymtp.tokenizer import Tokenizer

Kind = Literal["f32", "f16", "q8_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Weights = Mapping[str, NDArray[np.float32]]

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_Q8_0_BLOCK = 32

# Small, and read by operations that want full precision.
_ALWAYS_F32 = ("ssm_conv1d.weight", "ssm_alpha.weight", "ssm_beta.weight")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Model:
    """A `qwen35` model in memory: tensors by GGUF name, and what the file says about itself."""

    shape: Shape
    weights: Weights
    tokenizer: Tokenizer
    about: Mapping[str, str] = field(default_factory=dict)
    """Descriptive metadata by key, such as ``general.name``."""


def write(path: Path, model: Model, kind: Kind) -> None:
    """Write a `qwen35` model, its matrices stored as ``kind``."""
    shape = model.shape
    if set(model.weights) != set(shape.tensors()):
        raise ValueError("the weights do not have the names of the model's tensors")
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_block_count(shape.blocks)
    if shape.mtp:
        writer.add_nextn_predict_layers(1)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.rope_dims)
    writer.add_rope_dimension_sections(list(shape.rope_sections))
    writer.add_full_attention_interval(shape.attention_interval)
    writer.add_ssm_conv_kernel(shape.conv_kernel)
    writer.add_ssm_state_size(shape.state_dim)
    writer.add_ssm_group_count(shape.key_heads)
    writer.add_ssm_time_step_rank(shape.value_heads)
    writer.add_ssm_inner_size(shape.value_width)
    for key, text in model.about.items():
        writer.add_string(key, text)
    add_tokenizer(writer, model.tokenizer, shape.vocab)
    finish(writer, shape.tensors(), model.weights, kind)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab: int) -> None:
    """Add the tokenizer's metadata, with unused tokens to fill the vocabulary."""
    known = len(tokenizer.tokens)
    if known > vocab:
        raise ValueError(f"{known} tokens do not fit a vocabulary of {vocab}")
    fillers = [f"[unused {index}]" for index in range(known, vocab)]
    types = (
        [gguf.TokenType.NORMAL] * tokenizer.ordinary
        + [gguf.TokenType.CONTROL] * (known - tokenizer.ordinary)
        + [gguf.TokenType.UNUSED] * len(fillers)
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list([*tokenizer.tokens, *fillers])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_turn)
    writer.add_eot_token_id(tokenizer.end_of_turn)
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def finish(
    writer: gguf.GGUFWriter, sizes: Mapping[str, tuple[int, ...]], weights: Weights, kind: Kind
) -> None:
    """Write everything added so far, then the tensors, and close the file.

    Vectors are stored in full precision, matrices as ``kind`` where their rows allow it. Weights
    are taken one at a time: those of a mapping that makes them need not fit in memory together.
    """
    writer.add_file_type(_FILE_TYPES[kind])
    stored = {name: _stored_as(name, size, kind) for name, size in sizes.items()}
    for name, size in sizes.items():
        n_bytes = math.prod(gguf.quants.quant_shape_to_byte_shape(size, stored[name]))
        writer.add_tensor_info(name, size, np.dtype(np.float32), n_bytes, stored[name])
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, size in sizes.items():
            weight = np.ascontiguousarray(weights[name], dtype=np.float32)
            if weight.shape != size:
                raise ValueError(f"{name} has the shape {weight.shape}, the model's is {size}")
            writer.write_tensor_data(gguf.quants.quantize(weight, stored[name]))


def _stored_as(name: str, size: tuple[int, ...], kind: Kind) -> gguf.GGMLQuantizationType:
    if kind == "f32" or len(size) == 1 or name.endswith(_ALWAYS_F32):
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and size[-1] % _Q8_0_BLOCK == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def read(path: Path) -> Model:
    """Read a `qwen35` model that :func:`write` wrote, its weights as float32."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise ValueError(f"{path} has no {key}")
        return found.contents()

    if value("general.architecture") != "qwen35":
        raise ValueError(f"{path} is not a qwen35 model")
    weights = {tensor.name: _floats(tensor) for tensor in reader.tensors}
    mtp = reader.get_field("qwen35.nextn_predict_layers") is not None
    shape = Shape(
        vocab=len(weights["token_embd.weight"]),
        layers=value("qwen35.block_count") - int(mtp),
        attention_interval=value("qwen35.full_attention_interval"),
        width=value("qwen35.embedding_length"),
        ff=value("qwen35.feed_forward_length"),
        heads=value("qwen35.attention.head_count"),
        kv_heads=value("qwen35.attention.head_count_kv"),
        head_dim=value("qwen35.attention.key_length"),
        rope_dims=value("qwen35.rope.dimension_count"),
        rope_sections=tuple(value("qwen35.rope.dimension_sections")),
        rope_base=_decimal(value("qwen35.rope.freq_base")),
        state_dim=value("qwen35.ssm.state_size"),
        key_heads=value("qwen35.ssm.group_count"),
        value_heads=value("qwen35.ssm.time_step_rank"),
        conv_kernel=value("qwen35.ssm.conv_kernel"),
        norm_eps=_decimal(value("qwen35.attention.layer_norm_rms_epsilon")),
        context=value("qwen35.context_length"),
        tied_output="output.weight" not in weights,
        mtp=mtp,
    )
    merges = (merge.split(" ") for merge in value("tokenizer.ggml.merges"))
    about = {
        key: found.contents()
        for key, found in reader.fields.items()
        if key.startswith(("general.", "mtpbatch."))
        and key != "general.architecture"
        and found.types == [gguf.GGUFValueType.STRING]
    }
    ordered = {name: weights[name] for name in shape.tensors()}
    return Model(shape, ordered, Tokenizer((left, right) for left, right in merges), about)


def to_f32(source: Path, destination: Path, changes: Weights | None = None) -> None:
    """Copy any GGUF, every tensor stored as float32 and all else unchanged.

    ``changes`` are added to tensors of these names.

    Which tokens a model prefers then no longer depends on the batch a token is computed in:
    half-precision and quantised products round differently for different batch sizes.
    """
    added = changes or {}
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(destination, architecture)
    for key, found in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        sub_type = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, found.contents(), found.types[0], sub_type=sub_type)
    weights = {t.name: _floats(t) + added.get(t.name, 0) for t in reader.tensors}
    finish(writer, {name: weight.shape for name, weight in weights.items()}, weights, "f32")


def _floats(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """A tensor's values; GGUF lists sizes innermost first."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(values, dtype=np.float32).reshape(tuple(reversed(tensor.shape.tolist())))


def _decimal(value: float) -> float:
    """The short decimal number that was meant: GGUF keeps single precision only."""
    return float(str(np.float32(value)))
