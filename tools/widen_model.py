"""Make a model that computes what the demo model computes, at the cost of a real one.

    python tools/widen_model.py wide.gguf
    python tools/widen_model.py wide.gguf --width 3072 --vocab 248320    # 3.7 GB

On the demo model everything but the arithmetic dominates, so it says little about speed. This
tool adds trunk layers that add nothing to the residual stream, feed-forward channels that nothing
reads, residual channels that are always 0, and tokens that are never the most probable. Greedy
text, its drafts and their acceptance stay what they were; the weights to be read for each step
grow forty-fold, or a thousandfold with the second command.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinymtp import gguf_file
from tinymtp.gguf_file import KINDS, Model
from tinymtp.shape import Shape

DEMO_MODEL = Path(__file__).parents[1] / "src/mtpbatch/models/demo.gguf"

_SEED = 0
_UNREAD_SCALE = 0.05
# What a block adds to the residual stream passes through one of these last.
_BLOCK_OUTPUTS = ("attn_output.weight", "ssm_out.weight", "ffn_down.weight")
# What writes to the residual stream, and what reads from it.
_WRITERS = (*_BLOCK_OUTPUTS, "token_embd.weight", "nextn.eh_proj.weight")
_READERS = (
    *("attn_norm.weight", "post_attention_norm.weight", "output.weight"),
    *("nextn.enorm.weight", "nextn.hnorm.weight"),
)

Array = NDArray[np.float32]


def widen(
    model: Model, *, layers: int, ff: int, width: int | None = None, vocab: int | None = None
) -> Model:
    """The same function with more trunk layers, wider feed-forwards, and whatever else is given.

    Its weights are made when they are asked for.
    """
    old = model.shape
    width, vocab = width or old.width, vocab or old.vocab
    if layers < old.layers or ff < old.ff or width < old.width or vocab < old.vocab:
        raise ValueError("a model can only grow")
    if old.layers < old.attention_interval:
        raise ValueError("a model must have a layer of each kind to copy")
    if width not in (old.width * 4**n for n in range(8)):
        raise ValueError(f"the width must be {old.width} times a power of 4, to scale exactly")
    shape = dataclasses.replace(
        old,
        layers=layers,
        ff=ff,
        width=width,
        vocab=vocab,
        tied_output=old.tied_output and width == old.width,
    )
    about = {**model.about, "general.name": f"{model.about.get('general.name', 'model')}, widened"}
    return Model(shape, _Widened(model, shape), model.tokenizer, about)


class _Widened(Mapping[str, Array]):
    """The weights of a widened model.

    A norm divides by the root mean square over all channels, those that are 0 included. For that
    to stay the same in a stream that is n² times as wide, its values are n times as large:
    whatever writes to the stream is multiplied by n, and whatever reads from it divided. The
    hidden rows that the MTP block gets, which have been through the last norm, are n times as
    large as well; so that norm is left alone and the output matrix is divided, which is why it
    cannot be the embedding matrix any more.
    """

    def __init__(self, source: Model, shape: Shape) -> None:
        self._source = source
        self._shape = shape
        self._sizes = shape.tensors()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, name: str) -> Array:
        size, old = self._sizes[name], self._source.shape
        block, kind = None, name
        if name.startswith("blk."):
            _, number, kind = name.split(".", 2)
            block = int(number)
        if (
            block is not None
            and old.layers <= block < self._shape.layers
            and kind in _BLOCK_OUTPUTS
        ):
            return np.zeros(size, np.float32)
        found = self._found(block, kind)
        if kind == "nextn.eh_proj.weight":  # reads two rows: an embedding and a hidden one
            parts = found.reshape(old.width, 2, old.width)
            weight = _padded(parts, (self._shape.width, 2, self._shape.width)).reshape(size)
        else:
            weight = _padded(found, size)
        if kind in ("token_embd.weight", "output.weight"):
            weight[old.vocab :] = weight[: old.vocab].mean(0)  # the mean is never the maximum
        elif kind in ("ffn_gate.weight", "ffn_up.weight"):
            random = np.random.default_rng([_SEED, *name.encode()])
            weight[old.ff :] = _UNREAD_SCALE * random.standard_normal(weight[old.ff :].shape)
        scale = math.isqrt(self._shape.width // old.width)
        if kind in _WRITERS:
            weight *= scale
        elif kind in _READERS:
            weight /= scale
        return weight

    def _found(self, block: int | None, kind: str) -> Array:
        """The source's weight that does the same, or, for a layer that does nothing, any."""
        source, old = self._source, self._source.shape
        if block is None:
            if kind == "output.weight" and old.tied_output:
                kind = "token_embd.weight"
            return source.weights[kind]
        if block >= self._shape.layers:
            block = old.layers
        elif block >= old.layers:
            block %= old.attention_interval
        return source.weights[f"blk.{block}.{kind}"]


def _padded(weight: Array, size: tuple[int, ...]) -> Array:
    padded = np.zeros(size, np.float32)
    padded[tuple(slice(n) for n in weight.shape)] = weight
    return padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=DEMO_MODEL)
    parser.add_argument("--layers", type=int, default=24, help="trunk layers (24)")
    parser.add_argument("--ff", type=int, default=8192, help="feed-forward width (8192)")
    parser.add_argument("--width", type=int, help="4 or 16 times the source's (the source's)")
    parser.add_argument("--vocab", type=int, help="tokens (as many as the source's)")
    parser.add_argument("--type", choices=KINDS, default="q8_0")
    asked = parser.parse_args()
    source = gguf_file.read(asked.source)
    wide = widen(source, layers=asked.layers, ff=asked.ff, width=asked.width, vocab=asked.vocab)
    gguf_file.write(asked.out, wide, asked.type)
    print(f"{asked.out}: {asked.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
