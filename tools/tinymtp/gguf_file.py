"""Write models as GGUF files, and read such files back."""

from __future__ import annotations

from collections.abc import Mapping
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
    sizes = {name: weight.shape for name, weight in model.weights.items()}
    if sizes != shape.tensors():
        raise ValueError("the weights do not have the names and shapes of the model")
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
    add_tensors(writer, model.weights, kind)
    finish(writer)


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


def add_tensors(writer: gguf.GGUFWriter, weights: Weights, kind: Kind) -> None:
    """Add tensors: vectors in full precision, matrices as ``kind`` where their rows allow it."""
    writer.add_file_type(_FILE_TYPES[kind])
    for name, weight in weights.items():
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if kind == "f32" or weight.ndim == 1 or name.endswith(_ALWAYS_F32):
            writer.add_tensor(name, weight)
        elif kind == "q8_0" and weight.shape[-1] % _Q8_0_BLOCK == 0:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, weight.astype(np.float16))


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything added so far to the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def to_f32(source: Path, destination: Path) -> None:
    """Copy any GGUF, every tensor stored as float32 and all else unchanged.

    Which tokens a model prefers then no longer depends on the batch a token is computed in:
    half-precision and quantised products round differently for different batch sizes.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(destination, architecture)
    for key, found in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        sub_type = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, found.contents(), found.types[0], sub_type=sub_type)
    add_tensors(writer, {tensor.name: _floats(tensor) for tensor in reader.tensors}, "f32")
    finish(writer)


def _floats(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    """A tensor's values; GGUF lists sizes innermost first."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(values, dtype=np.float32).reshape(tuple(reversed(tensor.shape.tolist())))


def _decimal(value: float) -> float:
    """The short decimal number that was meant: GGUF keeps single precision only."""
    return float(str(np.float32(value)))
