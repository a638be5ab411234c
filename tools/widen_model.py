"""Make a model that computes what the demo model computes, at the cost of a real one.

    python tools/widen_model.py wide.gguf

On the demo model everything but the arithmetic dominates, so it says little about speed. This
tool adds trunk layers that add nothing to the residual stream, and feed-forward channels that
nothing reads. The text, the drafts and their acceptance stay what they were; the weights to be
read for each step grow forty-fold.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinymtp import gguf_file
from tinymtp.gguf_file import KINDS, Model

DEMO_MODEL = Path(__file__).parents[1] / "src/mtpbatch/models/demo.gguf"

_SEED = 0
_UNREAD_SCALE = 0.05
# What a block adds to the residual stream passes through one of these last.
_BLOCK_OUTPUTS = ("attn_output.weight", "ssm_out.weight", "ffn_down.weight")


def widen(model: Model, *, layers: int, ff: int) -> Model:
    """The same function with more trunk layers and wider feed-forwards."""
    old = model.shape
    if layers < old.layers or ff < old.ff or old.layers < old.attention_interval:
        raise ValueError("a model can only grow, and must have a layer of each kind to copy")
    shape = dataclasses.replace(old, layers=layers, ff=ff)
    random = np.random.default_rng(_SEED)

    def weight(name: str) -> NDArray[np.float32]:
        if not name.startswith("blk."):
            return model.weights[name]
        _, number, rest = name.split(".", 2)
        block = int(number)
        added = old.layers <= block < layers
        if added:
            source = block % old.attention_interval
        elif block >= layers:
            source = old.layers
        else:
            source = block
        found = model.weights[f"blk.{source}.{rest}"]
        if rest in ("ffn_gate.weight", "ffn_up.weight"):
            unread = _UNREAD_SCALE * random.standard_normal((ff - old.ff, old.width))
            found = np.vstack([found, unread.astype(np.float32)])
        elif rest == "ffn_down.weight":
            found = np.pad(found, ((0, 0), (0, ff - old.ff)))
        return np.zeros_like(found) if added and rest in _BLOCK_OUTPUTS else found

    about = {**model.about, "general.name": f"{model.about.get('general.name', 'model')}, widened"}
    weights = {name: weight(name) for name in shape.tensors()}
    return Model(shape, weights, model.tokenizer, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=DEMO_MODEL)
    parser.add_argument("--layers", type=int, default=24, help="trunk layers (24)")
    parser.add_argument("--ff", type=int, default=8192, help="feed-forward width (8192)")
    parser.add_argument("--type", choices=KINDS, default="q8_0")
    asked = parser.parse_args()
    wide = widen(gguf_file.read(asked.source), layers=asked.layers, ff=asked.ff)
    gguf_file.write(asked.out, wide, asked.type)
    print(f"{asked.out}: {asked.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
