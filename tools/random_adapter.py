"""Write a random LoRA adapter for a model file, and the model with an adapter added to its weights.

python tools/random_adapter.py MODEL.gguf ADAPTER.gguf [--rank 4] [--size 0.1] ...
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tinymtp import gguf_file

_ADAPTED = r"blk\..*(attn|ffn|ssm)_(q|k|v|qkv|gate|up|down|output|out)\.weight|output\.weight"

# Rows are looked up in the first matrix, before they are multiplied by the second.
_LOOKED_UP = "token_embd.weight"

Array = NDArray[np.floating]


def write_random_adapter(
    path: Path,
    model: Path,
    *,
    adapted: str = _ADAPTED,
    rank: int = 4,
    alpha: float = 8.0,
    size: float = 0.1,
    seed: int = 0,
) -> None:
    """Write an adapter for all matrices of a model whose names match the pattern ``adapted``.

    With a scale of 1 each of them changes by about ``size`` times what it is.
    """
    random = np.random.default_rng(seed)
    pairs: dict[str, Array] = {}
    for tensor in gguf.GGUFReader(model).tensors:
        if len(tensor.shape) < 2 or not re.fullmatch(adapted, tensor.name):
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *outer, rows, columns = weight.shape
        first = random.standard_normal((*outer, rank, columns))
        second = random.standard_normal((*outer, rows, rank))
        second *= size * np.std(weight) * np.sqrt(rank) / alpha
        if tensor.name == _LOOKED_UP:
            first, second = second, first.T
        pairs |= {f"{tensor.name}.lora_a": first, f"{tensor.name}.lora_b": second}
    write_adapter(path, architecture(model), pairs, alpha)


def write_adapter(path: Path, architecture: str, pairs: Mapping[str, Array], alpha: float) -> None:
    """Write an adapter of these tensors, in float32."""
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in pairs.items():
            writer.add_tensor(name, tensor.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def merge(model: Path, adapters: Mapping[Path, float], merged: Path) -> None:
    """Write a model in float32 with adapters, each times its scale, added to its weights."""
    changes: dict[str, Array] = {}
    for path, scale in adapters.items():
        reader = gguf.GGUFReader(path)
        alpha = reader.fields["adapter.lora.alpha"].contents()
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        for name, first in tensors.items():
            if name.endswith(".lora_a"):
                weight = name.removesuffix(".lora_a")
                second = tensors[f"{weight}.lora_b"].astype(np.float64)
                rank = second.shape[-1]
                if weight == _LOOKED_UP:
                    first, second = second.T, first
                change = scale * alpha / rank * (second @ first)
                changes[weight] = changes.get(weight, 0) + change
    gguf_file.to_f32(model, merged, changes)


def architecture(model: Path) -> str:
    """A model file's name for it, such as ``qwen35``."""
    name: str = gguf.GGUFReader(model).fields["general.architecture"].contents()
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapted", default=_ADAPTED, help="names of matrices, as a pattern")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8.0)
    parser.add_argument("--size", type=float, default=0.1, help="of the change, to the weights'")
    parser.add_argument("--seed", type=int, default=0)
    asked = vars(parser.parse_args())
    write_random_adapter(asked.pop("out"), asked.pop("model"), **asked)


if __name__ == "__main__":
    main()
