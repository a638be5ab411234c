"""What the scheduler promises, measured on a model: one subcommand for each promise.

    python tools/widen_model.py wide.gguf
    python -m benchmarks.scheduling smooth wide.gguf       # a long prompt beside 15 streams
    python -m benchmarks.scheduling churn wide.gguf        # 4 of 16 sequences, wherever they sit
    python -m benchmarks.scheduling prefix wide.gguf       # 64 requests that begin alike
    python -m benchmarks.scheduling overcommit wide.gguf   # a quarter of the cells
    python -m benchmarks.scheduling predict wide.gguf      # the simulator beside the engine

Ratios are taken within a round; what counts is the median over rounds, with the least and the
greatest beside it. Keep the machine quiet.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import msgspec
import numpy as np
from msgspec import Struct

import mtpbatch
from benchmarks import command_line
from benchmarks.report import spread, table
from benchmarks.workload import N_CTX, PROMPTS
from mtpbatch.testing import ClosedLoop, Drafts, Fixed, RequestKind, StepCost, simulate, steady


async def long_prompt(engine: mtpbatch.Engine, n_tokens: int) -> list[int]:
    """Tokens of the usual prompts, over and over."""
    once = await engine.tokenize("\n".join(PROMPTS))
    tokens = itertools.chain.from_iterable(itertools.repeat(once))
    return list(itertools.islice(tokens, n_tokens))


# ------------------------------------------------------------------------------------ smooth

N_LONG = 4000


async def smooth(model: Path, rounds: int, threads: int) -> str:
    """The longest that any of 15 streams waits for tokens, while a long prompt is taken in."""
    rows = []
    for _ in range(rounds):
        async with mtpbatch.Engine.open(
            model, n_seq=16, n_ctx=N_LONG + N_CTX, n_threads=threads
        ) as engine:
            rows.append(await _one_smooth(engine))
    head = ["normal step, ms", "longest wait beside the prompt", "normal steps", "first token, s"]
    columns = list(zip(*rows, strict=True))
    return table(
        head,
        [
            [
                spread(columns[0], 1),
                spread(columns[1], 1),
                spread(columns[2], 2),
                spread(columns[3], 2),
            ]
        ],
    )


async def _one_smooth(engine: mtpbatch.Engine) -> tuple[float, float, float, float]:
    times: list[list[float]] = [[] for _ in range(15)]
    begun = anyio.Event()

    async def follow(number: int) -> None:
        async with engine.stream(
            PROMPTS[number % len(PROMPTS)], max_tokens=N_LONG, ignore_eos=True
        ) as deltas:
            async for delta in deltas:
                if delta.token_ids:
                    times[number].append(time.perf_counter())
                if all(len(of_one) >= 12 for of_one in times):
                    begun.set()

    async with anyio.create_task_group() as group:
        for number in range(len(times)):
            group.start_soon(follow, number)
        await begun.wait()
        prompt = await long_prompt(engine, N_LONG)
        begin = time.perf_counter()
        done = await engine.generate(prompt, max_tokens=1, ignore_eos=True)
        end = time.perf_counter()
        group.cancel_scope.cancel()
    waits = [(b, b - a) for of_one in times for a, b in itertools.pairwise(of_one)]
    normal = statistics.median(wait for when, wait in waits if when < begin)
    longest = max(wait for when, wait in waits if begin < when < end)
    return 1e3 * normal, 1e3 * longest, longest / normal, done.timings.first_token


# ------------------------------------------------------------------------------------- churn


async def churn(model: Path, rounds: int, threads: int) -> str:
    """Four sequences that are left of sixteen, beside four that are alone from the beginning."""
    lines = []
    for unified in (True, False):
        ratios = []
        for _ in range(rounds):
            async with mtpbatch.Engine.open(
                model, n_seq=16, n_ctx=N_CTX, n_threads=threads, kv_unified=unified
            ) as engine:
                alone = await _four(engine, n_others=0)
                left = await _four(engine, n_others=12)
                ratios.append(left / alone)
        lines.append(["unified" if unified else "split", spread(ratios, 2)])
    return table(["cache", "4 that are left of 16 / 4 alone"], lines)


async def _four(engine: mtpbatch.Engine, n_others: int) -> float:
    """Tokens per second of four requests once the others, which came between them, have ended."""
    speeds: list[float] = []

    async def short(number: int) -> None:
        await engine.generate(PROMPTS[number], max_tokens=8, ignore_eos=True, speculation=0)

    async def measured(number: int, ended: list[anyio.Event], scope: anyio.CancelScope) -> None:
        """Follow one, from when the others have ended until 200 tokens later."""
        async with engine.stream(
            PROMPTS[number], max_tokens=400, ignore_eos=True, speculation=0
        ) as deltas:
            count, begin = 0, 0.0
            async for delta in deltas:
                count += len(delta.token_ids)
                if not begin and count > 20 and all(event.is_set() for event in ended):
                    count, begin = 0, time.perf_counter()
                if begin and count >= 200:
                    speeds.append(count / (time.perf_counter() - begin))
                    scope.cancel()
                    return

    async with anyio.create_task_group() as group:
        ended = [anyio.Event() for _ in range(n_others)]

        async def other(number: int) -> None:
            await short(number % len(PROMPTS))
            ended[number].set()

        for number in range(4):
            group.start_soon(measured, number, ended, group.cancel_scope)
            for n in range(number * n_others // 4, (number + 1) * n_others // 4):
                group.start_soon(other, n)
    if not speeds:
        raise RuntimeError("the four ended before the others had")
    return 4 * speeds[0]


# ------------------------------------------------------------------------------------ prefix

N_SHARED = 2000
N_SHARERS = 64


async def prefix(model: Path, rounds: int, threads: int) -> str:
    """Time to first token of requests that come at once and begin alike."""
    waits: dict[bool, list[float]] = {True: [], False: []}
    same = True
    for _ in range(rounds):
        answers = {}
        for reuse in (False, True):
            async with mtpbatch.Engine.open(
                model, n_seq=16, n_ctx=N_SHARED + N_CTX, n_threads=threads, kv_type="f32"
            ) as engine:
                shared = await long_prompt(engine, N_SHARED)
                prompts = [
                    shared + await engine.tokenize(f"\n{n}. {PROMPTS[n % len(PROMPTS)]}")
                    for n in range(N_SHARERS)
                ]
                done = await engine.generate_many(
                    prompts, max_tokens=16, ignore_eos=True, reuse_prefix=reuse
                )
            answers[reuse] = [one.token_ids for one in done]
            waits[reuse].append(statistics.mean(one.timings.first_token for one in done))
        same = same and answers[True] == answers[False]
    ratios = [a / b for a, b in zip(waits[False], waits[True], strict=True)]
    return (
        table(
            ["first token, mean, s: without reuse", "with", "ratio"],
            [[spread(waits[False], 2), spread(waits[True], 2), spread(ratios, 1)]],
        )
        + f"\n\nAll answers the same: {'yes' if same else 'no'} (the KV cache is f32)."
    )


# -------------------------------------------------------------------------------- overcommit


async def overcommit(model: Path, rounds: int, threads: int) -> str:
    """Requests that need four times the cells there are, beside an engine that has them all."""
    rows = []
    for n_cells in (16 * N_CTX, 4 * N_CTX):
        speeds, paused, answers = [], [], []
        for _ in range(rounds):
            async with mtpbatch.Engine.open(
                model, n_seq=16, n_ctx=N_CTX, n_cells=n_cells, n_threads=threads, kv_type="f32"
            ) as engine:
                begin = time.perf_counter()
                done = await engine.generate_many(
                    [PROMPTS[n % len(PROMPTS)] for n in range(32)], max_tokens=400, ignore_eos=True
                )
                tokens = sum(len(one.token_ids) for one in done)
                speeds.append(tokens / (time.perf_counter() - begin))
                paused.append(engine.stats().preemptions)
                answers.append(sum(one.finish_reason == "length" for one in done))
        rows.append([str(n_cells), spread(speeds), spread(paused), f"{min(answers)} of 32"])
    return table(["KV cells", "tokens/s", "pauses", "requests that came to their end"], rows)


# ----------------------------------------------------------------------------------- predict


class _Run(Struct, frozen=True):
    """What a closed loop came to."""

    clients: int
    depth: int
    stats: mtpbatch.EngineStats
    """Differences between its end and its begin."""
    seconds: float


async def predict(model: Path, rounds: int, threads: int) -> str:
    """Costs fitted to some loads; what the simulator makes of others, and what they came to."""
    tokens = 64
    rows = []
    async with mtpbatch.Engine.open(
        model, n_seq=16, n_ctx=N_CTX, n_threads=threads, snapshot_memory=0
    ) as engine:
        await _load(engine, 16, 0, 16)
        for _ in range(rounds):
            fitted = [
                await _load(engine, clients, depth, tokens)
                for clients, depth in ((1, 0), (4, 0), (16, 0), (1, 2), (4, 2), (16, 2))
            ]
            cost = _fit(fitted)
            for clients, depth in ((2, 0), (8, 0), (2, 3), (8, 1), (8, 3)):
                real = await _load(engine, clients, depth, tokens)
                stats = real.stats
                first = stats.accepted_by_depth[0] / max(stats.drafted_by_depth[0], 1)
                deep = sum(stats.accepted_by_depth[1:]) / max(sum(stats.accepted_by_depth[:-1]), 1)
                falloff = min(1.0, deep / first) if first else 1.0
                kind = RequestKind(
                    prompt=Fixed(45),
                    answer=Fixed(tokens),
                    drafts=Drafts(first, spread=0.5, falloff=falloff),
                )
                played = simulate(
                    ClosedLoop(steady(clients)),
                    [kind],
                    engine.model,
                    cost,
                    n_requests=clients * _turns(clients),
                    speculation=depth,
                )
                speed = stats.generated_tokens / real.seconds
                rows.append((clients, depth, speed, played.throughput))
    lines = []
    for clients, depth in dict.fromkeys(row[:2] for row in rows):
        of_one = [row for row in rows if row[:2] == (clients, depth)]
        real_speeds, simulated = [row[2] for row in of_one], [row[3] for row in of_one]
        ratios = [b / a for a, b in zip(real_speeds, simulated, strict=True)]
        lines.append(
            [str(clients), str(depth), spread(real_speeds), spread(simulated), spread(ratios, 2)]
        )
    return table(["clients", "depth", "engine, tokens/s", "simulator", "ratio"], lines)


def _turns(clients: int) -> int:
    return max(2, -(-8 // clients))


async def _load(engine: mtpbatch.Engine, clients: int, depth: int, tokens: int) -> _Run:
    async def client(number: int) -> None:
        for turn in range(_turns(clients)):
            prompt = (await long_prompt(engine, 45 + number + turn))[-45:]
            await engine.generate(prompt, max_tokens=tokens, ignore_eos=True, speculation=depth)

    before, begin = engine.stats(), time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(clients):
            group.start_soon(client, number)
    seconds = time.perf_counter() - begin
    return _Run(clients, depth, _difference(engine.stats(), before), seconds)


def _difference(after: mtpbatch.EngineStats, before: mtpbatch.EngineStats) -> mtpbatch.EngineStats:
    def minus(a: object, b: object) -> object:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return tuple(x - y for x, y in zip(a, b, strict=True))
        if isinstance(a, int | float) and isinstance(b, int | float):
            return a - b
        return a

    old, new = msgspec.structs.asdict(before), msgspec.structs.asdict(after)
    return msgspec.structs.replace(after, **{name: minus(new[name], old[name]) for name in new})


def _fit(runs: Sequence[_Run]) -> StepCost:
    """Seconds of passes, rows and sequences that explain best what the runs' steps took."""

    def solve(columns: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
        weights = 1 / np.asarray(seconds)  # relative errors
        matrix = np.asarray(columns) * weights[:, None]
        found = np.linalg.lstsq(matrix, np.ones(len(seconds)), rcond=None)[0]
        return [max(float(value), 0.0) for value in found]

    stats = [run.stats for run in runs]
    rows = [s.generated_tokens - s.accepted + s.drafted + s.prompt_tokens for s in stats]
    # A sequence in a step gives it one token that was not drafted.
    target = solve(
        [(s.steps, n, s.generated_tokens - s.accepted) for s, n in zip(stats, rows, strict=True)],
        [s.target_time + s.sample_time + s.gap_time for s in stats],
    )
    drafting = [(run, run.stats) for run in runs if run.depth]
    draft = solve(
        [
            # One decode a step and depth; the first takes in all that came since, prompts too.
            (s.steps * run.depth, s.generated_tokens + s.prompt_tokens + s.drafted)
            for run, s in drafting
        ],
        [s.draft_time for _, s in drafting],
    )
    return StepCost(
        target_pass=target[0],
        target_row=target[1],
        draft_decode=draft[0],
        draft_row=draft[1],
        sequence=target[2],
    )


# -------------------------------------------------------------------------------------------

PROMISES: dict[str, Callable[[Path, int, int], Awaitable[str]]] = {
    "smooth": smooth,
    "churn": churn,
    "prefix": prefix,
    "overcommit": overcommit,
    "predict": predict,
}


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("promise", choices=PROMISES)
    parser.add_argument("model", type=command_line.existing_file)
    parser.add_argument("--rounds", type=int, default=5)
    command_line.add_threads(parser)
    options = parser.parse_args()
    facts = command_line.conditions() | {"threads": str(options.threads)}
    text = anyio.run(PROMISES[options.promise], options.model, options.rounds, options.threads)
    print(f"{command_line.in_one_line(facts)}\n\n{text}")


if __name__ == "__main__":
    main()
