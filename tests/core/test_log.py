"""What is logged, of what, and that nothing is until the app wants it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest
from structlog.contextvars import bound_contextvars

import mtpbatch
from mtpbatch import DecodeError, EngineOverloaded, InvalidParameterError
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "mtpbatch"):
        yield caplog


async def test_a_requests_events_carry_its_id_and_its_callers_context(
    everything: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend(lambda _: "answer", n_seq=2, n_draft_max=0)

    async def client(user: str, prompt: str) -> None:
        with bound_contextvars(user=user):
            await engine.generate(prompt)

    async with open_scripted_engine(backend) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(client, "ann", "x")
            group.start_soon(client, "bob", "y" * 200)
        backend.fail_step(backend.n_steps, DecodeError("no memory"))
        with pytest.raises(DecodeError):
            await engine.generate("z")
    lines = [record.getMessage() for record in everything.records]
    levels = [record.levelname for record in everything.records]
    assert (levels[0], lines[0].split()[0]) == ("INFO", "engine.opened")
    assert (levels[-1], lines[-1]) == ("INFO", "engine.closed")
    assert all("request_id" not in line for line in (lines[0], lines[-1]))
    of_ann = [line for line in lines if "user='ann'" in line]
    of_bob = [line for line in lines if "user='bob'" in line]
    for of_one in (of_ann, of_bob):
        assert [line.split()[0] for line in of_one] == ["request.submitted", "request.ended"]
        ids = {re.findall(r"request_id='(req-\d+)'", line)[0] for line in of_one}
        assert len(ids) == 1
        assert "finish_reason='stop'" in of_one[1]
    assert "prompt_tokens=200" in of_bob[1]
    failed = [r for r in everything.records if r.getMessage().startswith("step.failed")]
    assert [r.levelname for r in failed] == ["WARNING"]
    assert "requests=['req-3']" in failed[0].getMessage()
    assert any("request.ended" in li and "no memory" in li and "req-3" in li for li in lines)


async def test_a_requests_events_carry_its_metadata(everything: pytest.LogCaptureFixture) -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        await engine.generate("x", metadata={"trace": "t-1"})
        await engine.generate("x")
    lines = [r.getMessage() for r in everything.records if "request_id" in r.getMessage()]
    assert ["metadata={'trace': 't-1'}" in line for line in lines] == [True, True, False, False]


async def test_a_request_that_is_rejected_has_its_last_event(
    everything: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend(n_seq=1, max_waiting=0)
    gate = backend.hold_step(0)
    async with open_scripted_engine(backend) as engine:
        running = engine.submit("x")
        with pytest.raises(EngineOverloaded):
            engine.submit("y")
        gate.release()
        await running
    lines = [r.getMessage() for r in everything.records if "req-2" in r.getMessage()]
    assert [line.split()[0] for line in lines] == ["request.submitted", "request.ended"]
    assert "the engine is full" in lines[1]


async def test_while_nobody_listens_nothing_is_logged_of_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "mtpbatch"):
        async with open_scripted_engine(ScriptedBackend()) as engine:
            await engine.generate("x")
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events == ["engine.opened", "engine.closed"]


PROGRAM = """
import anyio, mtpbatch, sys
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
for level in sys.argv[1:]:
    mtpbatch.log_to_console(level)
async def main():
    backend = ScriptedBackend()
    async with open_scripted_engine(backend) as engine:
        await engine.generate("x")
anyio.run(main)
"""


@pytest.mark.parametrize(
    ("levels", "events"),
    [
        ([], []),
        (["INFO"], ["INFO engine.opened", "INFO engine.closed"]),
        (["ERROR", "INFO"], ["INFO engine.opened", "INFO engine.closed"]),
        (
            ["DEBUG"],
            [
                "INFO engine.opened",
                "DEBUG request.submitted",
                "DEBUG request.ended",
                "INFO engine.closed",
            ],
        ),
    ],
)
def test_a_script_sees_what_it_asks_for_once(levels: list[str], events: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *levels],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert [" ".join(line.split()[2:4]) for line in done.stderr.splitlines()] == events


def test_a_level_that_is_none_is_refused() -> None:
    before = list(logging.getLogger("mtpbatch").handlers)
    with pytest.raises(InvalidParameterError, match=r"^level: .*DEBUG.*got 'LOUD'"):
        mtpbatch.log_to_console("LOUD")
    assert logging.getLogger("mtpbatch").handlers == before


async def test_handlers_that_raise_and_values_that_cannot_be_shown_end_nothing(
    everything: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Unshowable:
        def __repr__(self) -> str:
            raise ValueError("cannot be shown")

    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError("a filter of the app's")

    async with open_scripted_engine(ScriptedBackend(lambda _: "answer")) as engine:
        with bound_contextvars(it=Unshowable()):
            assert (await engine.generate("x")).text == "answer"
        everything.handler.addFilter(refuse)
        try:
            assert (await engine.generate("x")).text == "answer"
            engine.check_health()
        finally:
            everything.handler.removeFilter(refuse)
    told = capfd.readouterr().err
    assert "cannot be shown" in told
    assert "a filter of the app's" in told
