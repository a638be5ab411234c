"""The depth that mtpbatch chooses itself, beside every fixed one.

    python tools/widen_model.py wide.gguf
    python -m benchmarks.adaptive src/mtpbatch/models/demo.gguf wide.gguf

Texts that repeat themselves, prose picked greedily, prose sampled, and texts that drafts are poor
at; 1 to 32 clients, each of which sends its next request when its last one ends. Then clients come
and go: one by one up to the most and back, and between few and many. Answers have different
lengths, so that requests do not stay in step with each other.

In every round each variant runs once, in a process that exists only then, so that the adaptive one
begins each time without knowing anything. Ratios are taken within a round; what counts is the
median over rounds, with the least and the greatest beside it. Keep the machine quiet.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import anyio
import msgspec
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import ADAPTIVE, Depth, spread, table
from benchmarks.workload import N_CTX, PROMPTS

_ROOT = Path(__file__).resolve().parent.parent

Text: TypeAlias = Literal["repetitive", "prose", "sampled", "poor", "mixed"]
TEXTS: tuple[Text, ...] = ("repetitive", "prose", "sampled", "poor", "mixed")

_REFRAIN = "And the LORD spake unto Moses, saying, Speak unto the children of Israel. "
_TEMPERATURES = {"repetitive": 0.0, "prose": 0.0, "sampled": 1.0, "poor": 2.0}
_SHARE = (0.5, 1.5, 0.75, 1.25, 1.0)  # of the usual length, one request after another


class Shape(Struct, frozen=True):
    """Clients over time: so many for so long, one stage after another."""

    stages: tuple[tuple[int, float], ...]
    """Clients, and seconds."""


class Task(Struct, frozen=True):
    """What a process measures, which gets it as JSON in its one argument."""

    model: str
    depth: Depth
    n_draft_max: int
    threads: int
    texts: list[Text]
    concurrency: list[int]
    shapes: dict[str, Shape]
    tokens: int


class Outcome(Struct, frozen=True):
    """What it writes at its end: tokens per second."""

    steady: dict[str, dict[int, float]]
    """By text and clients."""
    changing: dict[str, list[float]]
    """By shape: of each stage."""


class Requests:
    """One request after another, of one kind of text."""

    def __init__(self, engine: mtpbatch.Engine, text: Text, depth: Depth, tokens: int) -> None:
        self._engine = engine
        self._text = text
        self._depth = depth
        self._tokens = tokens
        self._n = 0
        self.generated = 0
        """Tokens, of requests that have ended."""

    async def send(self) -> None:
        """One request, to its end."""
        n, self._n = self._n, self._n + 1
        text = TEXTS[n % 4] if self._text == "mixed" else self._text
        prompt = 3 * _REFRAIN if text == "repetitive" else PROMPTS[n % len(PROMPTS)]
        done = await self._engine.generate(
            prompt,
            max_tokens=int(self._tokens * _SHARE[n % len(_SHARE)]),
            ignore_eos=True,
            temperature=_TEMPERATURES[text],
            seed=n,
            speculation=self._depth,
            reuse_prefix=False,
        )
        self.generated += len(done.token_ids)


async def steady(requests: Requests, clients: int) -> float:
    """Tokens per second of a closed loop, while all clients are at work."""
    turns = max(3, -(-10 // clients))

    async def client(scope: anyio.CancelScope) -> None:
        for _ in range(turns):
            await requests.send()
        scope.cancel()  # the first to be done ends it for all: nobody is measured alone

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(clients):
            group.start_soon(client, group.cancel_scope)
    return requests.generated / (time.perf_counter() - begin)


async def changing(requests: Requests, stages: Sequence[tuple[int, float]]) -> list[float]:
    """Tokens per second of each stage."""
    speeds = []
    wanted = 0

    async def client(number: int) -> None:
        while number < wanted:
            await requests.send()

    working: set[int] = set()

    async def keep(number: int) -> None:
        await client(number)
        working.discard(number)

    async with anyio.create_task_group() as group:
        for clients, seconds in stages:
            wanted = clients
            for number in range(clients):
                if number not in working:
                    working.add(number)
                    group.start_soon(keep, number)
            before, begin = requests._engine.stats().generated_tokens, time.perf_counter()
            await anyio.sleep(seconds)
            after = requests._engine.stats().generated_tokens
            speeds.append((after - before) / (time.perf_counter() - begin))
        group.cancel_scope.cancel()
    return speeds


async def run(task: Task) -> Outcome:
    most = max(*task.concurrency, *(c for s in task.shapes.values() for c, _ in s.stages))
    async with mtpbatch.Engine.open(
        task.model,
        n_seq=most,
        n_ctx=N_CTX,
        n_draft_max=task.n_draft_max,
        n_threads=task.threads,
    ) as engine:
        speeds: dict[str, dict[int, float]] = {}
        for text in task.texts:
            speeds[text] = {
                clients: await steady(Requests(engine, text, task.depth, task.tokens), clients)
                for clients in task.concurrency
            }
        return Outcome(
            speeds,
            {
                name: await changing(
                    Requests(engine, "mixed", task.depth, task.tokens), shape.stages
                )
                for name, shape in task.shapes.items()
            },
        )


def in_process(task: Task) -> Outcome:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--task", msgspec.json.encode(task).decode()]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return msgspec.json.decode(done.stdout, type=Outcome)


class Comparison:
    """The outcomes of one model, by depth: one for each round."""

    def __init__(self, outcomes: dict[Depth, list[Outcome]]) -> None:
        self._outcomes = outcomes
        self._fixed = [depth for depth in outcomes if depth != ADAPTIVE]

    def steady(self) -> str:
        first = self._outcomes[ADAPTIVE][0].steady
        rows = []
        for text, by_clients in first.items():
            for clients in by_clients:
                speeds = {
                    depth: [outcome.steady[text][clients] for outcome in outcomes]
                    for depth, outcomes in self._outcomes.items()
                }
                rows.append([text, str(clients), *self._row(speeds)])
        return table(["text", "clients", *self._head()], rows)

    def changing(self) -> str:
        """The mean over the stages, and the worst stage of the adaptive one."""
        rows = []
        for name, stages in self._outcomes[ADAPTIVE][0].changing.items():
            speeds = {
                depth: [statistics.mean(outcome.changing[name]) for outcome in outcomes]
                for depth, outcomes in self._outcomes.items()
            }
            worst = min(self._stage(name, stage) for stage in range(len(stages)))
            rows.append([name, *self._row(speeds), f"{worst:.2f}"])
        return table(["clients", *self._head(), "worst stage / best fixed there"], rows)

    def _head(self) -> list[str]:
        return [
            *("no drafts" if depth == 0 else f"depth {depth}" for depth in self._fixed),
            *("adaptive", "adaptive / best fixed", "adaptive / no drafts"),
        ]

    def _row(self, speeds: dict[Depth, list[float]]) -> list[str]:
        best = max(self._fixed, key=lambda depth: statistics.median(speeds[depth]))
        cells = [f"{statistics.median(speeds[depth]):.0f}" for depth in self._fixed]
        cells.append(f"{statistics.median(speeds[ADAPTIVE]):.0f}")
        for other in (best, 0):
            pairs = zip(speeds[ADAPTIVE], speeds[other], strict=True)
            cells.append(spread([ours / theirs for ours, theirs in pairs], 2))
        return cells

    def _stage(self, name: str, stage: int) -> float:
        """Of one stage: adaptive over the best fixed depth, by the medians."""
        median = {
            depth: statistics.median(outcome.changing[name][stage] for outcome in outcomes)
            for depth, outcomes in self._outcomes.items()
        }
        return median[ADAPTIVE] / max(median[depth] for depth in self._fixed)


def shapes(most: int, seconds: float) -> dict[str, Shape]:
    """Up to the most clients and back, and to and fro between few and many."""
    levels = [1, 2, 4, 8, 16, 32, 16, 8, 4, 2, 1]
    few, many = 2, 24
    return {
        f"1 to {most} to 1": Shape(tuple((min(level, most), seconds) for level in levels)),
        f"{few} and {min(many, most)} in turn": Shape(
            tuple((min(level, most), 2 * seconds) for level in (few, many) * 3)
        ),
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    command_line.add_work(parser, rounds=3, concurrency=[1, 2, 4, 8, 16, 32], tokens=64)
    command_line.add_threads(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--stage", type=float, default=2.0, help="seconds, while clients change")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()

    facts = command_line.conditions() | {"threads": str(options.threads)}
    text = command_line.in_one_line(facts)
    figures: dict[str, object] = {}
    for model in options.models:
        depths: list[Depth] = [*options.depths, ADAPTIVE]
        outcomes: dict[Depth, list[Outcome]] = {depth: [] for depth in depths}
        for turn in range(options.rounds):
            for depth in depths:
                begin = time.perf_counter()
                outcome = in_process(
                    Task(
                        str(model.resolve()),
                        depth,
                        max(options.depths),
                        options.threads,
                        list(options.texts),
                        options.concurrency,
                        shapes(max(options.concurrency), options.stage),
                        options.tokens,
                    )
                )
                outcomes[depth].append(outcome)
                took = time.perf_counter() - begin
                print(f"{model.name}, round {turn + 1}, {depth}: {took:.0f} s", file=sys.stderr)
        comparison = Comparison(outcomes)
        figures[model.name] = msgspec.to_builtins({str(d): o for d, o in outcomes.items()})
        text += f"\n\n## {model.name}\n\n{comparison.steady()}\n\n{comparison.changing()}"
        if options.json:
            options.json.write_text(json.dumps({"conditions": facts, "figures": figures}, indent=1))
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        outcome = anyio.run(run, msgspec.json.decode(sys.argv[2], type=Task))
        print(msgspec.json.encode(outcome).decode())
    else:
        main()
