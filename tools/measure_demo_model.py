"""Measure the demo model: the figures in its model card.

    PYTHONPATH=tests python tools/measure_demo_model.py

It computes with the numpy reference and needs the interpreter that the model was trained with,
for the held-out text comes from that interpreter's library.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from reference.qwen35_numpy import Reference
from tinymtp import corpus, gguf_file
from tinymtp.tokenizer import Tokenizer
from widen_model import DEMO_MODEL

WINDOW = 512
GENERATED = 200
DEPTH = 3
PROMPTS = {
    "prose": (
        "In the beginning",
        "And Moses said unto the children of Israel,",
        "And Jesus answered and said unto them,",
        "The LORD is my",
        "And it came to pass, when the king",
    ),
    "code": (
        "import os\nimport sys\n",
        "class Server:\n    def __init__(self",
        "    def read(self, size=-1):\n",
        "def main():\n",
        "    if not isinstance(",
    ),
}


def loss_per_char(model: Reference, tokenizer: Tokenizer, part: corpus.Part) -> tuple[float, float]:
    """Held-out loss in nats per token and per character, windows apart from each other."""
    ids = corpus.split(part, tokenizer).held_out
    loss, chars, tokens = 0.0, 0, 0
    for start in range(0, len(ids) - WINDOW, WINDOW):
        window = ids[start : start + WINDOW + 1]
        logits = model.trunk(window[:-1].tolist())[1]
        following = window[1:]
        right = np.take_along_axis(logits, following[:, None], 1)[:, 0]
        loss += float((np.logaddexp.reduce(logits, 1) - right).sum())
        chars += sum(len(tokenizer.token_bytes(int(token))) for token in following)
        tokens += len(following)
    return loss / tokens, loss / chars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL)
    asked = parser.parse_args()
    model, tokenizer = Reference(asked.model), gguf_file.read(asked.model).tokenizer
    for part in (corpus.prose(), corpus.code()):
        per_token, per_char = loss_per_char(model, tokenizer, part)
        print(
            f"{part.name}: held-out loss {per_token:.3f} nats per token, {per_char:.3f} nats "
            f"({per_char / math.log(2):.3f} bits) per character",
            flush=True,
        )
    for name, prompts in PROMPTS.items():
        runs = [
            model.simulate_drafting(tokenizer.encode(prompt), GENERATED, DEPTH)
            for prompt in prompts
        ]
        accepted = np.sum([run.accepted_by_depth for run in runs], 0)
        drafted = np.sum([run.drafted_by_depth for run in runs], 0)
        steps = sum(run.steps for run in runs)
        print(
            f"{name}: accepted by depth {(accepted / drafted).round(3).tolist()}, "
            f"{(accepted.sum() + steps) / steps:.2f} tokens per step"
        )
        for prompt, run in zip(prompts, runs, strict=True):
            print(f"  {prompt!r}: {run.tokens_per_step:.2f} {tokenizer.decode(run.tokens)!r}")


if __name__ == "__main__":
    main()
