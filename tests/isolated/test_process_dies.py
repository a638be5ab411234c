"""The model's process dies, in every place, and the app lives on. On all three event loops.

Nothing here sleeps: the process is stopped where it is to die, so that it is known to be there.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest

import mtpbatch
import random_adapter
from mtpbatch import (
    Engine,
    EngineDeadError,
    EngineStalledError,
    Generation,
    GrammarError,
    InvalidParameterError,
    ModelLoadError,
    NativeDiedError,
    WrongProcessError,
)
from mtpbatch import restarts as policy
from mtpbatch.isolated import ProcessBackend
from mtpbatch.isolated import backend as isolated_backend
from mtpbatch.isolated import process as isolated_process
from mtpbatch.isolated.channel import Channel
from mtpbatch.isolated.messages import Compile, Embed, Exchange, Progress, Tokenize
from mtpbatch.isolated.process import ModelProcess
from mtpbatch.types import GrammarSource
from patience import until

pytestmark = pytest.mark.anyio

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
SIZES: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "kv_type": "f32", "isolation": "process"}


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FIRST", 0.01)


def children() -> set[int]:
    """Processes that this one has and has not taken leave of, zombies included."""
    pids: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended since
            pids.update(map(int, path.read_text().split()))
    return pids


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before, n_files = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before, "no process is left"
    # Event loops come and go with fixtures; each process has more sockets than that.
    assert len(os.listdir("/proc/self/fd")) < n_files + 5, "no socket is left"


@pytest.fixture
async def engine(demo_f32_path: Path) -> AsyncIterator[Engine]:
    async with Engine.open(demo_f32_path, n_seq=8, **SIZES) as engine:
        yield engine


def process_of(engine: Engine) -> ModelProcess:
    assert isinstance(engine._backend, ProcessBackend)
    process = engine._backend._process
    assert process is not None
    return process


async def stopped(engine: Engine) -> ModelProcess:
    """Have the process go no further. Who has begun is in it until it dies."""
    process = process_of(engine)
    os.kill(process.pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{process.pid}/task").iterdir())
    await until(lambda: all(state_of(thread) == "T" for thread in threads))
    return process


def state_of(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


async def check_died(generation: Generation, number: int = signal.SIGKILL) -> None:
    with pytest.raises(NativeDiedError, match=signal.Signals(number).name) as caught:
        await generation
    assert caught.value.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
async def test_eight_streams_end_and_those_who_waited_are_answered(
    engine: Engine, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtpbatch")
    undisturbed = await engine.generate("In the", **LONG)
    streams = [engine.submit("In the", **LONG) for _ in range(8)]
    for stream in streams:
        await anext(stream)
    waiting = [engine.submit("In the", **LONG) for _ in range(4)]
    first = process_of(engine)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        os.kill(first.pid, number)
        for stream in streams:
            await check_died(stream, number)
            completion = stream.completion
            assert completion is not None
            n_tokens = len(completion.token_ids)
            assert 0 < n_tokens < 400
            assert completion.token_ids == undisturbed.token_ids[:n_tokens]
        n_beats = beats
        for generation in waiting:
            assert (await generation).token_ids == undisturbed.token_ids
        assert beats > n_beats, "the loop goes on meanwhile"
        group.cancel_scope.cancel()
    assert process_of(engine).pid != first.pid
    engine.check_health()
    engine._scheduler.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.restarts) == (0, 0, 1)
    assert (stats.finished["error"], stats.finished["length"]) == (8, 5)
    words = [record.getMessage().split()[0] for record in caplog.records]
    assert words == ["engine.native_died", "engine.restarted"]


@pytest.mark.skipif(sys.platform != "linux", reason="the way to preload is that of Linux")
async def test_an_abort_inside_ggml_ends_who_ran_and_who_waited_is_answered(
    demo_f32_path: Path,
    faults_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the first decode of an answer. The process ends at once: ggml has a debugger, where there
    is one, look at what aborts, and waits for it."""
    asked, debugged = tmp_path / "abort", tmp_path / "debugged"
    for debugger in ("gdb", "lldb"):
        path = tmp_path / debugger
        path.write_text(f"#!/bin/sh\ntouch {debugged}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LD_PRELOAD", faults_path)  # for processes that start from now on
    monkeypatch.setenv("FAULTS_ABORT", str(asked))
    async with Engine.open(demo_f32_path, n_seq=1, **SIZES) as engine:
        undisturbed = await engine.generate([70, 71], **LONG)
        first = process_of(engine)
        asked.touch()
        running, waiting = (engine.submit([70, 71], **LONG) for _ in range(2))
        await check_died(running, signal.SIGABRT)
        assert (await waiting).token_ids == undisturbed.token_ids
        assert process_of(engine).pid != first.pid
        engine.check_health()
        assert engine.stats().restarts == 1
    stderr = capfd.readouterr().err
    assert "faults.cpp" in stderr
    assert "Fatal Python error: Aborted" in stderr
    assert not debugged.exists()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_process_that_is_stuck_for_too_long_is_killed(demo_f32_path: Path) -> None:
    sizes: dict[str, Any] = {"n_seq": 1, "step_timeout": 3.0}
    async with Engine.open(demo_f32_path, **sizes, **SIZES) as engine:
        undisturbed = await engine.generate("In the", **LONG)
        running = engine.submit("In the", **LONG)
        await anext(running)
        waiting = engine.submit("In the", **LONG)
        await stopped(engine)
        with pytest.raises(NativeDiedError, match="SIGKILL: silent for more than step_timeout=3"):
            await running
        assert (await waiting).token_ids == undisturbed.token_ids
        assert engine.stats().restarts == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_process_that_is_stuck_while_it_has_nothing_to_do_is_noticed(
    demo_f32_path: Path,
) -> None:
    """Texts are read there, so that a request does not get as far as to wait for a step."""
    sizes: dict[str, Any] = {"n_seq": 1, "step_timeout": 3.0}
    async with Engine.open(demo_f32_path, **sizes, **SIZES) as engine:
        expected = await engine.generate("In the", max_tokens=20)
        await stopped(engine)
        generation = engine.submit("In the", max_tokens=20)

        def stalls() -> bool:
            try:
                engine.check_health(stall_timeout=1.0)
            except (EngineStalledError, NativeDiedError):  # killed before anybody looked
                return True
            return False

        await until(stalls)
        assert (await generation).token_ids == expected.token_ids
        assert engine.stats().restarts == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nobody_waits_for_a_process_that_cannot_even_be_killed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a driver holds it."""
    monkeypatch.setattr("mtpbatch.isolated.process.CLOSING_TIME", 0.1)
    expected = await engine.generate("In the", max_tokens=20)
    running = engine.submit("In the", **LONG)
    await anext(running)
    process = await stopped(engine)
    kill = process.kill
    monkeypatch.setattr(process, "kill", lambda: None)
    process.steps.cut()
    await check_died(running)
    assert (await engine.generate("In the", max_tokens=20)).token_ids == expected.token_ids
    kill()
    await until(process._over.is_set)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_crash_tells_its_stack(
    demo_f32_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with Engine.open(demo_f32_path, n_seq=1, **SIZES) as engine:
        os.kill(process_of(engine).pid, signal.SIGSEGV)
        await until(lambda: engine.stats().restarts == 1)
    assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err


async def test_prompts_with_a_known_beginning_are_computed_anew(engine: Engine) -> None:
    """Snapshots died with the process."""
    first = await engine.generate("And it came to pass in those days, " * 8, max_tokens=30)
    turn = [*first.prompt_token_ids, *first.token_ids, *first.token_ids[:3]]
    again = await engine.generate(turn, max_tokens=20, ignore_eos=True)
    assert again.usage.cached_tokens > 0
    process_of(engine).kill()
    await until(lambda: engine.stats().restarts == 1)
    after = await engine.generate(turn, max_tokens=20, ignore_eos=True)
    assert after.usage.cached_tokens == 0
    assert after.token_ids == again.token_ids


async def test_a_text_that_is_being_tokenised_is_tokenised_by_the_next_process(
    engine: Engine,
) -> None:
    expected = await engine.generate("In the", max_tokens=20)
    process = await stopped(engine)
    generation = engine.submit("In the", max_tokens=20)
    await until(lambda: any(channel.busy for channel in process.texts))
    process.kill()
    assert (await generation).token_ids == expected.token_ids
    process = await stopped(engine)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.tokenize, "In the")
        await until(lambda: any(channel.busy for channel in process.texts))
        process.kill()


async def test_a_text_over_which_two_processes_die_ends_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Channel.send

    def send_to_the_dead(self: Any, message: object) -> None:
        if isinstance(message, Tokenize) and message.text == "the worst":
            process_of(engine).kill()
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_to_the_dead)
    await check_died(engine.submit("the worst", max_tokens=3))
    assert len((await engine.generate("In the", max_tokens=3)).token_ids) == 3
    assert engine.stats().restarts == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_short_text_waits_for_no_long_one(engine: Engine) -> None:
    process = await stopped(engine)
    long, short = "In the beginning " * 1000, "In the"
    async with anyio.create_task_group() as group:
        for text in (long, long, short):
            group.start_soon(engine.tokenize, text)
        await until(lambda: sum(channel.busy for channel in process.texts) == 2)
        os.kill(process.pid, signal.SIGCONT)


async def test_whose_grammar_is_being_compiled_ends(engine: Engine) -> None:
    process = await stopped(engine)
    generation = engine.submit([70, 71], regex="[a-z]{3}")
    await until(lambda: process.grammars.busy)
    process.kill()
    await check_died(generation)
    assert generation.completion is None
    assert len((await engine.generate([70, 71], regex="[a-z]{3}")).text) == 3


async def test_who_waits_with_a_grammar_keeps_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: set[int] = set()
    send = Channel.send

    def send_and_look(self: Any, message: object) -> None:
        if isinstance(message, Exchange):
            forgotten.update(message.forgotten)
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_and_look)
    for _ in range(8):
        await anext(engine.submit("In the", **LONG))
    waiting = [
        engine.submit("In the", regex=f"[a-z]{{{n}}}", max_tokens=100, temperature=1.0)
        for n in range(3, 9)
    ]
    await until(lambda: engine._intake.n_ready == 14)
    process_of(engine).kill()
    for n, generation in enumerate(waiting, 3):
        done = await generation
        assert len(done.text) == n
        assert done.text.isalpha()
    del generation, done, waiting
    await engine.generate("x", max_tokens=2)  # the last plan is the last that knew them
    assert isinstance(engine._backend, ProcessBackend)
    assert not engine._backend._grammars, "nobody needs them any more"
    await engine.generate("x", max_tokens=2)
    assert set(range(1, 7)) <= forgotten, "the process is told"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_time_goes_on_while_grammars_are_compiled_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(8):
        await anext(engine.submit("In the", **LONG))
    waiting = engine.submit("In the", regex="[a-z]{5}", max_tokens=20)
    await until(lambda: engine._intake.n_ready == 9)
    send = Channel.send
    stuck: list[int] = []

    def send_to_who_is_stuck(self: Any, message: object) -> None:
        if isinstance(message, Compile):
            stuck.extend(children())
            os.kill(stuck[0], signal.SIGSTOP)
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_to_who_is_stuck)
    process_of(engine).kill()
    await until(lambda: bool(stuck))
    assert (await engine.generate([70], timeout=0.01)).finish_reason == "timeout"
    os.kill(stuck[0], signal.SIGCONT)
    assert len((await waiting).text) == 5


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Regexes that are refused when they are compiled, as one may be that takes nearly too much."""
    regexes: set[str] = set()
    send = Channel.send

    def send_what_is_refused(self: Any, message: object) -> None:
        if isinstance(message, Compile) and message.source.text in regexes:
            message = Compile(message.number, GrammarSource("regex", "(?=a)b"))
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_what_is_refused)
    return regexes


async def test_whose_grammar_is_refused_when_it_is_compiled_again_ends_alone(
    engine: Engine, refused: set[str]
) -> None:
    streams = [engine.submit("In the", **LONG) for _ in range(8)]
    for stream in streams:
        await anext(stream)
    alone = engine.submit("In the", regex="[a-z]{5}", max_tokens=1)
    other = engine.submit("In the", max_tokens=3)
    kept = engine.submit("In the", regex="[a-z]{6}", max_tokens=20)
    await until(lambda: engine._intake.n_ready == 11)
    refused.add("[a-z]{5}")
    process_of(engine).kill()
    for stream in streams:
        await check_died(stream)
    words = r"its grammar: compiled again after a restart, it was refused: regex: .*look-around"
    with pytest.raises(GrammarError, match=f"(?s){words}"):
        await alone
    assert alone.completion is not None
    assert alone.completion.token_ids == ()
    assert len((await other).token_ids) == 3
    assert len((await kept).text) == 6
    assert engine.stats().restarts == 1
    engine._scheduler.check_integrity()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_grammar_that_one_process_refused_is_good_again_with_the_next(
    engine: Engine, refused: set[str]
) -> None:
    streams = [engine.submit("In the", **LONG) for _ in range(16)]
    await anext(streams[7])
    await until(lambda: engine._intake.n_ready == 16)
    last = engine.submit("In the", regex="[a-z]{5}", max_tokens=20)
    await until(lambda: engine._intake.n_ready == 17)
    refused.add("[a-z]{5}")
    process_of(engine).kill()
    await anext(streams[15])
    refused.clear()
    process_of(engine).kill()
    assert len((await last).text) == 5
    assert engine.stats().restarts == 2


async def test_texts_that_are_being_embedded_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (await engine.embed(["In the beginning"])).vectors
    process, send = process_of(engine), Channel.send

    def send_to_the_dead(self: Any, message: object) -> None:
        if isinstance(message, Embed):
            process.kill()
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_to_the_dead)
    with pytest.raises(NativeDiedError, match="SIGKILL"):
        await engine.embed(["In the beginning"] * 9)
    assert ((await engine.embed(["In the beginning"])).vectors == expected).all()


async def test_texts_of_which_none_is_being_embedded_are_embedded_by_the_next_process(
    engine: Engine,
) -> None:
    expected = (await engine.embed(["In the beginning"])).vectors
    process_of(engine).kill()
    await until(lambda: engine.stats().restarts == 1)
    assert ((await engine.embed(["In the beginning"])).vectors == expected).all()
    process = await stopped(engine)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.embed, ["In the beginning"] * 9)
        await until(lambda: any(channel.busy for channel in (process.embeddings, *process.texts)))
        process.kill()


async def test_a_process_that_dies_while_it_loads(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is not opened, and says of what it died: a hostile file can do no more."""
    send = Channel.send

    def send_and_stop(self: Any, message: object) -> None:
        [pid] = children()
        os.kill(pid, signal.SIGABRT)
        send(self, message)

    monkeypatch.setattr(Channel, "send", send_and_stop)
    words = rf"{demo_f32_path}: .*process that runs the model died \(signal 6, SIGABRT\)"
    with pytest.raises(ModelLoadError, match=words):
        async with Engine.open(demo_f32_path, **SIZES):
            pass


async def test_a_process_that_cannot_be_started(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program, words in (("/nowhere/python", "no process could be"), ("false", "exit status 1")):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(ModelLoadError, match=words):
            async with Engine.open(demo_f32_path, **SIZES):
                pass


@pytest.mark.parametrize(("name", "value"), [("executable", None), ("frozen", True)])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_app_that_is_its_own_interpreter_is_not_started_again(
    demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    """What is ``sys.executable`` there would be a second app, which opens an engine, and so on."""
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(InvalidParameterError, match='isolation: cannot be "process"'):
        async with Engine.open(demo_f32_path, **SIZES):
            pass


@pytest.mark.parametrize("scarce", ["threads", "files"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_engine_tries_again_where_there_is_too_little_to_start_a_process_with(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, scarce: str
) -> None:
    """And nothing is left of the one that could not be: see the fixture above."""
    n_left = 4

    def takes_one() -> None:
        nonlocal n_left
        n_left -= 1
        if n_left % 2 == 0 and n_left >= 0:  # the second one of each try
            raise OSError("too many") if scarce == "files" else RuntimeError("too many")

    start, pair = threading.Thread.start, socket.socketpair

    def start_thread(thread: threading.Thread) -> None:
        if thread.name.startswith("mtpbatch-process"):
            takes_one()
        start(thread)

    def make_pair() -> tuple[socket.socket, socket.socket]:
        takes_one()
        return pair()

    if scarce == "files":
        monkeypatch.setattr(socket, "socketpair", make_pair)
    else:
        monkeypatch.setattr(threading.Thread, "start", start_thread)
    process_of(engine).kill()
    assert (await engine.generate("In the", max_tokens=3)).finish_reason == "length"
    assert n_left < 0, "twice it could not"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_daemon_or_a_notebook_does_to_its_interpreter(demo_f32_path: Path) -> None:
    """No stderr, whose number may be another file's by then; a search path that is no text."""
    program = f"""
import anyio, os, pathlib, sys
import mtpbatch

sys.path.insert(0, pathlib.Path("/nowhere"))
os.close(2)

async def main():
    async with mtpbatch.Engine.open({os.fspath(demo_f32_path)!r}, **{SIZES!r}) as engine:
        done = await engine.generate("In the", max_tokens=3)
        assert done.finish_reason == "length"

anyio.run(main)
print("all is well")
"""
    done = await anyio.run_process([sys.executable, "-c", program])
    assert done.stdout == b"all is well\n"


async def test_loading_is_given_up_when_nobody_waits_for_it(demo_f32_path: Path) -> None:
    shares: list[float] = []
    with anyio.CancelScope() as scope:

        def progress(share: float) -> None:
            shares.append(share)
            scope.cancel()

        async with Engine.open(demo_f32_path, progress=progress, **SIZES):
            pytest.fail("it was cancelled")
    assert shares


async def test_what_the_progress_of_loading_raises_is_raised(demo_f32_path: Path) -> None:
    def progress(share: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with Engine.open(demo_f32_path, progress=progress, **SIZES):
            pass


async def test_deaths_in_a_row_end_the_engine_for_good(engine: Engine) -> None:
    for index in range(policy.MOST + 1):
        generation = engine.submit("In the", **LONG)
        await anext(generation)
        process_of(engine).kill()
        if index < policy.MOST:
            await check_died(generation)
            await engine.tokenize("x")  # which waits until another one runs
    with pytest.raises(EngineDeadError, match="SIGKILL") as caught:
        await generation
    assert isinstance(caught.value.__cause__, NativeDiedError)
    for wait in (engine.generate("x"), engine.tokenize("x"), engine.embed(["x"])):
        with pytest.raises(EngineDeadError):
            await wait


@pytest.mark.parametrize("left", ["nothing", "another model"])
async def test_a_model_that_is_not_there_any_more_ends_the_engine(
    demo_f32_path: Path, dense_path: Path, tmp_path: Path, left: str
) -> None:
    path = tmp_path / "model.gguf"
    path.symlink_to(demo_f32_path)
    words = "no such file" if left == "nothing" else "is not the model any more"
    async with Engine.open(path, n_seq=1, **SIZES) as engine:
        running, waiting = engine.submit("In the", **LONG), engine.submit("In the", **LONG)
        await anext(running)
        path.unlink()
        if left == "another model":
            path.symlink_to(dense_path)
        # A text on its way meanwhile must not wait for ever either.
        process = await stopped(engine)
        async with anyio.create_task_group() as group:

            async def tokenize() -> None:
                with pytest.raises(EngineDeadError):
                    await engine.tokenize("x")

            group.start_soon(tokenize)
            await until(lambda: any(channel.busy for channel in process.texts))
            process.kill()
        await check_died(running)
        with pytest.raises(EngineDeadError, match=words):
            await waiting


async def test_requests_end_though_the_process_is_stuck(engine: Engine) -> None:
    """As beside a decode that hangs; what it was asked is answered when it goes on, and right."""
    undisturbed = await engine.generate("In the", **LONG)
    running, cancelled = engine.submit("In the", **LONG), engine.submit("In the", **LONG)
    await anext(running)
    await anext(cancelled)
    process = await stopped(engine)
    assert (await engine.generate([70], timeout=0.01)).finish_reason == "timeout"
    cancelled.cancel()
    assert (await cancelled).finish_reason == "abort"
    late = engine.submit([70, 71], max_tokens=3)
    await until(lambda: engine._intake.n_ready == 2)
    engine.check_health()
    os.kill(process.pid, signal.SIGCONT)
    assert (await running).token_ids == undisturbed.token_ids
    assert len((await late).token_ids) == 3
    assert (await engine.generate("In the", **LONG)).token_ids == undisturbed.token_ids
    assert process_of(engine) is process
    engine._scheduler.check_integrity()


async def test_draining_waits_for_no_process_that_is_stuck(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_process, "CLOSING_TIME", 0.1)
    running = engine.submit("In the", **LONG)
    await anext(running)
    await stopped(engine)
    await engine.drain(0.01)
    assert (await running).finish_reason == "abort"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there are no CPUs to lose")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_app_that_has_fewer_cpus_by_then_has_the_same_model(demo_f32_path: Path) -> None:
    async with Engine.open(demo_f32_path, n_seq=1, **{**SIZES, "n_threads": None}) as engine:
        n_threads = engine.config.n_threads
        [one, *_] = os.sched_getaffinity(0)
        # Of the thread that starts the process.
        os.sched_setaffinity(engine._thread.native_id or 0, {one})
        process_of(engine).kill()
        assert len((await engine.generate("In the", max_tokens=3)).token_ids) == 3
        assert engine.config.n_threads == n_threads


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_process_that_answers_garbage_is_killed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(engine)
    watch = os.pidfd_open(process.pid)
    with monkeypatch.context() as patch:
        patch.setattr(isolated_backend, "Results", int)  # what it sends is none of these
        with pytest.raises(NativeDiedError):
            await engine.generate("In the", max_tokens=3)
        await anyio.wait_readable(watch)
    os.close(watch)
    assert len((await engine.generate("In the", max_tokens=3)).token_ids) == 3


@pytest.fixture(params=["asked", "answered"])
def garbled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> set[Channel]:
    """On one of these channels the next message is not what the other end expects."""
    channels: set[Channel] = set()
    send, receive = Channel.send, Channel.receive

    def send_garbage(self: Any, message: object) -> None:
        garbage = self in channels
        if garbage:
            channels.clear()
        send(self, Progress(0.5) if garbage else message)

    def receive_garbage(self: Any, kind: Any) -> Any:
        garbage = self in channels
        if garbage:
            channels.clear()
        return receive(self, Progress if garbage else kind)

    if request.param == "asked":
        monkeypatch.setattr(Channel, "send", send_garbage)
    else:
        monkeypatch.setattr(Channel, "receive", receive_garbage)
    return channels


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_garbage_about_a_text_ends_the_process_and_the_next_one_reads_it(
    engine: Engine, garbled: set[Channel]
) -> None:
    expected = await engine.tokenize("In the")
    garbled.update(process_of(engine).texts)
    assert await engine.tokenize("In the") == expected
    assert not garbled
    assert engine.stats().restarts == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_garbage_about_a_grammar_ends_the_process_and_the_request(
    engine: Engine, garbled: set[Channel]
) -> None:
    garbled.add(process_of(engine).grammars)
    await check_died(engine.submit([70, 71], regex="[a-z]{3}"))
    assert not garbled
    assert len((await engine.generate([70, 71], regex="[a-z]{3}")).text) == 3
    assert engine.stats().restarts == 1


@pytest.mark.parametrize("thread", ["steps", "texts", "grammars", "embeddings"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_thread_of_the_process_that_fails_ends_the_process(
    engine: Engine, thread: str
) -> None:
    process = process_of(engine)
    size = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.prlimit(process.pid, resource.RLIMIT_AS)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size + (128 << 20), most))
    channel = process.texts[0] if thread == "texts" else getattr(process, thread)
    channel._socket.sendall(b"\0" + (1 << 30).to_bytes(8, "little"))  # a message of a gigabyte
    await until(lambda: engine.stats().restarts == 1)
    assert process._process.returncode == 1, "it had no memory for it"
    assert len((await engine.generate("In the", max_tokens=3)).token_ids) == 3


async def test_closing_waits_for_nobody_who_hangs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_process, "CLOSING_TIME", 0.1)
    running = engine.submit("In the", **LONG)
    await anext(running)
    process = await stopped(engine)
    texts = engine.submit("def main(")
    await until(lambda: any(channel.busy for channel in process.texts))
    await engine.aclose()
    assert engine._ended.is_set(), "nothing is left behind"
    for generation in (running, texts):
        assert (await generation).finish_reason == "abort"


async def test_closing_while_there_is_no_process(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "FIRST", 1000.0)
    running = engine.submit("In the", **LONG)
    await anext(running)
    process_of(engine).kill()
    await check_died(running)
    waiting = engine.submit("In the", **LONG)
    with pytest.raises(NativeDiedError):
        engine.check_health()
    await engine.aclose()
    assert (await waiting).finish_reason == "abort"


async def test_what_the_terminal_and_supervisors_send_is_for_the_app(engine: Engine) -> None:
    running = engine.submit("In the", **LONG)
    await anext(running)
    process = process_of(engine)
    assert os.getpgid(process.pid) == process.pid, "Ctrl-C goes to another group"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert len((await running).token_ids) == 400
    assert process_of(engine) is process


async def test_a_fork_of_the_app_neither_uses_the_process_nor_keeps_it(engine: Engine) -> None:
    """Its copies of the sockets are open for as long as it lives: a death shows all the same."""
    running = engine.submit("In the", **LONG)
    await anext(running)
    at, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        try:
            running.cancel()
        except WrongProcessError:
            engine._backend.cancel(1)  # as a garbage collection might
            engine._backend.wake()
            os.read(at, 1)
            os._exit(0)
        os._exit(1)
    os.close(at)
    assert len((await running).token_ids) == 400
    process_of(engine).kill()
    expected = await engine.generate("In the", **LONG)
    assert expected.token_ids == (await running).token_ids
    os.close(end)
    _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
    assert status == 0


def cpu_ticks(process: ModelProcess) -> int:
    """What it has taken of the CPUs so far, which does not depend on what else runs."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_cancelled_request_costs_no_more_steps_though_the_app_keeps_the_gil(
    dense_path: Path,
) -> None:
    n_tokens, ticks = [], []
    sizes: dict[str, Any] = {"n_seq": 1, "n_ctx": 4096, "n_threads": 1}
    async with Engine.open(dense_path, isolation="process", **sizes) as engine:
        for cancelled_before in (False, True):
            async with engine.stream("In the", max_tokens=4000, ignore_eos=True) as deltas:
                await anext(deltas)
                if cancelled_before:
                    deltas.cancel()
                before = cpu_ticks(process_of(engine))
                sum(range(30_000_000))  # about half a second
                ticks.append(cpu_ticks(process_of(engine)) - before)
                deltas.cancel()
                n_tokens.append(len((await deltas).token_ids))
    assert n_tokens[0] > 50, "steps need no Python of the app's"
    assert ticks[1] < ticks[0] / 2


async def test_numbers_that_no_message_can_hold(demo_f32_path: Path) -> None:
    huge = 10**30
    limits: dict[str, Any] = {
        "max_waiting": huge,
        "max_waiting_tokens": huge,
        "snapshot_memory": huge,
    }
    async with Engine.open(demo_f32_path, n_seq=1, **SIZES, **limits) as engine:
        assert {name: getattr(engine.config, name) for name in limits} == limits
        done = await engine.generate(
            "In the", max_tokens=huge, min_tokens=huge, top_k=huge, temperature=1.0, seed=1
        )
        assert done.finish_reason == "length"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_names_of_files_need_not_be_texts(demo_f32_path: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.symlink_to(demo_f32_path)
    async with Engine.open(path, n_seq=1, **SIZES) as engine:
        assert len((await engine.generate("In the", max_tokens=3)).token_ids) == 3
        assert "udcff.gguf" in repr(engine)
    missing = str(tmp_path / os.fsdecode(b"\xfe.gguf"))
    wrong: list[dict[str, Any]] = [
        {"model": missing},
        {"lora": {missing: 1.0}},
        {"draft_model": missing},
    ]
    for config in wrong:
        with pytest.raises(ModelLoadError, match=r"udcfe.gguf: no such file"):
            async with Engine.open(**{"model": demo_f32_path, **config}, **SIZES):
                pass


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_grammar_that_is_no_text_is_refused(engine: Engine) -> None:
    for form in ("regex", "grammar", "json_schema"):
        params: Any = {form: "\ud800"}
        with pytest.raises(InvalidParameterError, match=f"{form}: is not valid Unicode"):
            await engine.generate("In the", **params)


@pytest.mark.parametrize(
    "ending",
    [
        "os._exit(0)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        pytest.param(
            "os.fork() or os.read(0, 1); os._exit(0)",  # its sockets stay open in another process
            marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell it so"),
        ),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_process_ends_with_the_app(demo_f32_path: Path, ending: str) -> None:
    program = f"""
import anyio, os, signal, sys
import mtpbatch

async def main():
    async with mtpbatch.Engine.open(sys.argv[1], isolation="process", n_threads=1) as engine:
        stream = engine.submit("In the", max_tokens=4000, ignore_eos=True)
        await anext(stream)
        print(engine._backend._process.pid, flush=True)
        sys.stdin.read(1)
        {ending}

anyio.run(main)
"""
    command = [sys.executable, "-c", program, str(demo_f32_path)]
    async with await anyio.open_process(command) as app:
        assert app.stdout is not None
        assert app.stdin is not None
        pid = int(await app.stdout.receive())
        watch = os.pidfd_open(pid)
        try:
            await app.stdin.send(b"x")
            await anyio.wait_readable(watch)
        finally:
            os.close(watch)
        await app.wait()


def comparable(done: mtpbatch.Completion) -> tuple[object, ...]:
    """What does not depend on how long steps took: drafts and snapshots do."""
    return done.text, done.token_ids, done.prompt_token_ids, done.finish_reason, done.metadata


def logprobs_of(done: mtpbatch.Completion) -> list[float]:
    """All of them; in batches of other shapes they differ by millionths."""
    told = [*(done.logprobs or ()), *(done.prompt_logprobs or ())]
    return [logprob for one in told for logprob in (one.logprob, *(p for _, p in one.top))]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_that_can_be_asked_is_answered_as_in_process(
    demo_f32_path: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter.gguf"
    random_adapter.write_random_adapter(
        adapter, demo_f32_path, adapted=r"blk\.[0-3]\..*ffn.*", size=0.1, seed=1
    )
    prompt = "And it came to pass in those days, " * 8
    asked: list[dict[str, Any]] = [
        {"speculation": 0},
        {"speculation": 3},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 5},
        {"logprobs": 3, "prompt_logprobs": 2, "speculation": 3},
        {"stop": ["the", "ü"], "min_tokens": 5},
        {"stop_token_ids": [10, 11, 12], "logit_bias": {10: 5.0}},
        {"bad_words": ["the", "and"], "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"dry_multiplier": 0.8, "dry_sequence_breakers": ["\n"], "speculation": 2},
        {"json_schema": dict[str, int], "temperature": 1.0, "seed": 3, "max_tokens": 60},
        {"regex": "[a-z]{5}", "metadata": {"a": 1, "b": None, "c": "x", "d": 0.5}},
        {"choice": ["yes", "no"]},
        {
            "typical_p": 0.9,
            "xtc_probability": 0.5,
            "xtc_threshold": 0.1,
            "temperature": 1,
            "seed": 9,
        },
    ]
    found = []
    for isolation in ("none", "process"):
        async with Engine.open(
            demo_f32_path, n_seq=2, lora={str(adapter): 0.5}, **{**SIZES, "isolation": isolation}
        ) as engine:
            done = [
                await engine.generate(prompt, **({"max_tokens": 30} | params)) for params in asked
            ]
            texts = [await engine.tokenize(prompt), await engine.detokenize([80, 90, 1000])]
            chat = await engine.chat([{"role": "user", "content": "Hello"}], max_tokens=10)
            vectors = (await engine.embed([prompt, "x"])).vectors
            exact = [comparable(one) for one in done], texts, chat.message, engine.model
            found.append((exact, [p for one in done for p in logprobs_of(one)], vectors))
    (exact, logprobs, vectors), (exact_there, logprobs_there, vectors_there) = found
    assert exact == exact_there
    assert len(logprobs) > 300
    np.testing.assert_allclose(logprobs, logprobs_there, atol=1e-4)
    np.testing.assert_allclose(vectors, vectors_there, atol=1e-5)
