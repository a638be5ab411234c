"""``mtpbatch serve`` as a supervisor runs it: how it starts, and each way in which it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx
import pytest

ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive", "MTPBATCH_API_KEY": "first, second"}
LONG: dict[str, Any] = {"prompt": "In the", "ignore_eos": True, "stream": True}
PATIENCE = 120  # seconds


class Server:
    """A process that serves."""

    def __init__(
        self, process: subprocess.Popen[str], url: str, client: httpx.Client, log: IO[str]
    ) -> None:
        self.process = process
        self.url = url
        self.client = client
        self._log = log

    def end(self) -> tuple[int, str]:
        """Its exit status, and its log."""
        status = self.process.wait(timeout=PATIENCE)
        self._log.seek(0)
        return status, self._log.read()

    @contextmanager
    def streaming(self, max_tokens: int = 4000) -> Iterator[Iterator[str]]:
        """The lines of a long answer, which has begun."""
        body = LONG | {"max_tokens": max_tokens}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            yield lines


@contextmanager
def served(*options: str, program: tuple[str, ...] = ("-m", "mtpbatch")) -> Iterator[Server]:
    settings = ["--port", "0", "--n-seq", "2", "--n-threads", "1", *options]
    with (
        tempfile.TemporaryFile("w+") as log,  # not a pipe, which might fill up
        subprocess.Popen(
            [sys.executable, *program, "serve", *settings],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=ENVIRONMENT,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = re.fullmatch(r"mtpbatch: serving demo at (\S+)/v1\n", process.stdout.readline())
            assert said is not None
            headers = {"authorization": "Bearer second"}
            with httpx.Client(base_url=said[1], headers=headers, timeout=PATIENCE) as client:
                yield Server(process, said[1], client, log)
        finally:
            process.kill()


def test_it_serves_the_demo_model_and_logs_requests_with_their_ids() -> None:
    with served() as server:
        given = {"x-request-id": "order-7"}
        body = {"prompt": "In the", "max_tokens": 3, "ignore_eos": True}
        answer = server.client.post("/v1/completions", json=body, headers=given)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        server.process.send_signal(signal.SIGTERM)
        status, log = server.end()
    assert status == 0
    lines = [line.split(maxsplit=3)[2:] for line in log.splitlines()]
    assert [what.split()[0] for _, what in lines] == [
        *("engine.opened", "http.request", "http.request"),
        *("server.draining", "engine.draining", "engine.closed"),
    ]
    assert "status=200" in lines[1][1]
    assert "http_request_id='order-7'" in lines[1][1]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_finishes_what_runs_and_refuses_what_is_new(end: signal.Signals) -> None:
    with served("--grace", str(PATIENCE)) as server, server.streaming(1000) as lines:
        server.process.send_signal(end)
        while (health := server.client.get("/health")).status_code == 200:
            pass
        assert health.status_code == 503
        assert server.client.post("/v1/completions", json=LONG).status_code == 503
        events = [line for line in lines if line]
        assert '"finish_reason":"length"' in events[-2]
        assert events[-1] == "data: [DONE]"
        assert server.end()[0] == 0


def test_a_live_page_that_is_open_does_not_hold_up_the_end() -> None:
    with served() as server, server.client.stream("GET", "/live/events") as page:
        lines = page.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.send_signal(signal.SIGTERM)
        for _ in lines:  # until the server ends it
            pass
        assert server.end()[0] == 0


def test_half_a_body_does_not_hold_up_the_end() -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = 'Authorization: Bearer first\r\nContent-Length: 100\r\n\r\n{"prompt": '
    with served() as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=PATIENCE) as client:
            client.sendall(f"{head}{half}".encode())
            assert server.client.get("/health").status_code == 200  # the other one is in by now
            server.process.send_signal(signal.SIGTERM)
            assert client.recv(1000).startswith(b"HTTP/1.1 503 ")
        status, log = server.end()
    assert status == 0
    assert "Traceback" not in log


def test_after_its_grace_it_ends_what_is_left() -> None:
    with served("--grace", "0") as server, server.streaming() as lines:
        server.process.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "engine_closed"
        assert server.end()[0] == 0


def test_asked_twice_it_ends_at_once() -> None:
    with served("--n-ctx", "100000") as server, server.streaming(99_000):
        server.process.send_signal(signal.SIGTERM)
        while server.client.get("/health").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 128 + signal.SIGTERM


def test_when_its_engine_dies_it_ends_with_a_status_of_its_own() -> None:
    """A step is made to raise, after the first tokens of an answer."""
    program = """
import sys
from mtpbatch import cli
from mtpbatch.scheduler import Scheduler
update = Scheduler.update
def failing(self, *args):
    if self.stats.generated_tokens > 20:
        raise RuntimeError("secret")
    return update(self, *args)
Scheduler.update = failing
sys.exit(cli.main())
"""
    with served(program=("-c", program)) as server, server.streaming() as lines:
        events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        assert "secret" not in "".join(events)
        status, log = server.end()
    assert status == 70
    assert "engine.died" in log
    assert "RuntimeError: secret" in log


def test_a_bad_option_is_one_line_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            ("--n-seq", "0"): "--n-seq: must be a whole number",
            ("--max-body", "0"): "--max-body: must be a whole number",
            ("--grace", "-1"): "--grace: must be a number of seconds from 0 on, got '-1'",
            ("--stall-timeout", "soon"): "--stall-timeout: must be a number of seconds",
            ("--model", "nowhere.gguf"): "nowhere.gguf: no such file",
            ("--port", port): f"port {port}: Address already in use",
        }
        for options, words in wrong.items():
            done = subprocess.run(
                [sys.executable, "-m", "mtpbatch", "serve", "--port", "0", *options],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                env=ENVIRONMENT,
                check=False,
            )
            assert done.returncode in (1, 2)
            assert done.stdout == ""
            [line] = done.stderr.splitlines()  # no model was opened for nothing
            assert line.startswith("mtpbatch: ")
            assert words in line
