"""The depth that mtpbatch chooses itself, beside every fixed one.

    python tools/widen_model.py wide.gguf
    python -m benchmarks.adaptive src/mtpbatch/models/demo.gguf wide.gguf

Texts that repeat themselves, prose picked greedily, prose sampled, texts that drafts are poor at,
and all of them mixed; 1 to 32 clients, each of which sends its next request when its last one ends.
Then clients come and go: one by one up to the most and back, and between few and many. Answers have
different lengths, so that requests do not stay in step with each other.

Steady loads are so much work instead of so much time: the same requests for each depth. It ends
when a client finds none left, so that all clients are busy until then. Prompts are in it.

Each depth has an engine in a process of its own, all side by side; who is not measured is idle.
For each load they are measured in turn, and again in each round: a machine whose speed drifts hurts
them alike. Ratios are taken within a round; what counts is the median over rounds, with the least
and the greatest beside it. The adaptive engine has to find out about each load in its first round.
The ratio by processor time, which counts Python and all threads, is steadier where the machine is
shared. ``--parts`` prints what the time went into. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import ADAPTIVE, Depth, spread, table
from benchmarks.workload import N_CTX, PROMPTS, REFRAIN

_ROOT = Path(__file__).resolve().parent.parent

Text: TypeAlias = Literal["repetitive", "prose", "sampled", "poor", "mixed"]
TEXTS: tuple[Text, ...] = ("repetitive", "prose", "sampled", "poor", "mixed")

_TEMPERATURES = {"repetitive": 0.0, "prose": 0.0, "sampled": 1.0, "poor": 2.0}
_SHARE = (0.5, 1.5, 0.75, 1.25, 1.0)  # of the usual length, one request after another


class Setup(Struct, frozen=True):
    """A process's engine; it comes as JSON in the one argument."""

    model: str
    depth: Depth
    n_draft_max: int
    n_seq: int
    threads: int
    tokens: int


class Work(Struct, frozen=True, tag="work"):
    """So many requests, by so many clients. It comes as a line of JSON."""

    text: Text
    clients: int
    requests: int


class Changes(Struct, frozen=True, tag="changes"):
    """Clients that come and go. It comes as a line of JSON."""

    stages: tuple[tuple[int, float], ...]
    """Clients and seconds, one stage after another."""


class Figures(Struct, frozen=True):
    """What a process did while it was measured. Durations are seconds."""

    seconds: float
    processor: float
    """Of all of its threads."""
    tokens: int
    drafted: int
    accepted: int
    steps: int
    draft: float
    target: float
    sample: float
    gap: float

    @property
    def speed(self) -> float:
        """Tokens per second; 0 while the machine stands still."""
        return self.tokens / self.seconds

    def since(self, before: Figures) -> Figures:
        """What was added."""
        fields = self.__struct_fields__
        return Figures(*(getattr(self, name) - getattr(before, name) for name in fields))


class Requests:
    """One request after another, of one kind of text."""

    def __init__(self, engine: mtpbatch.Engine, text: Text, depth: Depth, tokens: int) -> None:
        self._engine = engine
        self._text = text
        self._depth = depth
        self._tokens = tokens
        self.n = 0
        """That were sent."""

    def figures(self) -> Figures:
        """Of the process, so far; also of requests that have not ended."""
        stats = self._engine.stats()
        return Figures(
            time.perf_counter(),
            time.process_time(),
            stats.generated_tokens,
            stats.drafted,
            stats.accepted,
            stats.steps,
            stats.draft_time,
            stats.target_time,
            stats.sample_time,
            stats.gap_time,
        )

    async def send(self) -> None:
        """One request, to its end."""
        n, self.n = self.n, self.n + 1
        text = TEXTS[n % 4] if self._text == "mixed" else self._text
        prompt = 3 * REFRAIN if text == "repetitive" else PROMPTS[n % len(PROMPTS)]
        await self._engine.generate(
            prompt,
            max_tokens=int(self._tokens * _SHARE[n % len(_SHARE)]),
            ignore_eos=True,
            temperature=_TEMPERATURES[text],
            seed=n,
            speculation=self._depth,
            reuse_prefix=False,
        )


async def do(requests: Requests, work: Work) -> list[Figures]:
    """Figures of the work, from the first request until none is left for a client."""
    before = requests.figures()
    after = before

    async def client(group: anyio.abc.TaskGroup) -> None:
        nonlocal after
        while requests.n < work.requests:
            await requests.send()
        after = requests.figures()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(work.clients):
            group.start_soon(client, group)
    return [after.since(before)]


async def follow(requests: Requests, changes: Changes) -> list[Figures]:
    """Figures of each stage."""
    figures = []
    wanted = 0
    working: set[int] = set()

    async def client(number: int) -> None:
        while number < wanted:
            await requests.send()
        working.discard(number)

    async with anyio.create_task_group() as group:
        for clients, seconds in changes.stages:
            wanted = clients
            for number in range(clients):
                if number not in working:
                    working.add(number)
                    group.start_soon(client, number)
            before = requests.figures()
            await anyio.sleep(seconds)
            figures.append(requests.figures().since(before))
        group.cancel_scope.cancel()
    return figures


async def serve(setup: Setup) -> None:
    """Measure what the lines of the standard input ask for; figures go to the standard output."""
    async with mtpbatch.Engine.open(
        setup.model,
        n_seq=setup.n_seq,
        n_ctx=N_CTX,
        n_draft_max=setup.n_draft_max,
        n_threads=setup.threads,
    ) as engine:
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            job = msgspec.json.decode(line, type=Work | Changes)
            text = job.text if isinstance(job, Work) else "mixed"
            requests = Requests(engine, text, setup.depth, setup.tokens)
            if isinstance(job, Work):
                figures = await do(requests, job)
            else:
                figures = await follow(requests, job)
            print(msgspec.json.encode(figures).decode(), flush=True)


class Process:
    """An engine of one depth, in a process of its own."""

    def __init__(self, setup: Setup) -> None:
        command = [sys.executable, "-m", __spec__.name, "--serve"]
        self._process = subprocess.Popen(
            [*command, msgspec.json.encode(setup).decode()],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, job: Work | Changes) -> list[Figures]:
        """Figures of each of its stages."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(job).decode() + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process ended with {self._process.wait()}")
        return msgspec.json.decode(line, type=list[Figures])

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Outcome(Struct):
    """What was measured of one depth, round by round."""

    steady: dict[str, dict[int, list[Figures]]] = {}
    """By text and clients."""
    changing: dict[str, list[list[Figures]]] = {}
    """By shape: of each stage."""


def compare(
    model: Path, depths: Sequence[Depth], options: argparse.Namespace
) -> dict[Depth, Outcome]:
    """Measure all depths, in turn at each load."""
    changes = shapes(max(options.concurrency), options.stage) if options.stage else {}
    stages = itertools.chain.from_iterable(changes.values())
    most = max([*options.concurrency, *(clients for clients, _ in stages)])
    n_draft_max = max(options.depths)
    processes = {
        depth: Process(
            Setup(str(model.resolve()), depth, n_draft_max, most, options.threads, options.tokens)
        )
        for depth in depths
    }
    outcomes = {depth: Outcome() for depth in depths}
    try:
        for text in options.texts:
            for clients in options.concurrency:
                print(f"{model.name}: {text}, {clients} clients", file=sys.stderr)
                work = Work(text, clients, max(options.least, options.turns * clients))
                for _, depth in itertools.product(range(options.rounds), depths):
                    by_clients = outcomes[depth].steady.setdefault(text, {})
                    by_clients.setdefault(clients, []).extend(processes[depth].measure(work))
        for name, shape in changes.items():
            print(f"{model.name}: {name}", file=sys.stderr)
            for _, depth in itertools.product(range(options.rounds), depths):
                figures = processes[depth].measure(Changes(shape))
                outcomes[depth].changing.setdefault(name, []).append(figures)
    finally:
        for process in processes.values():
            process.end()
    return outcomes


class Comparison:
    """The outcomes of one model, by depth."""

    def __init__(self, outcomes: dict[Depth, Outcome]) -> None:
        self._outcomes = outcomes
        self._fixed = [depth for depth in outcomes if depth != ADAPTIVE]

    def steady(self) -> str:
        rows = []
        for text, by_clients in self._outcomes[ADAPTIVE].steady.items():
            for clients in by_clients:
                figures = {d: o.steady[text][clients] for d, o in self._outcomes.items()}
                speeds = {d: [each.speed for each in rounds] for d, rounds in figures.items()}
                per_processor = {
                    d: [each.tokens / each.processor for each in rounds]
                    for d, rounds in figures.items()
                }
                best, _ = self._ratios(per_processor)
                rows.append([text, str(clients), *self._row(speeds), best])
        head = ["text", "clients", *self._head(), "the same by processor time"]
        return table(head, rows)

    def changing(self) -> str:
        """The mean over the stages, and the worst stage of the adaptive one."""
        rows = []
        for name, rounds in self._outcomes[ADAPTIVE].changing.items():
            speeds = {
                depth: [
                    sum(stage.tokens for stage in stages) / sum(stage.seconds for stage in stages)
                    for stages in outcome.changing[name]
                ]
                for depth, outcome in self._outcomes.items()
            }
            worst = min(self._stage(name, stage) for stage in range(len(rounds[0])))
            rows.append([name, *self._row(speeds), f"{worst:.2f}"])
        return table(["clients", *self._head(), "worst stage / best fixed there"], rows)

    def parts(self) -> str:
        """What the time went into, for each token."""
        head = ["text", "clients", "depth", "drafts", "accepted", "steps"]
        head += ["µs: draft", "target", "sample", "gap", "processor", "all"]
        rows = []
        for depth, outcome in self._outcomes.items():
            for text, by_clients in outcome.steady.items():
                for clients, figures in by_clients.items():
                    rows.append([text, str(clients), str(depth), *self._parts(figures)])
        return table(head, sorted(rows, key=lambda row: (row[0], int(row[1]))))

    def _parts(self, figures: Sequence[Figures]) -> list[str]:
        def each(value: Callable[[Figures], float]) -> float:
            return statistics.median(value(f) / f.tokens for f in figures)

        counts = (each(lambda f: f.drafted), each(lambda f: f.accepted), each(lambda f: f.steps))
        times = (
            each(lambda f: f.draft),
            each(lambda f: f.target),
            each(lambda f: f.sample),
            each(lambda f: f.gap),
            each(lambda f: f.processor),
            each(lambda f: f.seconds),
        )
        return [f"{n:.3f}" for n in counts] + [f"{1e6 * t:.0f}" for t in times]

    def _head(self) -> list[str]:
        return [
            *("no drafts" if depth == 0 else f"depth {depth}" for depth in self._fixed),
            *("adaptive", "adaptive / best fixed", "adaptive / no drafts"),
        ]

    def _row(self, speeds: dict[Depth, list[float]]) -> list[str]:
        cells = [f"{statistics.median(rounds):.0f}" for rounds in speeds.values()]
        return [*cells, *self._ratios(speeds)]

    def _ratios(self, speeds: dict[Depth, list[float]]) -> list[str]:
        """Adaptive over the best fixed depth, and over none, of each round."""
        best = max(self._fixed, key=lambda depth: statistics.median(speeds[depth]))
        cells = []
        for other in (best, 0):
            pairs = zip(speeds[ADAPTIVE], speeds[other], strict=True)
            # Nothing at all is generated while the machine stands still.
            cells.append(
                spread([ours / theirs if theirs else math.inf for ours, theirs in pairs], 2)
            )
        return cells

    def _stage(self, name: str, stage: int) -> float:
        """Of one stage: adaptive over the best fixed depth, by the medians."""
        median = {
            depth: statistics.median(stages[stage].speed for stages in outcome.changing[name])
            for depth, outcome in self._outcomes.items()
        }
        best = max(median[depth] for depth in self._fixed)
        return median[ADAPTIVE] / best if best else math.inf  # too short for a token


def shapes(most: int, seconds: float) -> dict[str, tuple[tuple[int, float], ...]]:
    """Up to the most clients and back, and to and fro between few and many."""
    levels = [1, 2, 4, 8, 16, 32, 16, 8, 4, 2, 1]
    few, many = 2, 24
    return {
        f"1 to {most} to 1": tuple((min(level, most), seconds) for level in levels),
        f"{few} and {min(many, most)} in turn": tuple(
            (min(level, most), 2 * seconds) for level in (few, many) * 3
        ),
    }


def main() -> None:
    parser = command_line.parser(__doc__)
    command_line.add_models(parser)
    command_line.add_work(parser, rounds=5, concurrency=[1, 2, 4, 8, 16, 32], tokens=64)
    command_line.add_threads(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS)
    parser.add_argument("--turns", type=int, default=2, help="requests of each client")
    parser.add_argument("--least", type=int, default=8, help="requests of all clients")
    parser.add_argument(
        "--stage", type=float, default=2.0, help="seconds, while clients change; 0: they do not"
    )
    parser.add_argument("--parts", action="store_true", help="print what the time went into")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if 0 not in options.depths:
        parser.error("--depths needs 0: adaptive is compared with it")

    facts = command_line.conditions() | {"threads": str(options.threads)}
    text = command_line.in_one_line(facts)
    figures: dict[str, object] = {}
    for model in options.models:
        outcomes = compare(model, [*options.depths, ADAPTIVE], options)
        figures[model.name] = msgspec.to_builtins(
            {str(depth): outcome for depth, outcome in outcomes.items()}
        )
        if options.json:
            options.json.write_text(json.dumps({"conditions": facts, "figures": figures}, indent=1))
        comparison = Comparison(outcomes)
        sections = [f"{model.name}:", comparison.steady()]
        if options.stage:
            sections.append(comparison.changing())
        if options.parts:
            sections.append(comparison.parts())
        text = "\n\n".join([text, *sections])
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        anyio.run(serve, msgspec.json.decode(sys.argv[2], type=Setup))
    else:
        main()
