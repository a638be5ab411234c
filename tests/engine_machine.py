"""A state machine over the whole engine: requests, event loops, time and faults in any order.

The engine is the real one, on its own thread; the model is scripted, time is virtual, and the
thread goes on only where a rule says so (see ``lockstep``). What a rule does otherwise happens
while the engine is in a native call: during a step, not only after it. Event loops, too, run only
when told to: one that is not is an app that does something else, and a stream whose reader gets no
turn is one that nobody reads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias
from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lockstep import Garbage, Helpers, LockstepBackend, close_all, let_run
from mtpbatch import (
    Completion,
    DecodeError,
    Delta,
    Engine,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineOverloaded,
    EngineStalledError,
    Generation,
    GrammarError,
    InvalidParameterError,
    ModelLoadError,
    MtpBatchError,
    NativeDiedError,
    RequestAdmitted,
    RequestEnded,
    SamplingParams,
    StepReport,
    memory,
    prefix,
    scheduler,
    tokenizing,
)
from mtpbatch.scheduler import Event
from scheduling import make_sequence, undrafted

ENDS = (DecodeError, GrammarError, EngineDeadError, NativeDiedError)
REFUSALS = (InvalidParameterError, EngineOverloaded, EngineClosedError, EngineDeadError)
How: TypeAlias = Literal["generate", "stream", "submit"]

N_CTX = 24
CRASH = "scripted crash"
N_LOOPS = 3
MOST_TURNS = 5000  # after which an engine that is still not idle never will be


def shorter_prompts_matter() -> ExitStack:
    """What is laid out for long prompts happens with short ones, and helpers wait to be told."""
    stack = ExitStack()
    for module, name, value in (
        (prefix, "BLOCK", 2),
        (prefix, "LEAST", 4),
        (memory, "_ROOM", 3),
        (scheduler, "_LOOKS", 2),
        (scheduler, "_SETTLED", 1),
        (tokenizing, "LONG", 16),
        (tokenizing, "ThreadPoolExecutor", Helpers),
    ):
        stack.enter_context(patch.object(module, name, value))
    return stack


class Asked:
    """A request, by whoever made it."""

    def __init__(self, number: int, how: How) -> None:
        self.number = number
        self.how = how
        self.permits = asyncio.Semaphore(0)  # deltas that its reader may still take
        self.begun = False
        self.generation: Generation | None = None
        self.deltas: list[Delta] = []
        self.completion: Completion | None = None
        self.error: MtpBatchError | None = None
        self.coroutine: Coroutine[Any, Any, None]
        self.task: asyncio.Task[None]

    async def ask(self, engine: Engine, prompt: Any, params: dict[str, Any]) -> None:
        self.begun = True
        try:
            if self.how == "generate":
                self.completion = await engine.generate(prompt, **params)
            elif self.how == "submit":
                self.generation = engine.submit(prompt, **params)
                self.completion = await self.generation
            else:
                async with engine.stream(prompt, **params) as self.generation:
                    async for delta in self.generation:
                        self.deltas.append(delta)
                        await self.permits.acquire()
                self.completion = self.generation.completion
        except MtpBatchError as error:
            self.error = error


class Ledger:
    """A watcher that writes down every end."""

    def __init__(self) -> None:
        self.ends: Counter[int] = Counter()
        self.outcomes: dict[int, RequestEnded] = {}

    def ended(self, request: RequestEnded) -> None:
        number = _number(request.params)
        self.ends[number] += 1
        self.outcomes[number] = request

    def admitted(self, request: RequestAdmitted) -> None: ...
    def paused(self, request_id: str) -> None: ...
    def stepped(self, report: StepReport) -> None: ...


def _number(params: SamplingParams) -> int:
    number = params.metadata["number"]
    assert isinstance(number, int)
    return number


def _busy(machine: EngineMachine) -> bool:
    return bool(machine.live())


class EngineMachine(RuleBasedStateMachine):
    """Nothing is lost, whatever happens: see the invariants and :meth:`teardown`."""

    # ------------------------------------------------------------------ the engine

    @initialize(
        n_seq=st.integers(1, 4),
        n_batch=st.integers(1, 24),
        n_draft_max=st.integers(0, 3),
        acceptance=st.sampled_from([0.0, 0.6, 1.0]),
        lag=st.sampled_from([0, 1, 4]),
        n_cells=st.sampled_from([None, 24, 36]),
        snapshot_memory=st.sampled_from([0, 1]),
        max_waiting=st.sampled_from([0, 1, 3, None]),
        max_waiting_tokens=st.sampled_from([None, None, 20]),
        on_full=st.sampled_from(["wait", "reject"]),
        truncates=st.booleans(),
        failing=st.sets(st.integers(0, 5)),
        may_end=st.sampled_from([False, False, True]),
    )
    def open(
        self, n_seq: int, n_cells: int | None, failing: set[int], may_end: bool, **model: Any
    ) -> None:
        self.stack = shorter_prompts_matter()
        self.stack.enter_context(patch.object(Generation, "_receive", self.receive()))
        self.backend = LockstepBackend(
            n_seq=n_seq,
            n_ctx=N_CTX,
            n_cells=None if n_cells is None else min(n_cells, N_CTX * n_seq),
            **model,
        )
        for index in failing:
            self.backend.fail_save(index)
            self.backend.fail_restore(index)
        self.violations: list[str] = []
        self.ledger = Ledger()
        self.asked: list[Asked] = []
        self.endangered: set[int] = set()  # who was there while something was to go wrong
        self.given_up: set[int] = set()
        self.cut_off = False  # whether the engine was told to end whoever is there
        self.may_end = may_end
        self.enders: list[asyncio.Task[None]] = []  # of drain and aclose
        self.loops = [self.new_loop() for _ in range(N_LOOPS)]
        self.engine = Engine(lambda: self.backend, self.backend.clock)
        self.backend.await_halt()
        self.garbage = Garbage(self.engine)
        self.backend.garble = self.garbage.garble
        self.engine.watch(self.ledger)

    def receive(self) -> Callable[..., None]:
        """What generations do with events, and that none comes after the last one."""
        original = Generation._receive

        def checked(generation: Generation, event: Event, *, followed: bool) -> None:
            if generation._outcome is not None:
                self.violations.append(f"{event} came to {generation!r}")
            original(generation, event, followed=followed)

        return checked

    def new_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context: self.violations.append(str(context)))
        return loop

    @property
    def over(self) -> bool:
        """Whether the engine has died, or is being closed."""
        return self.engine.closed

    # ------------------------------------------------------------------ requests

    @rule(
        loop=st.integers(0, N_LOOPS - 1),
        how=st.sampled_from(["generate", "stream", "submit"]),
        n_prompt=st.integers(1, 18),
        first=st.sampled_from([65, 66, 255]),
        max_tokens=st.integers(1, 30),
        speculation=st.sampled_from(["auto", 0, 1]),
        stop=st.lists(st.sampled_from(["e", "th", "日本", "öß"]), max_size=1),
        ignore_eos=st.booleans(),
        reuse_prefix=st.booleans(),
        timeout=st.sampled_from([None, None, 0.03, 0.3]),
        queue_timeout=st.sampled_from([None, None, 0.005, 0.05]),
        priority=st.sampled_from([0, 0, -100, 100]),
        logprobs=st.sampled_from([None, None, 2]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        regex=st.sampled_from([None, None, None, "x"]),
    )
    def ask(self, loop: int, how: How, n_prompt: int, first: int, **params: Any) -> None:
        if params["speculation"] != "auto":
            params["speculation"] = min(params["speculation"], self.backend.facts.n_draft_max)
        if params["regex"] is not None:
            params["ignore_eos"] = False
        asked = self.asks(loop, how, [first, *range(97, 96 + n_prompt)], **params)
        assert self.refusal(asked) is None or isinstance(asked.error, REFUSALS[1:])

    @rule(loop=st.integers(0, N_LOOPS - 1), n=st.integers(2, 6), max_tokens=st.integers(1, 20))
    def crowd(self, loop: int, n: int, max_tokens: int) -> None:
        """More requests than there is room for, some of which begin alike."""
        hows: tuple[How, ...] = ("generate", "stream", "submit")
        for i in range(n):
            prompt = [65 + i % 2, *range(97, 99 + i)]
            self.asks(loop, hows[i % 3], prompt, max_tokens=max_tokens, ignore_eos=True)

    @rule(
        loop=st.integers(0, N_LOOPS - 1),
        how=st.sampled_from(["generate", "stream", "submit"]),
        n_prompt=st.sampled_from([0, N_CTX, 2 * N_CTX]),
        regex=st.sampled_from([None, "x"]),
    )
    def ask_wrongly(self, loop: int, how: How, n_prompt: int, regex: str | None) -> None:
        asked = self.asks(loop, how, [97] * n_prompt, regex=regex)
        self.helpers_work()
        let_run(self.loops[loop])
        assert self.over or isinstance(asked.error, REFUSALS) or asked.number in self.live()

    def asks(self, loop: int, how: How, prompt: list[int], **params: Any) -> Asked:
        asked = Asked(len(self.asked), how)
        params["metadata"] = {"number": asked.number}
        asked.coroutine = asked.ask(self.engine, prompt, params)
        asked.task = self.loops[loop].create_task(asked.coroutine)
        self.asked.append(asked)
        let_run(self.loops[loop])
        return asked

    def refusal(self, asked: Asked) -> MtpBatchError | None:
        """Why it was not taken in at all."""
        return asked.error if asked.number not in self.ledger.ends else None

    def someone(self, data: st.DataObject) -> Asked | None:
        going = [asked for asked in self.asked if not asked.task.done() and self.alive(asked)]
        return data.draw(st.sampled_from(going)) if going else None

    def alive(self, asked: Asked) -> bool:
        return not asked.task.get_loop().is_closed()

    @precondition(_busy)
    @rule(data=st.data(), n=st.integers(1, 9))
    def read_on(self, data: st.DataObject, n: int) -> None:
        """A reader takes some more of its stream."""
        asked = self.someone(data)
        if asked is not None:
            for _ in range(n):
                asked.permits.release()
            let_run(asked.task.get_loop())

    @precondition(_busy)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "its task", "both"]))
    def cancel(self, data: st.DataObject, how: str) -> None:
        asked = self.someone(data)
        if asked is None:
            return
        self.given_up.add(asked.number)
        if how != "its task" and asked.generation is not None:
            asked.generation.cancel()
        if how != "cancel":
            asked.task.cancel()
            let_run(asked.task.get_loop())

    @precondition(lambda self: any(asked.generation for asked in self.asked))
    @rule(data=st.data())
    def cancel_again(self, data: st.DataObject) -> None:
        """Also what has ended, or was cancelled before, or belongs to a loop that is gone."""
        asked = data.draw(st.sampled_from([asked for asked in self.asked if asked.generation]))
        self.given_up.add(asked.number)
        assert asked.generation is not None
        asked.generation.cancel()

    # ------------------------------------------------------------------ turns and time

    def turn(self) -> None:
        """Let the engine go on, until it is in the next native call."""
        self.backend.turn()
        assert self.engine._intake.until_timeout() != 0.0, "nobody outlasts its time"

    @rule(n=st.integers(1, 16))
    def go_on(self, n: int) -> None:
        """The engine does some steps, and no event loop hears of it."""
        for _ in range(n):
            self.turn()

    @rule(n=st.integers(1, 16), who=st.sets(st.integers(0, N_LOOPS - 1)))
    def go_on_together(self, n: int, who: set[int]) -> None:
        self.helpers_work()
        for _ in range(n):
            self.turn()
            for loop in who:
                let_run(self.loops[loop])

    def helpers_work(self) -> bool:
        """A helper tokenises what is long, or compiles a grammar; ``False``: there was nothing."""
        tokenizer: Any = self.engine._tokenizer
        return bool(tokenizer._thread.work() or tokenizer._compiler.work())

    @precondition(_busy)
    @rule(seconds=st.sampled_from([0.001, 0.02, 0.3, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.backend.clock.advance(seconds)

    @rule(stall_timeout=st.sampled_from([0.0, 0.1, 60.0]))
    def look_at_health(self, stall_timeout: float) -> None:
        """A step that does not come back is noticed, and nothing else is taken for one."""
        since = max(self.engine._last_step, self.engine._intake.busy_since)
        hangs = self.backend.clock() - since > stall_timeout and self.engine._intake.n_ready > 0
        if self.over or hangs or self.engine._death is not None:
            with pytest.raises((EngineError, NativeDiedError)) as caught:
                self.engine.check_health(stall_timeout)
            stalled = isinstance(caught.value, EngineStalledError)
            assert stalled != (self.over or self.engine._death is not None)
        else:
            self.engine.check_health(stall_timeout)

    @rule(loop=st.integers(0, N_LOOPS - 1))
    def close_loop(self, loop: int) -> None:
        """An app's loop ends with requests of it under way."""
        gone = self.loops[loop]
        self.loops[loop] = self.new_loop()
        gone.close()
        for asked in self.asked:
            if not self.alive(asked):
                asked.task._log_destroy_pending = False  # type: ignore[attr-defined]
        for ender in self.enders:
            if ender.get_loop() is gone:
                ender._log_destroy_pending = False  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ faults

    @precondition(_busy)
    @rule(ahead=st.integers(0, 3))
    def fail_a_step(self, ahead: int) -> None:
        self.backend.fail_step(self.backend.n_steps + ahead)

    @precondition(_busy)
    @rule(kind=st.sampled_from(Garbage.KINDS))
    def garble_a_result(self, kind: str) -> None:
        self.garbage.add(kind)

    @precondition(_busy)
    @rule(ahead=st.integers(0, 3), comes_again=st.booleans())
    def die(self, ahead: int, comes_again: bool) -> None:
        """The process that runs the model dies, and cannot be started again at once."""
        self.backend.die_in_step(self.backend.n_steps + ahead)
        if not comes_again:
            self.backend.fail_restart(self.backend._n_restarts)

    @precondition(lambda self: self.may_end)
    @rule(ahead=st.integers(0, 3))
    def crash(self, ahead: int) -> None:
        self.backend.fail_step(self.backend.n_steps + ahead, RuntimeError(CRASH))

    @precondition(lambda self: self.may_end)
    @rule(loop=st.integers(0, N_LOOPS - 1), timeout=st.sampled_from([None, None, 0]))
    def drain(self, loop: int, timeout: float | None) -> None:
        async def drain() -> None:
            try:
                await self.engine.drain(timeout)
            except EngineDeadError:
                assert self.over

        self.cut_off |= timeout == 0
        self.enders.append(self.loops[loop].create_task(drain()))
        let_run(self.loops[loop])
        if timeout == 0:
            assert not self.live()

    @precondition(lambda self: self.may_end)
    @rule(loop=st.integers(0, N_LOOPS - 1), leave_behind=st.booleans())
    def close(self, loop: int, leave_behind: bool) -> None:
        """Closing waits for the native call, or does not; loops and rules go on meanwhile."""
        self.cut_off = True
        timeout = 0.0 if leave_behind else 3600.0
        self.enders.append(self.loops[loop].create_task(self.engine.aclose(timeout)))
        let_run(self.loops[loop])
        if leave_behind:
            assert not self.live()

    # ------------------------------------------------------------------ what holds

    def live(self) -> set[int]:
        return {_number(one.params) for one in self.engine._intake.live.values()}

    @invariant()
    def every_request_is_somewhere_once(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert not self.violations
        live, ends = self.live(), self.ledger.ends
        if self.backend.will_fail or self.garbage.is_coming or self.engine._death is not None:
            self.endangered |= live
        assert all(n == 1 for n in ends.values()), "exactly one last event"
        assert not live & ends.keys()
        for asked in self.asked:
            known = asked.number in live or asked.number in ends
            refused = isinstance(self.refusal(asked), REFUSALS)
            assert known != (refused or not asked.begun), "it is under way, has ended or is refused"
            if self.alive(asked) and asked.task.done() and not asked.task.cancelled():
                asked.task.result()
                assert asked.completion is not None or asked.error is not None

    @invariant()
    def sequences_and_cells_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine._intake._backlog.check_integrity()
        self.engine._intake._timeouts.check_integrity()
        failure = self.engine._gate.failure
        if failure is not None:
            died = isinstance(failure, NativeDiedError | ModelLoadError)  # too often in a row
            assert str(failure) == CRASH or died, "nothing else ends an engine"
            return
        self.engine._scheduler.check_integrity()
        stats = self.engine.stats()
        assert stats.running + stats.waiting == len(self.live())
        assert stats.running + stats.free_sequences == stats.n_seq
        assert 0 <= stats.kv_cells_used <= stats.n_cells
        refusals = sum(
            ended.completion is None and ended.error is not None
            for ended in self.ledger.outcomes.values()
        )
        assert sum(stats.finished.values()) == self.ledger.ends.total() - refusals

    @invariant()
    def nobody_waits_for_an_engine_that_has_nothing_to_do(self) -> None:
        if hasattr(self, "engine") and self.backend.at_rest and self.engine._death is None:
            assert not self.engine._intake.n_ready, "nothing waits without a reason"

    @rule()
    def settle(self) -> None:
        """Nothing waits without a reason: an engine that is left alone ends everything."""
        for _ in range(MOST_TURNS):
            while self.helpers_work():
                pass
            self.turn()
            for loop in self.loops:
                let_run(loop)
            if self.engine._death is not None and not self.backend.closed:
                self.backend.clock.advance(100.0)  # until it may begin anew, and has recovered
            elif self.backend.closed or self.backend.at_rest:
                break
        else:
            raise AssertionError(f"it does not come to rest: {self.engine!r}")
        assert not self.live(), "nothing waits without a reason"
        if not self.over:
            assert not self.backend.active, "the executor was told of every release"
            assert not self.backend.parked, "and of every parked request that ended"
            assert self.backend.snapshots == set(self.engine._scheduler._snapshots._cached)
            assert self.engine.stats().kv_cells_used == 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.settle()
            self.read_to_the_end()
            self.every_request_is_somewhere_once()
            for asked in self.asked:
                self.check_end(asked)
            for ender in self.enders:
                if not ender.get_loop().is_closed():
                    assert ender.done(), "nobody waits for an end that has come"
                    ender.result()
        finally:
            self.end()

    def read_to_the_end(self) -> None:
        """Who reads slowly gets everything in the end."""
        for asked in self.asked:
            if self.alive(asked):
                for _ in range(N_CTX + 2):
                    asked.permits.release()
                for _ in range(N_CTX):
                    let_run(asked.task.get_loop())
                assert asked.task.done()

    def check_end(self, asked: Asked) -> None:
        if asked.number not in self.ledger.outcomes:
            return
        ended = self.ledger.outcomes[asked.number]
        params, completion, error = ended.params, ended.completion, ended.error
        if self.alive(asked) and not asked.task.cancelled():
            assert asked.error is error
            if error is None:
                assert asked.completion is completion
        if completion is None:  # found wanting when it was prepared
            assert isinstance(error, InvalidParameterError | EngineOverloaded)
            return
        if error is not None:
            assert isinstance(error, ENDS)
            scripted = params.regex is not None and isinstance(error, GrammarError)
            assert scripted or asked.number in self.endangered, "nothing was done to it"
        if completion.finish_reason == "abort":
            gone = not self.alive(asked) or self.cut_off
            assert gone or asked.number in self.given_up, "nobody gave it up"
        if completion.finish_reason == "timeout":
            assert params.timeout is not None or params.queue_timeout is not None
        if not completion.prompt_token_ids:
            assert completion.finish_reason in ("abort", "timeout", "error")  # not prepared by then
            return
        truth = make_sequence(
            self.backend,
            "truth",
            list(completion.prompt_token_ids),
            stop=params.stop,
            ignore_eos=params.ignore_eos,
            max_tokens=params.max_tokens,
        )
        token_ids, text, reason = undrafted(self.backend, truth)
        assert list(completion.token_ids) == token_ids[: len(completion.token_ids)]
        if completion.finish_reason in ("stop", "length"):
            assert (list(completion.token_ids), completion.text) == (token_ids, text)
            assert completion.finish_reason == reason
        if asked.deltas and self.alive(asked) and asked.task.done() and not asked.task.cancelled():
            assert "".join(delta.text for delta in asked.deltas) == completion.text

    def end(self) -> None:
        """Close whatever is left."""
        close_all(self.engine, self.backend, self.loops)
        for asked in self.asked:
            asked.coroutine.close()
        self.stack.close()
        assert not self.violations
