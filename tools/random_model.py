"""Write a tiny model with random weights, for tests that need a model of some shape.

    python tools/random_model.py OUT.gguf [--architecture llama] [--no-mtp] [--mix 0.2] ...

Greedy decoding gives endless printable ASCII. The tokenizer is the start of the demo model's,
so a vocabulary of up to 2048 tokens is real text.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    random = np.random.default_rng(seed)
    weights = {
        name: _random_tensor(name, size, random, mix) for name, size in shape.tensors().items()
    }
    weights["output.weight"] = _ascii_only(weights["output.weight"], tokenizer)
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
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
        "output.weight": (vocab, width),
    }
    for layer in range(layers):
        sizes |= {
            f"blk.{layer}.attn_norm.weight": (width,),
            f"blk.{layer}.attn_q.weight": (width, width),
            f"blk.{layer}.attn_k.weight": (width, width),
            f"blk.{layer}.attn_v.weight": (width, width),
            f"blk.{layer}.attn_output.weight": (width, width),
            f"blk.{layer}.ffn_norm.weight": (width,),
            f"blk.{layer}.ffn_gate.weight": (ff, width),
            f"blk.{layer}.ffn_up.weight": (ff, width),
            f"blk.{layer}.ffn_down.weight": (width, ff),
        }
    random = np.random.default_rng(seed)
    weights = {name: _random_tensor(name, size, random, mix) for name, size in sizes.items()}
    weights["output.weight"] = _ascii_only(weights["output.weight"], tokenizer)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random llama")
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    gguf_file.add_tokenizer(writer, tokenizer, vocab)
    gguf_file.add_tensors(writer, weights, kind)
    gguf_file.finish(writer)


def _random_tensor(
    name: str, size: tuple[int, ...], random: np.random.Generator, mix: float
) -> Array:
    """One tensor. Channel 0 of the residual stream stays 1 everywhere, to serve as a bias."""
    if name.endswith("norm.weight"):
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
    if name.endswith(("attn_output.weight", "ssm_out.weight", "ffn_down.weight")):
        tensor *= mix
        tensor[0] = 0
    elif name.endswith("nextn.eh_proj.weight"):
        # The embedding passes through unchanged, the hidden state is mixed in.
        width = size[0]
        tensor = np.hstack([np.eye(width), mix * tensor[:, width:]])
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
    parser.add_argument("--architecture", choices=("qwen35", "llama"), default="qwen35")
    parser.add_argument("--no-mtp", action="store_true", help="leave out the MTP block")
    parser.add_argument("--layers", type=int, default=RANDOM_SHAPE.layers)
    parser.add_argument("--width", type=int, default=RANDOM_SHAPE.width)
    parser.add_argument("--heads", type=int, default=RANDOM_SHAPE.heads)
    parser.add_argument("--vocab", type=int, default=RANDOM_SHAPE.vocab)
    parser.add_argument("--mix", type=float, default=0.2, help="disagreement of drafts, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--type", choices=KINDS, default="f32")
    asked = parser.parse_args()
    sizes = {"layers": asked.layers, "width": asked.width, "heads": asked.heads}
    how = {"seed": asked.seed, "mix": asked.mix, "kind": asked.type}
    if asked.architecture == "llama":
        write_random_dense(asked.out, vocab=asked.vocab, **sizes, **how)
    else:
        shape = dataclasses.replace(RANDOM_SHAPE, vocab=asked.vocab, mtp=not asked.no_mtp, **sizes)
        write_random(asked.out, shape, **how)


if __name__ == "__main__":
    main()
