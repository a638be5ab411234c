"""Train the demo model and write it as a GGUF.

    pip install torch==2.13.0 numpy gguf regex
    apt-get install bible-kjv g++
    python tools/train_demo_model.py

It takes about three quarters of an hour on two idle CPU cores. Everything is seeded and counted
in steps, so the same machine, interpreter and library versions give the same model.

The trunk and the MTP block learn together: the trunk from the text, the MTP block from the text
one and two tokens further on.

An interrupted run continues from its last checkpoint; a finished one is only exported again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinymtp import corpus, gguf_file
from tinymtp.gguf_file import Model
from tinymtp.network import Network
from tinymtp.shape import Shape
from tinymtp.tokenizer import Tokenizer

OUTPUT = Path(__file__).parents[1] / "src/mtpbatch/models/demo.gguf"
SCRATCH = Path("build/demo-model")

WEIGHTS_SEED = 1611
BATCHES_SEED = (1611, 0)
WINDOW = 512
WINDOWS_PER_PART = 4
STEPS = 2500
REPORTED_DEPTH = 3

MUON_RATE = 0.02
ADAM_RATE = 4e-3
WARMUP_STEPS = 100
CONSTANT_SHARE = 0.6
DRAFT_LOSS_WEIGHTS = (0.3, 0.3)
"""One per draft depth that is trained; the trunk's own loss weighs 1."""

CHECKPOINT_EVERY = 250
REPORT_EVERY = 50


def batch(splits: list[corpus.Split], step: int) -> Tensor:
    """Random windows, as many of each part. The step seeds them, so that runs can continue."""
    random = np.random.default_rng((*BATCHES_SEED, step))
    windows = [
        split.train[start : start + WINDOW + 1]
        for split in splits
        for start in random.integers(0, len(split.train) - WINDOW, WINDOWS_PER_PART)
    ]
    return torch.from_numpy(np.stack(windows))


def rate_factor(step: int) -> float:
    """Warm up, stay constant for a share of the run, then fall along a cosine to 2 %."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = max(0.0, step / STEPS - CONSTANT_SHARE) / (1 - CONSTANT_SHARE)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


class Trainer:
    """A network, its optimizers and data, and the step that training has reached."""

    def __init__(self, splits: list[corpus.Split], work: Path) -> None:
        torch.manual_seed(WEIGHTS_SEED)
        self.network = Network(Shape())
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in self.network.named_parameters():
            hidden_matrix = name.startswith("blk.") and weight.ndim == 2
            is_wide = hidden_matrix and min(weight.shape) > 16
            (matrices if is_wide else others).append(weight)
        # On two cores Muon costs a tenth of the speed, and it learns far more from each step.
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.02), MUON_RATE),
            (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True), ADAM_RATE),
        ]
        self.splits = splits
        self.checkpoint = work / "checkpoint.pt"
        self.step = 0
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint)
            self.network.load_state_dict(saved["network"])
            for (optimizer, _), state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = saved["step"]
        self.network.compile_blocks()
        self.cross_entropy = torch.compile(self._cross_entropy, dynamic=False)

    def _cross_entropy(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.network.logits(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, target.flatten(0, 1))

    def run(self) -> None:
        """Do the steps that are left."""
        started, first_step, total = time.monotonic(), self.step, 0.0
        while self.step < STEPS:
            loss = self._loss(batch(self.splits, self.step))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            for optimizer, rate in self.optimizers:
                optimizer.param_groups[0]["lr"] = rate * rate_factor(self.step)
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            total += loss.item()
            if self.step % REPORT_EVERY == 0:
                seconds = time.monotonic() - started
                print(
                    f"step {self.step}/{STEPS} loss {total / REPORT_EVERY:.3f}"
                    f" {(self.step - first_step) / seconds:.2f} steps/s {seconds / 60:.1f} min",
                    flush=True,
                )
                total = 0.0
            if self.step % CHECKPOINT_EVERY == 0:
                self._save()
                self.report()

    def _save(self) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.step,
        }
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _loss(self, ids: Tensor) -> Tensor:
        context, following = ids[:, :-1], ids[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.network.trunk(context)
            loss = self.cross_entropy(hidden, following)
            for weight in DRAFT_LOSS_WEIGHTS:
                hidden = self.network.draft(context, hidden)
                loss = loss + weight * self.cross_entropy(hidden, following)
        return loss

    @torch.no_grad()
    def report(self, windows: int = 16) -> None:
        """Print held-out loss and how often each draft depth agrees with the trunk."""
        for split in self.splits:
            ids = split.held_out[: windows * (WINDOW + 1)].reshape(-1, WINDOW + 1)
            context = torch.from_numpy(ids[:, :-1])
            following = torch.from_numpy(ids[:, 1:])
            hidden = self.network.trunk(context)
            logits = self.network.logits(hidden)
            loss = F.cross_entropy(logits.flatten(0, 1), following.flatten()).item()
            best = logits.argmax(-1)
            agreement = []
            for _ in range(REPORTED_DEPTH):
                hidden = self.network.draft(context, hidden)
                guess = self.network.logits(hidden).argmax(-1)
                agreement.append(f"{(guess == best).float().mean().item():.3f}")
            print(f"  held-out {split.name}: loss {loss:.3f}, agreement {agreement}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT, help="the GGUF to write")
    parser.add_argument("--work", type=Path, default=SCRATCH, help="folder for checkpoints")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)

    parts = [corpus.prose(), corpus.code()]
    merges = asked.work / "merges.json"
    if merges.exists():
        tokenizer = Tokenizer.load(merges)
    else:
        text = "\n".join(document for part in parts for document in part.documents)
        tokenizer = Tokenizer.train(text, Shape().vocab)
        tokenizer.save(merges)
    splits = [corpus.split(part, tokenizer) for part in parts]

    trainer = Trainer(splits, asked.work)
    trainer.run()

    about = {
        "general.name": "mtpbatch demo",
        "general.description": "A tiny language model with a multi-token-prediction block, "
        "to try speculative decoding on. It knows the King James Bible and Python's standard "
        "library, and neither well.",
        "general.license": "mit",
        "mtpbatch.training": json.dumps(
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "steps": STEPS,
                "tokens_per_step": 2 * WINDOWS_PER_PART * WINDOW,
                "corpus": {
                    part.name: {
                        "sha256": part.sha256,
                        "chars": part.chars,
                        "tokens": len(split.train) + len(split.held_out),
                    }
                    for part, split in zip(parts, splits, strict=True)
                },
            }
        ),
    }
    model = Model(trainer.network.shape, trainer.network.weights(), tokenizer, about)
    gguf_file.write(asked.out, model, "q8_0")


if __name__ == "__main__":
    main()
