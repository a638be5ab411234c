"""Shows over a long run that nothing is lost.

    python tools/soak.py --minutes 60 --seed 1 --output soak

Five parts, each with its promise; the report, ``soak.md`` and ``soak.json``, says what was found:

- **state machines**: 100,000 rules over the scheduler, the engine and the server, in any order;
- **load**: 10,000 requests of random sizes on 64 sequences with too few KV cells for all, 30 % of
  which are cancelled and 5 % time out. Each ends once, with the tokens of a run that nothing
  disturbs, or a beginning of them, but for rounding; memory stays;
- **openings**: 1,000 engines, one after the other; memory stays;
- **slow readers**: streams of others while some are read slowly or never;
- **idle connections**: streams over HTTP while the server waits for clients that never read theirs,
  and while 1,000 connections are open on which nobody says anything as well.

``--share 0.01`` does a hundredth of it. Time that runs out leaves parts short, and the report says
so: a part that has not done all it should has not passed. Needs ``pip install '.[test]'``.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import importlib.resources
import logging
import operator
import random
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Final

import hypothesis
import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test
from msgspec import Struct
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROOT: Final = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "core"), str(ROOT / "tools")]

from api_server import serving  # noqa: E402
from engine_machine import EngineMachine, shorter_prompts_matter  # noqa: E402
from mtpbatch import (  # noqa: E402
    Completion,
    Engine,
    Generation,
    MtpBatchError,
    RequestAdmitted,
    RequestEnded,
)
from mtpbatch.server import create_app  # noqa: E402
from patience import until  # noqa: E402
from server_machine import ServerMachine  # noqa: E402
from tinymtp import gguf_file  # noqa: E402

MACHINES: tuple[type[RuleBasedStateMachine], ...] = (
    importlib.import_module("test_scheduler").SchedulerMachine,
    EngineMachine,
    ServerMachine,
)

RULES: Final = 100_000
REQUESTS: Final = 10_000
OPENINGS: Final = 1_000
ROUNDS: Final = 40  # of slow readers, and of idle connections
PAUSE: Final = 0.25  # seconds of a slow reader after each piece
IDLE: Final = 1_000  # connections
UNREAD: Final = 8  # streams over HTTP beside them, of 24
SYSTEM_KEEPS: Final = 4096  # bytes of what they do not read; uvicorn keeps 64 KiB
STUCK: Final = 150  # events of a stream, by which the server waits for all of them

N_SEQ: Final = 64
N_CTX: Final = 256
N_CELLS: Final = 512  # a 32nd of what all sequences could fill
FILLING: Final = 60.0  # seconds, in which requests have filled them for long
AT_ONCE: Final = 192  # requests: three for each sequence
QUESTIONS: Final = 100
MOST_TOKENS: Final = 120
MEAN_TOKENS: Final = 40
TEXT: Final = Path(__file__).read_text()  # prompts are parts of it
SNAPSHOTS: Final = 4  # MiB for them
USUAL: Final = 12  # prompts that fill that: their snapshots have 430 KB each
WARM_UP: Final = 500  # requests, which fill that
READINGS: Final = 20  # of memory

# Batches of other shapes round differently: the logarithm of a token's probability differs by less
# than this, and by 8e-6 at most among 150,000 of them. So the best token can be another one only
# where the best two differ by less than twice as much.
ROUNDING: Final = 2e-5
TIE: Final = 2 * ROUNDING

SLOWER: Final = 1.10  # what slow readers, or idle connections, may make of others' p99

# Shares of requests that are to end so, where some that are cancelled have ended by then.
LEAST_CANCELLED: Final = 0.25
LEAST_TIMED_OUT: Final = 0.02
ENOUGH: Final = 300  # requests, of which some of either kind have to be

_EXAMPLE: Final = 50  # rules


class Part(Struct, frozen=True):
    """What one part of the run has shown."""

    name: str
    done: int
    wanted: int
    seconds: float
    figures: dict[str, float | int | str]
    violations: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.violations and self.done >= self.wanted


class Clock:
    """How much time is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end


class Growth(Struct, frozen=True):
    """What stays in memory."""

    n_bytes: float
    """Of C and C++."""
    n_objects: float
    """Of Python."""
    pages: int
    """Bytes of pages that are no file's: what allocators keep, and whatever else."""


# Of the second half. What each of 5,000 requests leaves, be it a C string of 100 bytes or a number
# of Python's, comes to more; so do the smallest buffer of 500 openings, and an engine's objects.
BY_REQUESTS: Final = Growth(n_bytes=256 << 10, n_objects=2_500, pages=8 << 20)
BY_OPENINGS: Final = Growth(n_bytes=1 << 20, n_objects=25_000, pages=32 << 20)


_MMAP_THRESHOLD: Final = -3  # M_MMAP_THRESHOLD of malloc.h


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2``"""

    _fields_ = (
        *((f"_{i}", ctypes.c_size_t) for i in range(4)),
        ("mapped", ctypes.c_size_t),
        *((f"_{i}", ctypes.c_size_t) for i in range(5, 7)),
        ("used", ctypes.c_size_t),  # of what is not mapped
        *((f"_{i}", ctypes.c_size_t) for i in range(8, 10)),
    )


class Memory:
    """What stays in memory, from readings between pieces of work.

    What is allocated is counted, by glibc and by Python, for pages tell little: allocators keep
    what they have split up, megabytes more or less. Each piece leaves something else in caches, so
    that the slope of readings counts, not the difference of two.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Mallinfo
        self._libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # less is not rounded up to pages
        self._readings: list[tuple[int, int, int, int]] = []

    def read(self, n_done: int, n_wanted: int = 0) -> int:
        """After so many units of work: bytes that are allocated in C and C++, without those that
        the engine says it keeps."""
        gc.collect()
        self._libc.malloc_trim(0)
        info = self._libc.mallinfo2()
        status = dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        # Those of files come and go as the machine needs its memory.
        pages = sum(1024 * int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
        n_bytes: int = info.used + info.mapped - n_wanted
        self._readings.append((n_done, n_bytes, sys.getallocatedblocks(), pages))
        return n_bytes

    def growth(self) -> Growth:
        """What stays of the second half of the work: caches and buffers fill in the first."""
        half = self._readings[len(self._readings) // 2 :]
        n_done, n_bytes, n_objects, pages = zip(*half, strict=True)
        n = n_done[-1] - n_done[0]
        if not n:
            return Growth(0, 0, 0)
        return Growth(
            n * statistics.linear_regression(n_done, n_bytes).slope,
            n * statistics.linear_regression(n_done, n_objects).slope,
            pages[-1] - pages[0],
        )


def told(growth: Growth, may_be: Growth) -> tuple[dict[str, str], list[str]]:
    """Figures and violations."""
    names = ("bytes that stay", "objects that stay", "bytes of pages that stay")
    figures, violations = {}, []
    for name, found, most in zip(
        names, msgspec.structs.astuple(growth), msgspec.structs.astuple(may_be), strict=True
    ):
        figures[name] = f"{found:.0f}, may be {most}"
        if found > most:
            violations.append(f"{name}: {figures[name]}")
    return figures, violations


# ------------------------------------------------------------------------- state machines


def machines(wanted: int, seed: int, clock: Clock) -> Part:
    """Rules of all machines in any order, until there are enough."""
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    violations: list[str] = []
    turn = 0
    while sum(counts.values()) < wanted and not violations and not clock.is_over:
        kind = MACHINES[turn % len(MACHINES)]
        left = wanted - sum(counts.values())
        counted = _counting(kind, counts)
        test = get_state_machine_test(
            counted,
            settings=settings(
                max_examples=max(1, min(100, left // (len(MACHINES) * _EXAMPLE))),
                stateful_step_count=_EXAMPLE,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
        try:
            with shorter_prompts_matter():
                hypothesis.seed(seed + turn)(test)()
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            violations.append(f"{kind.__name__}, seed {seed + turn}: {error!r}\n{notes}")
        turn += 1
    done = sum(counts.values())
    return Part(
        "state machines", done, wanted, time.monotonic() - begin, dict(counts), tuple(violations)
    )


def _counting(
    kind: type[RuleBasedStateMachine], counts: Counter[str]
) -> type[RuleBasedStateMachine]:
    """The machine, its rules counted: what holds is looked at after each of them."""

    class Counting(kind):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            # It is looked at before all of them as well, and after what opens the machine.
            self.n_rules = -1 - len(self._initialize_rules_to_run)

        def check_invariants(self, *args: Any, **options: Any) -> None:
            self.n_rules += 1
            counts[kind.__name__] += self.n_rules > 0
            super().check_invariants(*args, **options)

    Counting.__name__ = kind.__name__
    return Counting


# ---------------------------------------------------------------------------------- load


class Question(Struct, frozen=True):
    """A prompt and the tokens of its answer, with the logarithms of their probabilities."""

    prompt: list[int]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


def n_alike(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(bool, map(operator.eq, some, others)))


def logprobs(done: Completion) -> tuple[float, ...]:
    """Of each token of an answer."""
    return tuple(told.logprob for told in done.logprobs or ())


class Undisturbed:
    """An engine that has one sequence and never drafts: the truth for the others."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    @asynccontextmanager
    async def open(cls, model: Path) -> AsyncIterator[Undisturbed]:
        async with Engine.open(
            model, n_seq=1, n_ctx=N_CTX, n_draft_max=0, kv_type="f32", snapshot_memory=0
        ) as engine:
            yield cls(engine)

    async def questions(self, n: int, chance: random.Random) -> list[Question]:
        """Some of all sizes."""
        text = await self.engine.tokenize(TEXT)
        asked = []
        for _ in range(n):
            size = min(N_CTX - MOST_TOKENS - 1, 1 + int(chance.expovariate(1 / 40)))
            start = chance.randrange(len(text) - size)
            prompt = text[start : start + size]
            done = await self.engine.generate(
                prompt, max_tokens=MOST_TOKENS, ignore_eos=True, logprobs=0
            )
            asked.append(Question(prompt, done.token_ids, logprobs(done)))
        return asked

    async def margins(self, question: Question) -> list[float]:
        """Where the answer takes the second best token: how much worse that is, in nats.

        Raises ValueError if it takes another one.
        """
        margins = []
        prompt, answer = question.prompt, question.answer
        while answer:
            done = await self.engine.generate(
                prompt, max_tokens=len(answer), ignore_eos=True, logprobs=2
            )
            assert done.logprobs is not None
            n_same = n_alike(answer, done.token_ids)
            if n_same == len(answer):
                break
            (_, best), (second, logprob) = done.logprobs[n_same].top
            if answer[n_same] != second:
                raise ValueError(
                    f"token {n_same} is none of the best two, {done.logprobs[n_same].top}"
                )
            margins.append(best - logprob)
            prompt, answer = [*prompt, *answer[: n_same + 1]], answer[n_same + 1 :]
        return margins


class Load:
    """Requests at once, some of which are given up."""

    def __init__(self, engine: Engine, asked: Sequence[Question], seed: int) -> None:
        self.engine = engine
        self.asked = asked
        self.chance = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.others: list[tuple[str, Question]] = []  # answers that are not the undisturbed run's
        self.rounding = 0.0  # the greatest difference between logarithms of a token's probability
        self.violations: list[str] = []

    async def one(self) -> None:
        question = self.chance.choice(self.asked)
        size = 1 + int(self.chance.expovariate(1 / MEAN_TOKENS))
        params: dict[str, Any] = {
            "max_tokens": min(size, MOST_TOKENS),
            "ignore_eos": True,
            "speculation": self.chance.choice(("auto", 0, 1, 3)),
            "logprobs": self.chance.choice((None, 0)),
        }
        fate = self.chance.random()
        if fate < 0.05:
            params["timeout"] = self.chance.uniform(0.0, 0.5)
        generation = self.engine.submit(question.prompt, **params)
        cancelled = 0.05 <= fate < 0.35
        try:
            if cancelled:
                n_left = self.chance.randrange(params["max_tokens"])
                if n_left:
                    async for delta in generation:
                        n_left -= len(delta.token_ids)
                        if n_left <= 0:
                            break
                generation.cancel()
            await self.check(question, await generation, params, cancelled=cancelled)
        except MtpBatchError as error:
            self.violations.append(repr(error))

    async def check(
        self, question: Question, done: Completion, params: dict[str, Any], *, cancelled: bool
    ) -> None:
        self.ends[done.finish_reason] += 1
        allowed = {"length", "abort" if cancelled else "timeout" if "timeout" in params else ""}
        if done.finish_reason not in allowed:
            self.violations.append(f"{done.request_id} ended by {done.finish_reason} for {params}")
        answer = done.token_ids
        if done.finish_reason == "length" and len(answer) != params["max_tokens"]:
            self.violations.append(f"{done.request_id}: {len(answer)} tokens for {params}")
        if done.text != await self.engine.detokenize(answer):
            self.violations.append(f"{done.request_id}: {done.text!r} is not what {answer} say")
        n_same = n_alike(answer, question.answer)
        if n_same < len(answer):
            self.others.append((done.request_id, Question(question.prompt, answer)))
        pairs = zip(logprobs(done)[:n_same], question.logprobs, strict=False)
        rounding = max((abs(one - other) for one, other in pairs), default=0.0)
        self.rounding = max(self.rounding, rounding)
        if rounding > ROUNDING:
            self.violations.append(f"{done.request_id}: log probabilities {rounding} off")

    async def ties(self, undisturbed: Undisturbed) -> list[float]:
        """How far apart the tokens were between which rounding chose; whatever else chose is a
        violation."""
        margins = []
        for request_id, question in self.others:
            try:
                found = await undisturbed.margins(question)
            except ValueError as error:
                self.violations.append(f"{request_id}: {error}")
                continue
            if max(found) > TIE:
                self.violations.append(f"{request_id}: tokens chosen against margins of {found}")
            margins += found
        return margins

    async def all(self, n: int, clock: Clock) -> int:
        """How many have ended."""
        n_begun = n_ended = 0

        async def worker() -> None:
            nonlocal n_begun, n_ended
            while n_begun < n and not clock.is_over:
                n_begun += 1
                await self.one()
                n_ended += 1

        await asyncio.gather(*(worker() for _ in range(min(n, AT_ONCE))))
        return n_ended


async def keep_the_usual(engine: Engine) -> None:
    """Let all snapshots be of the same prompts each time, so that readings of memory compare: what
    is kept beside a snapshot, its tokens among that, is not reported."""
    for token_id in range(USUAL):
        await engine.generate([token_id] * (N_CTX - 2), max_tokens=1, ignore_eos=True)
    # One that is not saved: before it ends the engine knows of the last snapshot, and counts it.
    await engine.generate([0], max_tokens=1, ignore_eos=True, reuse_prefix=False)


async def cells_missing(engine: Engine) -> list[str]:
    """What is wrong if requests cannot fill the cache, but for each one's last token, which needs
    no cell: then others have left something in it, whatever the books say."""
    n_prompt = 3 * N_CTX // 4
    params: dict[str, Any] = {"ignore_eos": True, "speculation": 0, "reuse_prefix": False}
    try:
        async with asyncio.timeout(FILLING):
            await asyncio.gather(
                *(
                    engine.generate([i] * n_prompt, max_tokens=N_CTX - n_prompt, **params)
                    for i in range(N_CELLS // N_CTX)
                )
            )
    except (MtpBatchError, TimeoutError) as error:
        return [f"the cells do not suffice any more: {error!r}"]
    return []


class Ends:
    """A watcher that counts the ends of each request."""

    def __init__(self) -> None:
        self.by_request: Counter[str] = Counter()

    def take(self, n: int) -> list[str]:
        """What is wrong with the ends of the last ``n`` requests, which are forgotten."""
        n_ended, times = len(self.by_request), set(self.by_request.values())
        self.by_request.clear()
        if times <= {1} and n_ended == n:
            return []
        return [f"{n_ended} requests of {n} ended, {times} times each"]

    def ended(self, request: RequestEnded) -> None:
        self.by_request[request.request_id] += 1

    def admitted(self, request: RequestAdmitted) -> None: ...
    def paused(self, request_id: str) -> None: ...
    def stepped(self, report: object) -> None: ...


async def load(model: Path, wanted: int, seed: int, clock: Clock) -> Part:
    """Nothing is lost under load, and nothing stays."""
    begin = time.monotonic()
    memory = Memory()
    done = 0
    async with Undisturbed.open(model) as undisturbed:
        asked = await undisturbed.questions(min(QUESTIONS, wanted), random.Random(seed))
    async with Engine.open(
        model,
        n_seq=N_SEQ,
        n_ctx=N_CTX,
        n_cells=N_CELLS,
        kv_type="f32",
        max_waiting=None,
        snapshot_memory=SNAPSHOTS,
    ) as engine:
        run, ends = Load(engine, asked, seed), Ends()
        await run.all(WARM_UP, clock)
        await keep_the_usual(engine)
        memory.read(0, engine.stats().snapshot_bytes)
        for i in range(READINGS):
            with engine.watch(ends):
                n = await run.all(wanted * (i + 1) // READINGS - wanted * i // READINGS, clock)
            run.violations += ends.take(n)
            done += n
            await keep_the_usual(engine)
            memory.read(done, engine.stats().snapshot_bytes)
        stats = engine.stats()
        run.violations += await cells_missing(engine)
    async with Undisturbed.open(model) as undisturbed:
        ties = await run.ties(undisturbed)
    in_memory, violations = told(memory.growth(), BY_REQUESTS)
    violations += run.violations
    if stats.running or stats.waiting or stats.kv_cells_used:
        violations.append(f"left: {stats}")
    n_ended = run.ends.total()
    for reason, least in (("abort", LEAST_CANCELLED), ("timeout", LEAST_TIMED_OUT)):
        if n_ended >= ENOUGH and run.ends[reason] < least * n_ended:
            violations.append(f"only {run.ends[reason]} of {n_ended} ended by {reason}")
    figures: dict[str, float | int | str] = {
        **{f"ended by {reason}": n for reason, n in sorted(run.ends.items())},
        "preemptions": stats.preemptions,
        "tokens of prompts spared": stats.prefix_hits,
        "drafts accepted": stats.accepted,
        "log probabilities differ by": f"{run.rounding:.2g}, may be {ROUNDING:g}",
        "tokens chosen otherwise": len(ties),
        "of two that differ by": f"{max(ties, default=0.0):.2g}, may be {TIE:g}",
        **in_memory,
    }
    return Part("load", done, wanted, time.monotonic() - begin, figures, tuple(violations))


# ------------------------------------------------------------------------------ openings


async def openings(model: Path, wanted: int, seed: int, clock: Clock) -> Part:
    """Engines come and go, and leave nothing behind."""
    begin = time.monotonic()
    chance = random.Random(seed)
    memory = Memory()

    async def one() -> None:
        async with Engine.open(model, n_seq=4, n_ctx=N_CTX) as engine:
            generations = [engine.submit([chance.randrange(200)] * 9) for _ in range(4)]
            if chance.random() < 0.5:
                await generations[0]

    for _ in range(max(1, wanted // 10)):
        await one()
    memory.read(0)
    done = 0
    while done < wanted and not clock.is_over:
        await one()
        done += 1
        if done * READINGS // wanted > (done - 1) * READINGS // wanted:
            memory.read(done)
    figures, violations = told(memory.growth(), BY_OPENINGS)
    seconds = time.monotonic() - begin
    return Part("openings", done, wanted, seconds, {**figures}, tuple(violations))


# --------------------------------------------------------------------------- slow readers


async def read(generation: Generation, pause: float, taken: list[int]) -> list[float]:
    """When each piece came. Its tokens go to those ``taken``."""
    times = []
    async for delta in generation:
        taken += delta.token_ids
        times.append(time.monotonic())
        if pause:
            await asyncio.sleep(pause)
    return times


async def slow_readers(model: Path, wanted: int, seed: int, clock: Clock) -> Part:
    """Whoever reads slowly, or never, holds up nobody: both kinds of rounds, in turn.

    The same requests run in both. Where nobody is slow, half of them have no reader, and the event
    loop hears of their ends alone: so all that a slow reader costs counts. What is compared is how
    long the others' pieces take.
    """
    begin = time.monotonic()
    kinds = ("no reader", "slow readers")
    gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    violations: list[str] = []
    done = 0
    unread = {"slow": 100, "never": 100}  # tokens, the least of all rounds
    params: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True, "speculation": 2}
    async with Engine.open(model, n_seq=32, n_ctx=N_CTX) as engine:

        async def one_round(are_slow: bool) -> list[list[float]]:
            """When the others' pieces came, by the round's clock."""
            begin = time.monotonic()
            others = [engine.submit([20 + i] * 5, **params) for i in range(16)]
            these = [engine.submit([36 + i] * 5, followed=are_slow, **params) for i in range(16)]
            taken: dict[Generation, list[int]] = {one: [] for one in these}
            slow, never = these[:8], these[8:]
            async with asyncio.TaskGroup() as group:
                prompt = [group.create_task(read(generation, 0, [])) for generation in others]
                late = [group.create_task(read(one, PAUSE, taken[one])) for one in slow if are_slow]
                await asyncio.gather(*others, *these)
                for task in late:
                    task.cancel()
            if are_slow:
                for who, readers in (("slow", slow), ("never", never)):
                    for reader in readers:
                        left = [token async for delta in reader for token in delta.token_ids]
                        unread[who] = min(unread[who], len(left))
                        if (*taken[reader], *left) != (await reader).token_ids:
                            violations.append(f"{reader}, read {who}: not all of it was found")
            return [[at - begin for at in task.result()] for task in prompt]

        await one_round(True)
        chance = random.Random(seed)
        while done < wanted and not clock.is_over:
            for kind in chance.sample(kinds, len(kinds)):
                for times in await one_round(kind == "slow readers"):
                    gaps[kind] += between(times)
                    whole[kind].append(times[-1])
            done += 1
    figures, held_up = compared(gaps)
    violations += held_up
    figures |= of_whole_answers(whole)
    for who, n in unread.items():
        figures[f"tokens that wait for who reads: {who}"] = n
    if unread["never"] < 100 or not unread["slow"]:
        violations.append(f"of 100 tokens so few waited for their readers: {unread}")
    seconds = time.monotonic() - begin
    return Part("slow readers", done, wanted, seconds, figures, tuple(violations))


def between(times: Sequence[float]) -> list[float]:
    """How long each took after the one before it."""
    return [after - before for before, after in pairwise(times)]


def percentile_99(found: Sequence[float]) -> float:
    """What one in a hundred is more than."""
    return sorted(found)[int(0.99 * len(found))]


def of_whole_answers(seconds: Mapping[str, list[float]]) -> dict[str, str]:
    """How long they took, to be told and not judged: one in a hundred of answers that begin
    together is less than one round, and says how long the slowest took."""
    return {
        f"whole answers with {kind}, s": f"{statistics.median(found):.3f}, "
        f"p99 {percentile_99(found):.3f}"
        for kind, found in seconds.items()
        if found
    }


def compared(gaps: Mapping[str, list[float]]) -> tuple[dict[str, float | int | str], list[str]]:
    """The 99th percentile of seconds with each of these, by that with the one before it."""
    p99 = {kind: 1000 * percentile_99(found) for kind, found in gaps.items() if found}
    figures: dict[str, float | int | str] = {
        f"p99 with {kind}, ms": round(ms, 2) for kind, ms in p99.items()
    }
    violations = []
    for one, other in pairwise(p99):
        ratio = p99[other] / p99[one]
        figures[f"ratio of {other} to {one}"] = f"{ratio:.3f}, may be {SLOWER}"
        if ratio > SLOWER:
            violations.append(f"others' p99 with {other} is {ratio:.2f} of that with {one}")
    return figures, violations


# ---------------------------------------------------------------------- idle connections


class Stream:
    """One that is asked for over HTTP."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked_at: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.asked_at = asked_at

    @staticmethod
    def asked(seed: int, *, is_large: bool) -> dict[str, Any]:
        """One of 240 events, of 0.2 KB each, or 0.8 KB; all go on step by step."""
        params = {"prompt": [20 + seed] * 5, "max_tokens": 240, "ignore_eos": True}
        return params | {"speculation": 0} | ({"logprobs": 20} if is_large else {})

    @classmethod
    async def ask(cls, port: int, seed: int, *, is_large: bool) -> Stream:
        """Ask for one, on a connection of its own."""
        asked_at = time.monotonic()
        end = socket.socket()
        if is_large:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SYSTEM_KEEPS)
        end.setblocking(False)
        await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=end, limit=SYSTEM_KEEPS)
        request = {"model": "mtpbatch", "stream": True} | cls.asked(seed, is_large=is_large)
        body = msgspec.json.encode(request)
        head = "POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return cls(reader, writer, asked_at)

    async def __aiter__(self) -> AsyncIterator[None]:
        """Its events, as they come."""
        n, line = 0, b""
        async for line in self._reader:
            if line.startswith(b"data: "):
                n += 1
                yield
                if b"[DONE]" in line:
                    return
        raise ValueError(f"a stream broke off after {n} events: {line!r}")

    def leave(self) -> None:
        self._writer.close()


class Sending:
    """An app, and how many of its answers wait for their clients to read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.n_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            # uvicorn lets no other task go on in here unless it waits for the client.
            self.n_waiting += 1
            try:
                await send(message)
            finally:
                self.n_waiting -= 1

        await self._app(scope, receive, counted)


def allow_files(n: int) -> None:
    """Let this process have so many open."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < n:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (n, most))
        except ValueError:
            raise SystemExit(f"{n} files have to be open at once, of {most}: ulimit -Hn") from None


def is_over(reader: asyncio.StreamReader) -> bool:
    """Whether a connection was closed, or reset."""
    return reader.at_eof() or reader.exception() is not None


async def idle_connections(model: Path, wanted: int, seed: int, clock: Clock) -> Part:
    """Whoever does not read what it asked for, or says nothing, holds up nobody: three kinds of
    rounds, in turn.

    The same requests run in all. Without unread streams the large ones are the engine's alone, read
    at once and not sent. Beside idle connections the large streams are unread as well, so that
    these connections are all that differs. What is compared is how long the others' events take
    once the server waits for all clients that do not read: until then they are clients like others.
    """
    begin = time.monotonic()
    kinds = {
        "prompt readers": (0, 0),
        "unread streams": (UNREAD, 0),
        "idle connections": (UNREAD, IDLE),
    }
    gaps: dict[str, list[float]] = {kind: [] for kind in kinds}
    whole: dict[str, list[float]] = {kind: [] for kind in kinds}
    done = n_closed = 0
    n_waiting = UNREAD  # the least of all rounds
    allow_files(2 * IDLE + 500)  # both ends of a connection are in this process
    async with Engine.open(model, n_seq=24, n_ctx=N_CTX) as engine:
        app = Sending(create_app(engine))

        async def follow(stream: Stream, kind: str) -> None:
            nonlocal n_waiting
            n_unread, _ = kinds[kind]
            times = []
            async for _ in stream:
                times.append(time.monotonic())
                if n_unread and len(times) == STUCK:
                    n_waiting = min(n_waiting, app.n_waiting)
            gaps[kind] += between(times[STUCK - 1 :])
            whole[kind].append(times[-1] - stream.asked_at)

        async def one_round(port: int, kind: str) -> None:
            nonlocal n_closed
            n_unread, n_idle = kinds[kind]
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(n_idle)]
            unread = [await Stream.ask(port, i, is_large=True) for i in range(n_unread)]
            prompt = [
                asyncio.create_task(read(engine.submit(**Stream.asked(i, is_large=True)), 0, []))
                for i in range(n_unread, UNREAD)
            ]
            streams = [await Stream.ask(port, i, is_large=False) for i in range(UNREAD, 24)]
            try:
                await asyncio.gather(*(follow(stream, kind) for stream in streams))
                n_closed += sum(is_over(reader) for reader, _ in silent)
            finally:
                for task in prompt:
                    task.cancel()
                for stream in (*unread, *streams):
                    stream.leave()
                for _, writer in silent:
                    writer.close()
            await until(lambda: not engine.stats().running)  # of those that were not read

        async with serving(app, send_buffer=SYSTEM_KEEPS) as url:
            port = int(url.rpartition(":")[2])
            await one_round(port, "idle connections")
            for found in (gaps, whole):
                found["idle connections"].clear()  # as it was the first of all
            chance = random.Random(seed)
            while done < wanted and not clock.is_over:
                for kind in chance.sample([*kinds], len(kinds)):
                    await one_round(port, kind)
                done += 1
    figures, violations = compared(gaps)
    figures |= of_whole_answers(whole)
    figures["streams for which the server waits"] = n_waiting
    if n_closed:
        violations.append(f"{n_closed} idle connections were closed")
    if n_waiting < UNREAD:
        violations.append(f"the server waits for {n_waiting} of {UNREAD} clients that do not read")
    seconds = time.monotonic() - begin
    return Part("idle connections", done, wanted, seconds, figures, tuple(violations))


# -------------------------------------------------------------------------------- report


def markdown(parts: Sequence[Part], seed: int, share: float) -> str:
    """The report, to be read."""
    lines = [f"# Soak, seed {seed}, share {share:g}", ""]
    for part in parts:
        verdict = "passed" if part.passed else "FAILED"
        lines += [
            f"## {part.name}: {verdict}",
            "",
            f"{part.done} of {part.wanted} in {part.seconds:.0f} s, "
            f"{len(part.violations)} violations",
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in part.figures.items()),
            "",
            *(f"    {line}" for text in part.violations for line in text.splitlines()),
        ]
    return "\n".join(lines).rstrip() + "\n"


def soak(*, minutes: float, seed: int, share: float) -> list[Part]:
    """All parts, as far as there is time."""
    logging.getLogger("mtpbatch").setLevel(logging.CRITICAL)  # of faults there are plenty
    clock = Clock(minutes)

    def wanted(whole: int) -> int:
        return max(1, round(whole * share))

    with tempfile.TemporaryDirectory() as folder:
        demo = Path(str(importlib.resources.files("mtpbatch") / "models" / "demo.gguf"))
        f32 = Path(folder) / "demo-f32.gguf"
        gguf_file.to_f32(demo, f32)
        each: tuple[tuple[Callable[..., Awaitable[Part]], Path, int], ...] = (
            (load, f32, wanted(REQUESTS)),
            (openings, demo, wanted(OPENINGS)),
            (slow_readers, demo, wanted(ROUNDS)),
            (idle_connections, demo, wanted(ROUNDS)),
        )

        async def others() -> list[Part]:
            return [await part(model, n, seed, clock) for part, model, n in each]

        return [*asyncio.run(others()), machines(wanted(RULES), seed, clock)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="most time; default 60")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole run; default 1")
    parser.add_argument("--output", type=Path, default=Path("soak"), help="report, without suffix")
    options = parser.parse_args()
    parts = soak(minutes=options.minutes, seed=options.seed, share=options.share)
    report = markdown(parts, options.seed, options.share)
    options.output.with_suffix(".md").write_text(report)
    options.output.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(parts)))
    print(report)
    return 0 if all(part.passed for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
