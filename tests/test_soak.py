"""The parts of ``tools/soak.py``, each for some seconds; the tool itself goes on for an hour.

What requests leave in memory shows after thousands of them, and what slow readers do to others'
latency on a quiet machine: not here.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import loops
import soak
from mtpbatch import Engine, Generation
from mtpbatch.native import Context, Model, MtpSession
from patience import until


def clock() -> soak.Clock:
    """One that begins now, however long the tests before took."""
    return soak.Clock(minutes=5)


def test_rules_of_all_state_machines_are_counted_and_none_is_violated() -> None:
    part = soak.machines(600, seed=3, clock=clock())
    assert part.passed, part
    assert sum(v for v in part.figures.values() if isinstance(v, int)) == part.done >= 400
    assert part.figures.keys() == {"SchedulerMachine", "EngineMachine", "ServerMachine"}


def test_rules_alone_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what opens a machine, nor what is looked at before that."""
    n_rules = n_opened = 0

    class Opened(RuleBasedStateMachine):
        @initialize()
        def open(self) -> None:
            nonlocal n_opened
            n_opened += 1

        @rule()
        def go_on(self) -> None:
            nonlocal n_rules
            n_rules += 1

    monkeypatch.setattr(soak, "MACHINES", (Opened,))
    part = soak.machines(1000, seed=3, clock=clock())
    assert part.passed, part
    assert part.done == n_rules >= 1000
    assert n_opened >= 20


def test_a_machine_that_breaks_a_promise_is_reported_with_its_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(RuleBasedStateMachine):
        @rule(n=st.integers(0, 9))
        def lose(self, n: int) -> None:
            assert n < 9, "a request is lost"

    monkeypatch.setattr(soak, "MACHINES", (Broken,))
    part = soak.machines(1000, seed=3, clock=clock())
    assert not part.passed
    assert part.violations[0].startswith("Broken, seed 3: AssertionError('a request is lost")
    assert "lose(n=9)" in part.violations[0]


def test_a_sequence_that_begins_again_frees_its_buffers(demo_path: Path) -> None:
    """The rows that waited for the heads, which of a long prompt are megabytes on real models."""
    n, memory = 1500, soak.Memory()
    model = Model(demo_path)
    target = Context(model, n_seq=2, n_ctx=2048, n_rs_seq=3, kv_type="f32", n_threads=1)
    session = MtpSession(target, Context.mtp(target), 2, 3)
    for seq_id, prompt in ((0, [60] * n), (1, [60] * 5)):
        loops.feed(target, seq_id, prompt, session)
    before = memory.read(0)
    target.truncate(0, 0)
    loops.feed(target, 0, [60] * 5, session)
    assert before - memory.read(1) >= n * model.n_embd * 4


async def load(model: Path, n: int) -> soak.Part:
    return await soak.load(model, n, seed=3, clock=clock())


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few requests do not fill the caches, and say nothing about memory."""
    monkeypatch.setattr(soak, "WARM_UP", 1)
    monkeypatch.setattr(soak, "BY_REQUESTS", soak.Growth(1 << 30, 1 << 30, 1 << 30))


@pytest.mark.usefixtures("_short")
def test_nothing_is_lost_under_load(demo_f32_path: Path) -> None:
    part = anyio.run(load, demo_f32_path, 60)
    assert part.passed, part
    assert part.done == 60
    assert part.figures["ended by abort"]


@pytest.mark.usefixtures("_short")
def test_too_few_cancellations_and_time_outs_are_reported(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gives a request up. Of 60 both may be missing, of 300 not; one warms up."""
    monkeypatch.setattr(Generation, "cancel", lambda self: None)
    monkeypatch.setattr(soak, "MOST_TOKENS", 1)

    submit = Engine.submit
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, prompt, timeout=None, **params: submit(self, prompt, **params),
    )
    part = anyio.run(load, demo_f32_path, 300)
    assert part.violations == (
        "only 0 of 301 ended by abort",
        "only 0 of 301 ended by timeout",
    )


@pytest.mark.usefixtures("_short")
def test_a_wrong_answer_under_load_is_reported(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = soak.Load.check

    async def other(self: soak.Load, *args: Any, cancelled: bool) -> None:
        question, done, params = args
        wrong = tuple(token ^ 1 for token in done.token_ids)
        text = await self.engine.detokenize(wrong)
        wrongly = msgspec.structs.replace(done, token_ids=wrong, text=text)
        await check(self, question, wrongly, params, cancelled=cancelled)

    monkeypatch.setattr(soak.Load, "check", other)
    monkeypatch.setattr(soak, "MOST_TOKENS", 2)
    part = anyio.run(load, demo_f32_path, 20)
    assert not part.passed
    assert any("none of the best two" in words for words in part.violations)


@pytest.mark.usefixtures("_short")
def test_a_text_that_is_not_that_of_its_tokens_is_reported(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = soak.Load.check

    async def shorter(self: soak.Load, *args: Any, cancelled: bool) -> None:
        question, done, params = args
        cut = msgspec.structs.replace(done, text=done.text[:-1])
        await check(self, question, cut, params, cancelled=cancelled)

    monkeypatch.setattr(soak.Load, "check", shorter)
    monkeypatch.setattr(soak, "MOST_TOKENS", 2)
    part = anyio.run(load, demo_f32_path, 20)
    assert any("is not what" in words for words in part.violations)


@pytest.mark.usefixtures("_short")
def test_requests_that_end_though_nobody_gave_them_up_are_reported(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = Engine.submit

    def given_up(self: Engine, prompt: Any, **params: Any) -> Generation:
        generation = submit(self, prompt, **params)
        generation.cancel()
        return generation

    monkeypatch.setattr(Engine, "submit", given_up)
    part = anyio.run(load, demo_f32_path, 20)
    n_given_up = sum("ended by abort for" in words for words in part.violations)
    assert 0 < n_given_up < 20, "but for those that were to be cancelled"


def test_cells_that_nobody_gives_back_are_reported(demo_path: Path) -> None:
    """To find them missing requests need cells, not only books."""

    async def violations(n_missing: int) -> list[str]:
        async with Engine.open(
            demo_path, n_seq=4, n_ctx=soak.N_CTX, n_cells=soak.N_CELLS - n_missing
        ) as engine:
            engine._scheduler._cells._n_cells = soak.N_CELLS
            return await soak.cells_missing(engine)

    assert anyio.run(violations, 0) == []
    (violation,) = anyio.run(violations, soak.N_CTX)
    assert violation.startswith("the cells do not suffice any more: DecodeError")


def test_only_near_ties_are_left_to_rounding(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer takes the second best token once, and goes on as the model does after that."""

    async def ties() -> None:
        async with soak.Undisturbed.open(demo_f32_path) as truth:
            (question,) = await truth.questions(1, random.Random(3))
            ask = partial(truth.engine.generate, ignore_eos=True)
            done = await ask(question.prompt, max_tokens=20, logprobs=2)
            assert done.logprobs is not None
            (_, best), (second, logprob) = done.logprobs[7].top
            begin = (*done.token_ids[:7], second)
            rest = await ask([*question.prompt, *begin], max_tokens=12)
            right = (*begin, *rest.token_ids)
            wrong = (*right[:-1], right[-1] ^ 1)

            async def n_violations(answer: tuple[int, ...], tie: float) -> int:
                monkeypatch.setattr(soak, "TIE", tie)
                run = soak.Load(truth.engine, (), seed=3)
                run.others = [("request", soak.Question(question.prompt, answer))]
                margins = await run.ties(truth)
                assert margins == pytest.approx([best - logprob] if answer is right else [])
                return len(run.violations)

            assert await n_violations(right, tie=best - logprob + 1e-6) == 0
            assert await n_violations(right, tie=best - logprob - 1e-6) == 1
            assert await n_violations(wrong, tie=best - logprob + 1e-6) == 1

    anyio.run(ties)


@pytest.mark.parametrize(
    "leave",
    [lambda kept: kept.append(bytes(67)), lambda _: ctypes.CDLL(None).malloc(100)],
    ids=["Python", "C"],
)
def test_a_hundred_bytes_that_each_request_leaves_are_noticed(
    leave: Callable[[list[bytes]], object],
) -> None:
    def growth(leave: Callable[[list[bytes]], object]) -> list[str]:
        memory = soak.Memory()
        kept: list[bytes] = []
        for n in range(0, 10_001, 500):
            memory.read(n)
            for _ in range(500):
                leave(kept)
        _, violations = soak.told(memory.growth(), soak.BY_REQUESTS)
        return violations

    assert growth(lambda _: bytes(67)) == []
    (violation,) = growth(leave)
    assert "that stay" in violation


def test_engines_that_come_and_go_leave_nothing_behind(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of thousands of tests pages come and go by tens of MiB without anything kept."""
    but_for_pages = msgspec.structs.replace(soak.BY_OPENINGS, pages=1 << 30)
    monkeypatch.setattr(soak, "BY_OPENINGS", but_for_pages)

    async def openings() -> soak.Part:
        return await soak.openings(demo_path, 10, seed=3, clock=clock())

    part = anyio.run(openings)
    assert part.passed, part


async def slow_readers(model: Path) -> soak.Part:
    return await soak.slow_readers(model, 1, seed=3, clock=clock())


@pytest.fixture
def _busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long anybody is held up is not for a busy machine to say; slow is slow on each."""
    monkeypatch.setattr(soak, "SLOWER", 1e9)
    monkeypatch.setattr(soak, "PAUSE", 1000.0)


@pytest.mark.usefixtures("_busy")
def test_slow_readers_hold_up_nobody(demo_path: Path) -> None:
    """Whom nobody reads ends all the same, and all of it waits for who reads late."""
    part = anyio.run(slow_readers, demo_path)
    assert part.passed, part
    assert part.done == 1
    assert part.figures["tokens that wait for who reads: never"] == 100
    assert 0 < int(part.figures["tokens that wait for who reads: slow"]) < 100
    assert float(part.figures["p99 with slow readers, ms"]) > 0


@pytest.mark.usefixtures("_busy")
def test_an_engine_that_forgets_what_nobody_reads_is_reported(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Generation._receive

    def receive_and_forget(self: Generation, event: Any, *, followed: bool) -> None:
        receive(self, event, followed=followed)
        while len(self._deltas) > 2:
            self._deltas.popleft()

    monkeypatch.setattr(Generation, "_receive", receive_and_forget)
    *lost, violation = anyio.run(slow_readers, demo_path).violations
    assert len(lost) == 2 * 16, "of each round, the first one too"
    assert all("not all of it was found" in words for words in lost)
    assert violation.startswith("of 100 tokens so few waited for their readers")


def test_who_is_held_up_by_more_than_a_tenth_is_reported() -> None:
    """By each kind of round, beside the one before it."""
    usual = [0.010] * 980 + [0.020] * 20
    longer = [0.010] * 980 + [0.0215] * 20
    longest = [0.010] * 980 + [0.0240] * 20
    figures, violations = soak.compared({"nobody": usual, "some": longer, "many": longest})
    assert violations == ["others' p99 with many is 1.12 of that with some"]
    assert figures["p99 with nobody, ms"] == 20.0
    assert figures["ratio of some to nobody"] == "1.075, may be 1.1"


@pytest.mark.usefixtures("_busy")
def test_idle_connections_are_left_open_and_hold_up_nobody(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "IDLE", 50)

    async def idle_connections() -> soak.Part:
        return await soak.idle_connections(demo_path, 1, seed=3, clock=clock())

    part = anyio.run(idle_connections)
    assert part.passed, part
    for kind in ("prompt readers", "unread streams", "idle connections"):
        assert float(part.figures[f"p99 with {kind}, ms"]) > 0
    assert part.figures["streams for which the server waits"] == 8


def test_connections_that_were_closed_or_reset_are_told_from_open_ones() -> None:
    async def tell() -> list[bool]:
        writers: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1")
        async with server:
            port = server.sockets[0].getsockname()[1]
            clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await until(lambda: len(writers) == 3)
            writers[1].close()
            at_once = struct.pack("ii", 1, 0)  # without an end of the stream
            connection = writers[2].get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writers[2].transport.abort()
            await until(lambda: soak.is_over(clients[1][0]) and soak.is_over(clients[2][0]))
            assert not clients[2][0].at_eof()
            told = [soak.is_over(reader) for reader, _ in clients]
            for writer in (*writers, *(writer for _, writer in clients)):
                writer.close()
                with suppress(ConnectionResetError):
                    await writer.wait_closed()
        return told

    assert asyncio.run(tell()) == [False, True, True]


@pytest.mark.usefixtures("_busy")
def test_streams_that_the_server_gets_rid_of_unread_are_reported(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "IDLE", 1)
    monkeypatch.setattr(soak, "SYSTEM_KEEPS", 1 << 20)

    async def idle_connections() -> soak.Part:
        return await soak.idle_connections(demo_path, 1, seed=3, clock=clock())

    (violation,) = anyio.run(idle_connections).violations
    assert violation == "the server waits for 0 of 8 clients that do not read"


def test_the_report_says_what_was_left_undone() -> None:
    parts = [
        soak.Part("load", 9, 10, 1.0, {"preemptions": 3}),
        soak.Part("openings", 5, 5, 1.0, {}, ("it grew",)),
        soak.Part("slow readers", 5, 5, 1.0, {"ratio": 1.0}),
    ]
    report = soak.markdown(parts, seed=3, share=0.5)
    assert "## load: FAILED\n\n9 of 10 in 1 s, 0 violations" in report
    assert "| preemptions | 3 |" in report
    assert "## openings: FAILED" in report
    assert "    it grew" in report
    assert "## slow readers: passed" in report
