"""How soon the adaptive depth notices that texts have become easier, with prompts of any length.

    python tools/widen_model.py wide.gguf
    python -m benchmarks.changing_texts wide.gguf

One client, one request after another: some with texts that drafts are poor at, then some with texts
that repeat themselves. Before it drafts, the MTP head has to take in what it has left out, so that
a trial is the dearer the longer prompts are. Tokens per second have the prompt's time in them.

In each round each depth has an engine of its own, one after another, another one first each time.
Ratios are those of a round. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import ADAPTIVE, Depth, spread, table
from benchmarks.workload import PROMPTS, REFRAIN

_DEPTHS: tuple[Depth, ...] = (0, 3, ADAPTIVE)
_TOGETHER = 6  # good texts in a row of the table


class Work(Struct, frozen=True):
    """Requests, one after another. Lengths are in tokens."""

    n_prompt: int
    n_poor: int
    """Requests with texts that drafts are poor at, of half the usual length."""
    n_good: int
    """Then with texts that repeat themselves."""
    tokens: int


class Answer(Struct, frozen=True):
    """What came of a request."""

    seconds: float
    tokens: int
    drafted: int
    depth: int
    """That was chosen when it came."""


async def answers(model: Path, depth: Depth, threads: int, work: Work) -> list[Answer]:
    """One request after another, by an engine that is opened for them."""
    async with mtpbatch.Engine.open(
        model,
        n_seq=1,
        n_ctx=work.n_prompt + work.tokens,
        n_threads=threads,
        speculation=depth,
    ) as engine:
        poor = await engine.tokenize(" ".join(PROMPTS) * (2 + work.n_prompt // 100))
        good = await engine.tokenize(REFRAIN * (4 + work.n_prompt // 10))
        return [
            await _answer(
                engine, (good if n >= work.n_poor else poor)[n:][: work.n_prompt], n, work
            )
            for n in range(work.n_poor + work.n_good)
        ]


async def _answer(engine: mtpbatch.Engine, prompt: list[int], n: int, work: Work) -> Answer:
    is_good = n >= work.n_poor
    before, begun = engine.stats(), time.perf_counter()
    done = await engine.generate(
        prompt,
        max_tokens=work.tokens if is_good else work.tokens // 2,
        ignore_eos=True,
        temperature=0.0 if is_good else 2.0,
        seed=n,
        reuse_prefix=False,
    )
    seconds = time.perf_counter() - begun
    drafted = engine.stats().drafted - before.drafted
    return Answer(seconds, len(done.token_ids), drafted, before.draft_depth)


def rows(rounds: Sequence[dict[Depth, list[Answer]]], work: Work) -> Iterator[list[str]]:
    """Of the table: the requests with poor texts, and then a few at a time."""
    groups = {"poor": slice(work.n_poor)}
    for first in range(0, work.n_good, _TOGETHER):
        last = min(first + _TOGETHER, work.n_good)
        groups[f"good, {first + 1} to {last}"] = slice(work.n_poor + first, work.n_poor + last)
    for name, some in groups.items():
        speeds = {depth: [_speed(by[depth][some]) for by in rounds] for depth in _DEPTHS}
        *fixed, adaptive = speeds.values()
        best = [max(of_round) for of_round in zip(*fixed, strict=True)]
        answered = [answer for by in rounds for answer in by[ADAPTIVE][some]]
        drafts = sum(answer.drafted for answer in answered) / sum(a.tokens for a in answered)
        depths = " ".join(str(by[ADAPTIVE][some][0].depth) for by in rounds)
        yield [
            *(str(work.n_prompt), name),
            *(f"{statistics.median(of_depth):.0f}" for of_depth in speeds.values()),
            spread([a / b for a, b in zip(adaptive, best, strict=True)], 2),
            *(f"{drafts:.2f}", depths),
        ]


def _speed(some: Sequence[Answer]) -> float:
    """Tokens per second."""
    return sum(answer.tokens for answer in some) / sum(answer.seconds for answer in some)


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("model", type=command_line.existing_file, metavar="GGUF")
    command_line.add_threads(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[60, 250], metavar="N")
    parser.add_argument("--poor", type=int, default=8, help="requests")
    parser.add_argument("--good", type=int, default=12, help="requests")
    parser.add_argument("--tokens", type=int, default=128, help="of a good answer")
    options: argparse.Namespace = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}; threads: {options.threads}\n")
    lines: list[list[str]] = []
    for n_prompt in options.prompts:
        work = Work(n_prompt, options.poor, options.good, options.tokens)
        rounds = []
        for n in range(options.rounds):
            print(f"prompts of {n_prompt}, round {n + 1} of {options.rounds}", file=sys.stderr)
            in_turn = _DEPTHS[n % 3 :] + _DEPTHS[: n % 3]
            rounds.append(
                {
                    depth: anyio.run(answers, options.model, depth, options.threads, work)
                    for depth in in_turn
                }
            )
        lines.extend(rows(rounds, work))
    head = ["prompt", "texts", "no drafts, tokens/s", "depth 3", "adaptive", "adaptive / best"]
    print(table([*head, "drafts per token", "its depth before them"], lines))


if __name__ == "__main__":
    main()
