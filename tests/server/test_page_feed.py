"""What the live page is told, against what requests say of themselves."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import anyio
import msgspec
import pytest

from mtpbatch import InternalError, NativeDiedError, SequenceStep, StepReport
from mtpbatch.server.page import feed as feed_module
from mtpbatch.server.page.feed import INTERVAL, Feed, Slot, Viewer, slots
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from patience import until

pytestmark = pytest.mark.anyio


def report(
    at: float,
    *sequences: SequenceStep,
    gap: float = 0.0,
    times: tuple[float, float, float] = (0, 0, 0),
) -> StepReport:
    return StepReport(at, sequences, gap, *times, 0, None)


def step(request_id: str, seq_id: int = 0, **counts: int) -> SequenceStep:
    fields = ("n_prompt", "n_drafted", "n_accepted", "n_generated", "n_tokens")
    return SequenceStep(seq_id, request_id, *(counts.get(field, 0) for field in fields))


def in_ms(found: list[Slot]) -> list[tuple[int, int]]:
    return [(slot.begin, slot.end) for slot in found]


def laid_out(*reports: StepReport) -> list[Slot]:
    return slots(reports, lambda at: round(1000 * at))


def test_a_step_ends_when_its_results_were_taken_in() -> None:
    found = laid_out(
        report(1.0, times=(0.1, 0.2, 0.1)),
        report(2.0, times=(0.1, 0.2, 0.0)),
    )
    assert in_ms(found) == [(600, 1000), (1700, 2000)]


def test_steps_whose_results_came_together_lie_one_after_another() -> None:
    found = laid_out(
        report(1.0, times=(0.0, 0.1, 0.0)),
        report(1.0, times=(0.0, 0.1, 0.0), gap=0.05),
        report(1.0, times=(0.0, 0.2, 0.0)),
    )
    assert in_ms(found) == [(550, 650), (700, 800), (800, 1000)]


def test_what_is_too_short_to_be_seen_is_added_up_for_each_request() -> None:
    steps = [
        (step("a", 0, n_prompt=7), step("b", 1, n_drafted=3, n_accepted=2, n_generated=3)),
        (step("a", 0, n_generated=1, n_tokens=8), step("b", 1, n_drafted=1, n_generated=1)),
        (step("c", 1, n_prompt=2, n_tokens=2),),
        (step("c", 1, n_generated=1, n_tokens=3),),
    ]
    found = laid_out(
        *(report(0.01 * i, *parts, times=(0, 0.01, 0)) for i, parts in enumerate(steps, 1))
    )
    first, second = json.loads(msgspec.json.encode(found))
    assert first == [
        *(0, 30),
        [[0, "a", 2, 7, 0, 0, 1, 8], [1, "b", 2, 0, 4, 2, 4, 0], [1, "c", 1, 2, 0, 0, 0, 2]],
    ]
    assert second == [30, 40, [[1, "c", 1, 0, 0, 0, 1, 3]]]


class Screen:
    """What a page would know, from its frames alone. The clock goes on from look to look."""

    def __init__(self, backend: ScriptedBackend, viewer: Viewer) -> None:
        self.backend = backend
        self.viewer = viewer
        self.frames: list[dict[str, Any]] = []
        self.text = ""
        self.lanes: dict[str, Any] = {}
        self.totals: dict[str, Counter[str]] = {}
        self.ends: dict[str, str] = {}

    def look(self) -> dict[str, Any]:
        self.backend.clock.advance(INTERVAL)
        for frame in self.viewer.take():
            self.text += frame.decode()
            self.frames.append(json.loads(frame))
            self.lanes |= self.frames[-1].get("lanes", {})
            for _, _, parts in self.frames[-1].get("slots", ()):
                for _, request_id, steps, prompt, drafted, accepted, generated, _ in parts:
                    self.totals.setdefault(request_id, Counter()).update(
                        steps=steps,
                        prompt=prompt,
                        drafted=drafted,
                        accepted=accepted,
                        generated=generated,
                    )
            self.ends |= self.frames[-1].get("ends", {})
        return self.frames[-1]

    @property
    def running(self) -> set[str]:
        return {run["request_id"] for run in self.lanes.values() if run}


@pytest.fixture
async def backend() -> ScriptedBackend:
    return ScriptedBackend(lambda prompt: "x" * 50, n_seq=3, n_ctx=400, n_batch=256, acceptance=0.7)


async def test_frames_add_up_to_what_requests_say_of_themselves(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        with feed.viewer() as viewer:
            screen = Screen(backend, viewer)
            setup = screen.look()["setup"]
            assert (setup["n_draft_max"], setup["snapshot_limit"]) == (3, 16 << 20)
            assert screen.lanes == {"0": None, "1": None, "2": None}
            first, held = backend.hold_step(0), backend.hold_step(6)
            requests = [
                engine.submit(
                    [65 + n] * (60 + n),
                    max_tokens=40 + n,
                    ignore_eos=True,
                    reuse_prefix=False,
                    metadata={"who": "Jane"},
                )
                for n in range(7)
            ]
            await first.reached()
            first.release()
            await held.reached()
            screen.look()
            assert len(screen.running) == engine.stats().running == 3
            assert screen.frames[-1]["stats"]["waiting"] == 4
            requests[6].cancel()
            held.release()
            done = [await request for request in requests]
            await until(lambda: engine.stats().running == 0)
            last = screen.look()
        assert not screen.running
        assert screen.ends == {c.request_id: c.finish_reason for c in done[:6]}
        for completion in done[:6]:
            totals = screen.totals[completion.request_id]
            assert totals["generated"] == len(completion.token_ids)
            assert totals["drafted"] == completion.drafted > 0
            assert totals["accepted"] == completion.accepted > 0
            assert totals["prompt"] == completion.usage.prompt_tokens
        stats = engine.stats()
        assert last["stats"]["generated_tokens"] == stats.generated_tokens
        assert last["stats"]["accepted_by_depth"] == list(stats.accepted_by_depth)
        assert last["state"] == "serving"
        assert "xxx" not in screen.text, "texts are not told"
        assert "Jane" not in screen.text


async def test_a_request_that_pauses_leaves_its_lane_and_comes_back() -> None:
    backend = ScriptedBackend(n_seq=8, n_ctx=320, n_cells=640, acceptance=0.4)
    async with open_scripted_engine(backend) as engine:
        with Feed(engine, backend.clock).viewer() as viewer:
            screen = Screen(backend, viewer)
            screen.look()
            prompts = [[65 + n] * 30 for n in range(12)]
            done = await engine.generate_many(prompts, max_tokens=200, ignore_eos=True)
            assert engine.stats().preemptions > 0
            screen.look()
            assert set(screen.ends.values()) <= {"length", "paused"}
            for completion in done:
                assert screen.totals[completion.request_id]["generated"] == 200
            assert not screen.running


async def test_nobody_is_told_anything_while_nobody_looks(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        assert not engine._watchers
        with feed.viewer() as one:
            with feed.viewer() as other:
                assert len(engine._watchers._watched) == 1, "all look through one watcher"
                first, second = Screen(backend, one), Screen(backend, other)
                first.look()
                second.look()
                await engine.generate("a", max_tokens=20, ignore_eos=True)
                first.look()
                for frame in other.take():
                    assert json.loads(frame) == first.frames[-1], "made once, for both"
            await engine.generate("b", max_tokens=20, ignore_eos=True)
            first.look()
        assert not engine._watchers
        assert {len(t) and t["generated"] for t in first.totals.values()} == {20}
        await engine.generate("c", max_tokens=20, ignore_eos=True)
        with feed.viewer() as again:
            late = Screen(backend, again)
            late.look()
            late.look()
            assert not late.totals
            assert not late.running


async def test_who_is_slow_misses_frames_and_begins_again(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        with feed.viewer() as one, feed.viewer() as other:
            fast, slow = Screen(backend, one), Screen(backend, other)
            fast.look()
            slow.look()
            held = backend.hold_step(10)
            request = engine.submit("a", max_tokens=100, ignore_eos=True)
            await held.reached()
            for _ in range(100):
                fast.look()
            assert sum(len(frame) for frame in feed._frames) < 50_000
            assert len(feed._frames) == len(fast.frames[-20:]) == 20
            n_seen = len(slow.frames)
            slow.look()
            assert len(slow.frames) == n_seen + 1, "one, instead of a hundred"
            assert slow.frames[-1]["setup"], "from which it can go on"
            assert slow.running == fast.running == {request.request_id}
            request.cancel()
            held.release()
            await request


async def test_notes_that_nobody_takes_are_bounded(
    backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MOST_NOTES", 50)
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        with feed.viewer() as viewer:
            screen = Screen(backend, viewer)
            screen.look()
            for _ in range(20):
                await engine.generate("a", max_tokens=30, ignore_eos=True, speculation=0)
            assert len(feed._notebook._notes) == 50
            screen.look()
            assert 0 < sum(t["generated"] for t in screen.totals.values()) <= 50
            assert not screen.running


async def test_it_is_over_when_the_engine_has_nothing_left(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        with feed.viewer() as viewer:
            screen = Screen(backend, viewer)
            assert screen.look()["state"] == "serving"
            held = backend.hold_step(3)
            request = engine.submit("a", max_tokens=50, ignore_eos=True)
            await held.reached()
            async with anyio.create_task_group() as group:
                group.start_soon(engine.drain)
                await until(lambda: engine.draining)
                assert screen.look()["state"] == "draining"
                assert not feed.over, "the request goes on, and can be looked at"
                held.release()
            await request
            await until(lambda: feed.over)
            assert screen.look()["state"] == "draining"
            await engine.aclose()
            assert feed.over
            assert screen.look()["state"] == "closed"
        with feed.viewer() as viewer:
            assert json.loads(viewer.take()[0])["state"] == "closed"


async def test_a_dead_engine_is_shown_as_that(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        feed = Feed(engine, backend.clock)
        with feed.viewer() as viewer:
            screen = Screen(backend, viewer)
            screen.look()
            backend.fail_step(2, InternalError("a secret"))
            with pytest.raises(Exception, match="died"):
                await engine.generate("a", max_tokens=50, ignore_eos=True)
            last = screen.look()
            assert (last["state"], last["stats"]) == ("dead", None)
            assert feed.over
            assert "secret" not in screen.text


async def test_an_engine_whose_model_dies_is_shown_as_that(backend: ScriptedBackend) -> None:
    backend.die_in_step(2)
    async with open_scripted_engine(backend) as engine:
        with Feed(engine, backend.clock).viewer() as viewer:
            screen = Screen(backend, viewer)
            with pytest.raises(NativeDiedError):
                await engine.generate("a", max_tokens=50, ignore_eos=True)
            assert screen.look()["state"] == "restarting"
            backend.clock.advance(1.0)
            await engine.generate("a", max_tokens=5, ignore_eos=True)
            assert screen.look()["state"] == "serving"


async def test_an_engine_in_which_no_step_ends_is_shown_as_that(backend: ScriptedBackend) -> None:
    async with open_scripted_engine(backend) as engine:
        with Feed(engine, backend.clock).viewer() as viewer:
            screen = Screen(backend, viewer)
            held = backend.hold_step(2)
            request = engine.submit("a", max_tokens=50, ignore_eos=True)
            await held.reached()
            backend.clock.advance(100.0)
            assert screen.look()["state"] == "stalled"
            held.release()
            await request
