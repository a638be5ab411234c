"""What watchers of an engine are told, against what its requests and its figures say."""

from __future__ import annotations

import contextlib
import logging
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from mtpbatch import (
    DecodeError,
    EngineClosedError,
    EngineOverloaded,
    InvalidParameterError,
    MtpBatchError,
    PromptTooLongError,
    RequestAdmitted,
    RequestEnded,
    StepReport,
)
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

pytestmark = pytest.mark.anyio

USER: ContextVar[str] = ContextVar("USER", default="nobody")


class Record:
    """A watcher that writes everything down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.seq_ids: dict[str, int] = {}
        self.admissions: dict[str, RequestAdmitted] = {}
        self.reports: list[StepReport] = []
        self.ends: dict[str, RequestEnded] = {}
        self.users: dict[str, str] = {}

    def admitted(self, request: RequestAdmitted) -> None:
        self.calls.append(("admitted", request.request_id))
        assert request.seq_id not in self.seq_ids.values(), "one request on each id"
        self.seq_ids[request.request_id] = request.seq_id
        self.admissions[request.request_id] = request

    def paused(self, request_id: str) -> None:
        self.calls.append(("paused", request_id))
        del self.seq_ids[request_id]

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)
        for part in report.sequences:
            self.calls.append(("stepped", part.request_id))
            assert part.request_id not in self.ends
            assert part.request_id in self.admissions

    def ended(self, request: RequestEnded) -> None:
        self.calls.append(("ended", request.request_id))
        self.seq_ids.pop(request.request_id, None)
        assert request.request_id not in self.ends, "each request ends once"
        self.ends[request.request_id] = request
        self.users[request.request_id] = USER.get()

    def total(self, field: str, request_id: str | None = None) -> int:
        return sum(
            getattr(part, field)
            for report in self.reports
            for part in report.sequences
            if request_id in (None, part.request_id)
        )


async def test_steps_add_up_to_what_completions_and_figures_say() -> None:
    backend = ScriptedBackend(n_seq=4, n_batch=32, acceptance=0.6)
    record = Record()
    prompts = [f"{i} once upon a time " * (1 + i % 4) for i in range(12)]
    async with open_scripted_engine(backend) as engine:
        with engine.watch(record):
            done = await engine.generate_many(prompts, max_tokens=30, ignore_eos=True, stop="ower")
            async with engine.stream("x", max_tokens=9, ignore_eos=True) as deltas:
                done.append(await deltas)
            stats = engine.stats()
    for completion in done:
        request_id = completion.request_id
        assert record.total("n_generated", request_id) == len(completion.token_ids)
        assert record.total("n_accepted", request_id) == completion.accepted
        assert record.total("n_drafted", request_id) == completion.drafted
        usage = completion.usage
        fed = usage.prompt_tokens - usage.cached_tokens
        assert record.total("n_prompt", request_id) == fed
        admitted = record.admissions[request_id]
        assert admitted.queued == completion.timings.queued
        assert admitted.prompt_tokens == usage.prompt_tokens
        assert admitted.cached_tokens == usage.cached_tokens
        ended = record.ends[request_id]
        assert (ended.completion, ended.error) == (completion, None)
        assert ended.params.max_tokens == (9 if completion is done[-1] else 30)
    assert record.total("n_generated") == stats.generated_tokens
    assert record.total("n_prompt") == stats.prompt_tokens
    assert record.total("n_drafted") == stats.drafted > 0
    assert sum(report.n_target_tokens > 0 for report in record.reports) == stats.steps
    assert sum(report.target_time for report in record.reports) == pytest.approx(stats.target_time)
    times = [report.at for report in record.reports]
    assert times == sorted(times)
    assert times[-1] == backend.clock()
    assert {completion.finish_reason for completion in done} == {"stop", "length"}


async def test_who_pauses_leaves_the_id_and_comes_back() -> None:
    backend = ScriptedBackend(
        lambda _: "y" * 60, n_seq=3, n_ctx=64, n_cells=80, n_draft_max=0, snapshot_memory=0
    )
    gate = backend.hold_step(0)
    record = Record()
    async with open_scripted_engine(backend) as engine:
        with engine.watch(record):
            generations = [engine.submit(prompt, max_tokens=50) for prompt in "abc"]
            gate.release()
            done = [await generation for generation in generations]
            preemptions = engine.stats().preemptions
    assert [len(completion.token_ids) for completion in done] == [50] * 3
    paused = [request_id for call, request_id in record.calls if call == "paused"]
    assert len(paused) == preemptions > 0
    for request_id in paused:
        life = [call for call, of in record.calls if of == request_id and call != "stepped"]
        assert life == ["admitted", *["paused", "admitted"] * paused.count(request_id), "ended"]
    for report in record.reports:
        assert sum(part.n_tokens for part in report.sequences) <= 80
    first = record.reports[0].sequences
    assert [part.n_tokens for part in first] == [part.n_prompt for part in first]


async def test_a_watcher_that_comes_late_is_told_first_of_who_runs() -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=2, n_draft_max=0)
    gate = backend.hold_step(5)
    record = Record()
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x")
        await gate.reached()
        watching = engine.watch(record)
        assert record.calls == [("admitted", running.request_id)]
        gate.release()
        completion = await running
        assert 0 < record.total("n_generated") < len(completion.token_ids)
        n_calls = len(record.calls)
        watching.close()
        await engine.generate("x")
        assert len(record.calls) == n_calls
        watching.close()


@pytest.mark.parametrize("failing", ["admitted", "stepped", "ended"])
async def test_a_watcher_that_raises_is_logged_and_hears_no_more(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Record):
        def fail(self, *values: Any) -> None:
            self.calls.append((failing, "fails"))
            raise ValueError("a watcher of the app's")

    bad, good = Failing(), Record()
    setattr(bad, failing, bad.fail)
    async with open_scripted_engine(ScriptedBackend(lambda _: "answer")) as engine:
        with engine.watch(bad), engine.watch(good):
            assert [(await engine.generate("x")).text for _ in range(2)] == ["answer"] * 2
        engine.check_health()
    assert bad.calls[-1] == (failing, "fails")
    assert len([call for call in bad.calls if call[1] == "fails"]) == 1
    assert len(good.ends) == 2
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.getMessage().startswith("watcher.failed")
    assert logged.exc_info is not None


async def test_ends_are_told_in_the_context_of_whoever_submitted() -> None:
    record = Record()

    async def client(user: str, prompt: str) -> None:
        USER.set(user)
        with contextlib.suppress(PromptTooLongError):
            await engine.generate(prompt, metadata={"user": user})

    async with open_scripted_engine(ScriptedBackend()) as engine:
        with engine.watch(record):
            async with anyio.create_task_group() as group:
                group.start_soon(client, "ann", "x")
                group.start_soon(client, "bob", "y" * 200)
                group.start_soon(client, "eve", "z" * 5000)
    assert len(record.ends) == 3
    for request_id, ended in record.ends.items():
        user = record.users[request_id]
        assert ended.params.metadata == {"user": user}
        assert isinstance(ended.error, PromptTooLongError) == (user == "eve")
        assert (ended.completion is None) == (user == "eve")


async def test_a_failed_step_is_reported_and_ends_its_requests_with_what_they_had() -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1, n_draft_max=0)
    backend.fail_step(4, DecodeError("no memory"))
    record = Record()
    async with open_scripted_engine(backend) as engine:
        with engine.watch(record):
            with pytest.raises(DecodeError) as caught:
                await engine.generate("x")
            await engine.generate("x")
    errors = [report.error for report in record.reports]
    assert errors[4] is not None
    assert "no memory" in errors[4]
    assert errors[:4] + errors[5:] == [None] * (len(errors) - 1)
    assert record.reports[4].sequences == ()
    failed, well = record.ends.values()
    assert (failed.error, well.error) == (caught.value, None)
    assert failed.completion is not None
    assert failed.completion.finish_reason == "error"
    assert len(failed.completion.token_ids) == 4


async def test_who_never_ran_ends_once_too() -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1, max_waiting=1)
    gate = backend.hold_step(0)
    record = Record()
    async with open_scripted_engine(backend) as engine:
        with engine.watch(record):
            running, waiting = engine.submit("x"), engine.submit("x")
            with pytest.raises(EngineOverloaded):
                engine.submit("x")  # was not taken in
            await gate.reached()
            waiting.cancel()
            gate.release()
            assert (await waiting).finish_reason == "abort"
            await running
            left = engine.submit("x")
            await engine.aclose()
            assert (await left).finish_reason == "abort"
            with pytest.raises(EngineClosedError):
                engine.watch(record)
    assert list(record.ends) == [g.request_id for g in (waiting, running, left)]


async def test_an_engine_that_dies_tells_of_all_ends() -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1)
    backend.fail_step(2, RuntimeError("a bug"))
    gate = backend.hold_step(2)
    record = Record()
    async with open_scripted_engine(backend) as engine:
        with engine.watch(record):
            generations = [engine.submit("x"), engine.submit("x")]
            gate.release()
            for generation in generations:
                with pytest.raises(MtpBatchError):
                    await generation
    assert [ended.error is not None for ended in record.ends.values()] == [True, True]


async def test_what_is_no_watcher_is_refused() -> None:
    class Deaf(Record):
        stepped = None  # type: ignore[assignment]

    async with open_scripted_engine(ScriptedBackend()) as engine:
        for wrong, kind, name in ((Deaf(), "Deaf", "stepped"), (print, "builtin", "admitted")):
            with pytest.raises(InvalidParameterError, match=rf"^watcher: .*{kind}.* no {name}\(\)"):
                engine.watch(wrong)  # type: ignore[arg-type]
        assert not engine._watchers
