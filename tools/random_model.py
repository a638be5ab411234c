"""Write a tiny model with random weights, for tests that need a model of some shape.

    python tools/random_model.py OUT.gguf [--architecture qwen35] [--mix 0.2] ...

| architecture | what drafts                                                                    |
|--------------|--------------------------------------------------------------------------------|
| `qwen35`     | one MTP head, for each depth anew (with `--no-mtp`: nothing)                   |
| `step35`     | several MTP heads, each for its depth                                          |
| `glm4moe`    | one MTP head, for each depth anew                                             |
| `gemma4`     | a model of its own, OUT-assistant.gguf, which reads the memory of the other    |
| `llama`      | nothing                                                                        |

Greedy decoding gives endless printable ASCII. The tokenizer is the start of the demo model's,
so a vocabulary of up to 2048 tokens is real text.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tinymtp import gguf_file
from tinymtp.gguf_file import KINDS, Kind
from tinymtp.shape import Shape
from tinymtp.tokenizer import SPECIAL_TOKENS, Tokenizer

DEMO_MODEL = Path(__file__).parents[1] / "src/mtpbatch/models/demo.gguf"

# Two trunk layers of each kind keep the file small and still exercise both kinds of state.
RANDOM_SHAPE = Shape(
    vocab=512,
    attention_interval=2,
    width=128,
    ff=256,
    heads=2,
    key_heads=4,
    value_heads=4,
    tied_output=False,
)

_BANNED_LOGIT = -60.0

Array = NDArray[np.float32]


def demo_tokenizer(vocab: int) -> Tokenizer:
    """The demo model's tokenizer, cut down to at most ``vocab`` tokens."""
    merges = gguf_file.read(DEMO_MODEL).tokenizer.merges
    return Tokenizer(merges[: vocab - 256 - len(SPECIAL_TOKENS)])


def write_random(
    path: Path,
    shape: Shape = RANDOM_SHAPE,
    *,
    seed: int = 0,
    mix: float = 0.2,
    kind: Kind = "f32",
) -> None:
    """Write a random `qwen35` model, with an MTP block if the shape has one.

    ``mix`` scales everything but the path from a token's embedding to the output. At 0 the
    next token depends on the last one alone and every draft is right; the larger it is, the
    more the trunk and the MTP block disagree.
    """
    if shape.tied_output:
        raise ValueError("a random model needs an output matrix of its own")
    tokenizer = demo_tokenizer(shape.vocab)
    weights = _random_weights(shape.tensors(), tokenizer, np.random.default_rng(seed), mix)
    if shape.mtp:
        shared = f"blk.{shape.layers}.nextn.shared_head_norm.weight"
        weights[shared] = weights["output_norm.weight"].copy()
    about = {"general.name": "random qwen35"}
    gguf_file.write(path, gguf_file.Model(shape, weights, tokenizer, about), kind)


def write_random_dense(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    ff: int = 128,
    heads: int = 2,
    vocab: int = 512,
    context: int = 4096,
    seed: int = 0,
    mix: float = 0.2,
    kind: Kind = "f32",
) -> None:
    """Write a random `llama` model: attention alone, no recurrent state and no MTP block."""
    tokenizer = demo_tokenizer(vocab)
    sizes = _outer_sizes(vocab, width)
    for layer in range(layers):
        sizes |= _llama_block(layer, width, ff)
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, blocks=layers, width=width, ff=ff, heads=heads, context=context)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    weights = _random_weights(sizes, tokenizer, np.random.default_rng(seed), mix)
    _finish(writer, weights, tokenizer, kind)


def write_random_step35(
    path: Path,
    *,
    mtp_heads: int = 3,
    layers: int = 2,
    width: int = 64,
    ff: int = 128,
    heads: int = 2,
    vocab: int = 512,
    context: int = 4096,
    window: int = 512,
    seed: int = 0,
    mix: float = 0.2,
    kind: Kind = "f32",
) -> None:
    """Write a random `step35` model: attention, and MTP blocks that draft one token each.

    The ``mtp_heads`` blocks have weights of their own and share the trunk's last norm and output
    matrix. Every second block, MTP blocks included, sees only the last ``window`` tokens.
    ``heads`` are those of attention. ``mix`` is as in :func:`write_random`.
    """
    tokenizer = demo_tokenizer(vocab)
    blocks = layers + mtp_heads
    sizes = _outer_sizes(vocab, width)
    for block in range(blocks):
        sizes |= _llama_block(block, width, ff)
    for block in range(layers, blocks):
        sizes |= _nextn_block(block, width)
    writer = gguf.GGUFWriter(path, "step35")
    _add_shape(writer, blocks=blocks, width=width, ff=ff, heads=heads, context=context)
    writer.add_nextn_predict_layers(mtp_heads)
    writer.add_head_count_kv(heads)
    writer.add_expert_feed_forward_length(ff)  # required, although there are no experts
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern([block % 2 == 1 for block in range(blocks)])
    weights = _random_weights(sizes, tokenizer, np.random.default_rng(seed), mix)
    _finish(writer, weights, tokenizer, kind)


def write_random_glm4moe(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    ff: int = 128,
    heads: int = 2,
    vocab: int = 512,
    context: int = 4096,
    seed: int = 0,
    mix: float = 0.2,
    kind: Kind = "f32",
) -> None:
    """Write a random `glm4moe` model: attention alone, and one MTP block that drafts.

    That block alone has experts. ``heads`` are those of attention. ``mix`` is as in
    :func:`write_random`.
    """
    tokenizer = demo_tokenizer(vocab)
    blocks, n_experts = layers + 1, 2
    sizes = _outer_sizes(vocab, width)
    for block in range(blocks):
        sizes |= {
            name.replace("ffn_norm", "post_attention_norm"): size
            for name, size in _llama_block(block, width, ff).items()
        }
    for part in ("gate", "up", "down"):
        rows, columns = sizes.pop(f"blk.{layers}.ffn_{part}.weight")
        sizes[f"blk.{layers}.ffn_{part}_exps.weight"] = (n_experts, rows, columns)
        sizes[f"blk.{layers}.ffn_{part}_shexp.weight"] = (rows, columns)
    sizes[f"blk.{layers}.ffn_gate_inp.weight"] = (n_experts, width)
    sizes[f"blk.{layers}.exp_probs_b.bias"] = (n_experts,)
    sizes |= _nextn_block(layers, width)
    writer = gguf.GGUFWriter(path, "glm4moe")
    _add_shape(writer, blocks=blocks, width=width, ff=ff, heads=heads, context=context)
    writer.add_nextn_predict_layers(1)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_leading_dense_block_count(layers)
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(1)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(ff)
    weights = _random_weights(sizes, tokenizer, np.random.default_rng(seed), mix)
    _finish(writer, weights, tokenizer, kind)


def write_random_glm4(path: Path, *, layers: int = 2, width: int = 64, ff: int = 128) -> None:
    """Write a random `glm4` model with an MTP block, which llama.cpp loads and cannot run."""
    tokenizer = demo_tokenizer(512)
    sizes = _outer_sizes(512, width)
    for block in range(layers + 1):
        sizes |= _llama_block(block, width, ff)
        del sizes[f"blk.{block}.ffn_gate.weight"]
        sizes[f"blk.{block}.ffn_up.weight"] = (2 * ff, width)  # the gate is in it
        for norm in ("post_attention_norm", "post_ffw_norm"):
            sizes[f"blk.{block}.{norm}.weight"] = (width,)
    sizes |= _nextn_block(layers, width)
    writer = gguf.GGUFWriter(path, "glm4")
    _add_shape(writer, blocks=layers + 1, width=width, ff=ff, heads=2, context=4096)
    writer.add_nextn_predict_layers(1)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    weights = _random_weights(sizes, tokenizer, np.random.default_rng(0), 0.2)
    _finish(writer, weights, tokenizer, "f32")


def write_random_gemma4(
    path: Path,
    assistant_path: Path,
    *,
    layers: int = 4,
    assistant_layers: int = 2,
    width: int = 128,
    ff: int = 256,
    heads: int = 2,
    vocab: int = 512,
    context: int = 4096,
    window: int = 512,
    seed: int = 0,
    mix: float = 0.2,
    kind: Kind = "f32",
) -> None:
    """Write a random `gemma4` model, and the `gemma4-assistant` that drafts for it.

    Like the real ones: every second layer sees only the last ``window`` tokens, with smaller
    heads; the model's last two layers attend to the keys and values of the two before; the
    assistant is half as wide and attends to those of the model's last two. ``mix`` is as in
    :func:`write_random`.
    """
    if layers < 4:
        raise ValueError("the last two layers need two others, whose keys and values they use")
    tokenizer = demo_tokenizer(vocab)
    random = np.random.default_rng(seed)
    narrow = width // 2
    heads_of = {"heads": heads, "head_dim": width // heads}

    sizes = _outer_sizes(vocab, width)
    for layer in range(layers):
        sizes |= _gemma4_block(layer, layers, width, ff, own_kv=layer < layers - 2, **heads_of)
    weights = _random_gemma4_weights(sizes, tokenizer, random, mix)
    # llama.cpp multiplies embeddings by the root of the width. They fill no more channels than
    # the assistant has, so that it can say without loss what follows a token.
    weights["token_embd.weight"] /= np.sqrt(width)
    weights["token_embd.weight"][:, narrow:] = 0
    writer = gguf.GGUFWriter(path, "gemma4")
    _add_shape(writer, blocks=layers, width=width, ff=ff, heads=heads, context=context)
    _add_gemma4_attention(writer, layers, window, width // heads)
    writer.add_shared_kv_layers(2)
    writer.add_embedding_length_per_layer_input(0)
    _finish(writer, weights, tokenizer, kind)

    sizes = _outer_sizes(vocab, narrow)
    for layer in range(assistant_layers):
        sizes |= _gemma4_block(layer, assistant_layers, narrow, ff, own_kv=False, **heads_of)
        sizes[f"blk.{layer}.layer_output_scale.weight"] = (1,)
    sizes |= {
        "nextn.pre_projection.weight": (narrow, 2 * width),
        "nextn.post_projection.weight": (width, narrow),
    }
    assistant = _random_gemma4_weights(sizes, tokenizer, random, mix)
    # The assistant looks embeddings up in the model and has only an output matrix. What it
    # normalises is narrower, hence larger.
    del assistant["output.weight"]
    assistant["token_embd.weight"] = weights["output.weight"][:, :narrow] * np.sqrt(width / narrow)
    assistant["output_norm.weight"] = weights["output_norm.weight"][:narrow]
    writer = gguf.GGUFWriter(assistant_path, "gemma4-assistant")
    _add_shape(writer, blocks=assistant_layers, width=narrow, ff=ff, heads=heads, context=context)
    _add_gemma4_attention(writer, assistant_layers, window, width // heads)
    writer.add_nextn_predict_layers(assistant_layers)
    writer.add_embedding_length_out(width)
    _finish(writer, assistant, tokenizer, kind)


def write_random_neobert(
    path: Path, *, width: int = 64, ff: int = 128, heads: int = 2, vocab: int = 512, seed: int = 0
) -> None:
    """Write a random `neo-bert` model: an encoder, which generates nothing."""
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, width),
        "enc.output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.attn_qkv.weight": (3 * width, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.ffn_up.weight": (2 * ff, width),
        "blk.0.ffn_down.weight": (width, ff),
    }
    random = np.random.default_rng(seed)
    weights = {name: _random_tensor(name, size, random, 1.0) for name, size in sizes.items()}
    writer = gguf.GGUFWriter(path, "neo-bert")
    _add_shape(writer, blocks=1, width=width, ff=ff, heads=heads, context=512)
    _finish(writer, weights, demo_tokenizer(vocab), "f32")


def _outer_sizes(vocab: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
        "output.weight": (vocab, width),
    }


def _llama_block(block: int, width: int, ff: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{block}.attn_norm.weight": (width,),
        f"blk.{block}.attn_q.weight": (width, width),
        f"blk.{block}.attn_k.weight": (width, width),
        f"blk.{block}.attn_v.weight": (width, width),
        f"blk.{block}.attn_output.weight": (width, width),
        f"blk.{block}.ffn_norm.weight": (width,),
        f"blk.{block}.ffn_gate.weight": (ff, width),
        f"blk.{block}.ffn_up.weight": (ff, width),
        f"blk.{block}.ffn_down.weight": (width, ff),
    }


def _nextn_block(block: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{block}.nextn.eh_proj.weight": (width, 2 * width),
        f"blk.{block}.nextn.enorm.weight": (width,),
        f"blk.{block}.nextn.hnorm.weight": (width,),
    }


def _gemma4_block(
    layer: int, layers: int, width: int, ff: int, *, heads: int, head_dim: int, own_kv: bool
) -> dict[str, tuple[int, ...]]:
    if _gemma4_windows(layers)[layer]:
        head_dim //= 2
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_q": (heads * head_dim, width),
        "attn_q_norm": (head_dim,),
        "attn_output": (width, heads * head_dim),
        "post_attention_norm": (width,),
        "ffn_norm": (width,),
        "ffn_gate": (ff, width),
        "ffn_up": (ff, width),
        "ffn_down": (width, ff),
        "post_ffw_norm": (width,),
    }
    if own_kv:
        kv = (head_dim, width)
        block |= {"attn_k": kv, "attn_k_norm": (head_dim,), "attn_v": kv}
    sizes = {f"blk.{layer}.{name}.weight": size for name, size in block.items()}
    if not _gemma4_windows(layers)[layer]:
        sizes["rope_freqs.weight"] = (head_dim // 2,)
    return sizes


def _gemma4_windows(layers: int) -> list[bool]:
    """Whether each layer sees a window only: the last one does not, the one before does."""
    return [(layers - layer) % 2 == 0 for layer in range(layers)]


def _add_shape(
    writer: gguf.GGUFWriter, *, blocks: int, width: int, ff: int, heads: int, context: int
) -> None:
    writer.add_name(f"random {writer.arch}")
    writer.add_block_count(blocks)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-6)


def _add_gemma4_attention(writer: gguf.GGUFWriter, layers: int, window: int, head_dim: int) -> None:
    writer.add_head_count_kv(1)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_key_length_swa(head_dim // 2)
    writer.add_value_length_swa(head_dim // 2)
    writer.add_rope_dimension_count_swa(head_dim // 2)
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern(_gemma4_windows(layers))


def _finish(
    writer: gguf.GGUFWriter, weights: Mapping[str, Array], tokenizer: Tokenizer, kind: Kind
) -> None:
    vocab = len(weights["token_embd.weight"])
    writer.add_vocab_size(vocab)
    gguf_file.add_tokenizer(writer, tokenizer, vocab)
    sizes = {name: weight.shape for name, weight in weights.items()}
    gguf_file.finish(writer, sizes, weights, kind)


def _random_weights(
    sizes: Mapping[str, tuple[int, ...]],
    tokenizer: Tokenizer,
    random: np.random.Generator,
    mix: float,
) -> dict[str, Array]:
    weights = {name: _random_tensor(name, size, random, mix) for name, size in sizes.items()}
    weights["output.weight"] = _ascii_only(weights["output.weight"], tokenizer)
    return weights


def _random_gemma4_weights(
    sizes: Mapping[str, tuple[int, ...]],
    tokenizer: Tokenizer,
    random: np.random.Generator,
    mix: float,
) -> dict[str, Array]:
    weights = _random_weights(sizes, tokenizer, random, mix)
    for name, tensor in weights.items():
        # What a layer adds to the residual stream is normalised last, so mixed in only here. It
        # would be about twice as large as in the other architectures.
        if name.endswith(("post_attention_norm.weight", "post_ffw_norm.weight")):
            tensor *= mix / 2
            tensor[0] = 0
    return weights


def _random_tensor(
    name: str, size: tuple[int, ...], random: np.random.Generator, mix: float
) -> Array:
    """One tensor. Channel 0 of the residual stream stays 1 everywhere, to serve as a bias."""
    if name.endswith(("nextn.enorm.weight", "layer_output_scale.weight")):
        tensor = np.ones(size)
    elif name == "rope_freqs.weight":
        tensor = np.ones(size)
        tensor[len(tensor) // 2 :] = 1e30  # channels that positions do not turn
    elif name.endswith("norm.weight"):
        tensor = 1 + 0.05 * random.standard_normal(size)
        tensor[0] = 1
    elif name.endswith("ssm_a"):
        tensor = -random.uniform(0.5, 8, size)
    elif name.endswith("ssm_dt.bias"):
        step = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), size))
        tensor = step + np.log(-np.expm1(-step))
    elif name.endswith("ssm_conv1d.weight"):
        tensor = random.uniform(-0.5, 0.5, size)
    elif name == "token_embd.weight":
        tensor = random.standard_normal(size)
        tensor[:, 0] = 1
    else:
        tensor = random.standard_normal(size) / np.sqrt(size[-1])
    if name.endswith(("attn_output.weight", "ssm_out.weight")) or "ffn_down" in name:
        tensor *= mix
        tensor[..., 0, :] = 0
    elif name.endswith(("nextn.eh_proj.weight", "nextn.pre_projection.weight")):
        # The embedding passes through unchanged, the hidden state is mixed in.
        width = size[1] // 2
        tensor = np.hstack([np.eye(size[0], width), mix * tensor[:, width:]])
        tensor[0, 1:] = 0
    return tensor.astype(np.float32)


def _ascii_only(output: Array, tokenizer: Tokenizer) -> Array:
    """Forbid every token that is not printable ASCII, by way of the constant channel."""
    output = 2 * output
    output[:, 0] = 0
    for token in range(len(output)):
        spelling = tokenizer.token_bytes(token)
        if not spelling or any(byte != ord("\n") and not 32 <= byte < 127 for byte in spelling):
            output[token] = 0
            output[token, 0] = _BANNED_LOGIT
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--architecture",
        choices=("qwen35", "step35", "glm4moe", "gemma4", "llama"),
        default="qwen35",
    )
    parser.add_argument("--no-mtp", action="store_true", help="qwen35 without the MTP block")
    parser.add_argument("--layers", type=int, default=RANDOM_SHAPE.layers)
    parser.add_argument("--width", type=int, default=RANDOM_SHAPE.width)
    parser.add_argument("--heads", type=int, default=RANDOM_SHAPE.heads, help="of attention")
    parser.add_argument("--vocab", type=int, default=RANDOM_SHAPE.vocab)
    parser.add_argument("--mix", type=float, default=0.2, help="disagreement of drafts, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--type", choices=KINDS, default="f32")
    asked = parser.parse_args()
    sizes = {name: getattr(asked, name) for name in ("layers", "width", "heads", "vocab")}
    how = {"seed": asked.seed, "mix": asked.mix, "kind": asked.type}
    if asked.architecture == "llama":
        write_random_dense(asked.out, **sizes, **how)
    elif asked.architecture == "step35":
        write_random_step35(asked.out, **sizes, **how)
    elif asked.architecture == "glm4moe":
        write_random_glm4moe(asked.out, **sizes, **how)
    elif asked.architecture == "gemma4":
        assistant = asked.out.with_name(f"{asked.out.stem}-assistant.gguf")
        write_random_gemma4(asked.out, assistant, **sizes, **how)
    else:
        shape = dataclasses.replace(RANDOM_SHAPE, mtp=not asked.no_mtp, **sizes)
        write_random(asked.out, shape, **how)


if __name__ == "__main__":
    main()
