"""The examples with a web server, on the demo model, spoken to by real clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import fastapi_app
import websocket_chat
from api_server import serving
from mtpbatch import Engine
from patience import until

EXAMPLES = Path(fastapi_app.__file__).parent
PATIENCE = 60  # seconds
# The greedy text of the demo model goes round in circles, and so on to the last of its tokens.
ENDLESS = {"prompt": "In the beginning", "max_tokens": 2000, "temperature": 0}

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # which the websocket client needs


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(fastapi_app.app) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client,
    ):
        await client.get("/health")  # the app has started
        yield client


@pytest.fixture
def engine(client: httpx.AsyncClient) -> Engine:
    opened = fastapi_app.app.state.engine
    assert isinstance(opened, Engine)
    return opened


async def until_aborted(engine: Engine, n_requests: int = 1) -> None:
    """All sequences are free, and requests did not simply come to their end."""
    with anyio.fail_after(PATIENCE):
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)
    stats = engine.stats()
    assert stats.free_sequences == stats.n_seq
    assert {k: n for k, n in stats.finished.items() if n} == {"abort": n_requests}


def data(line: str) -> Any:
    return json.loads(line.removeprefix("data: "))


async def test_an_answer_is_streamed_and_the_same_at_once(client: httpx.AsyncClient) -> None:
    ask = {"prompt": "In the beginning", "max_tokens": 30, "temperature": 0}
    whole = (await client.post("/generate", json=ask)).json()
    assert whole["finish_reason"] == "length"
    async with client.stream("POST", "/stream", json=ask) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *parts, end = [data(line) async for line in response.aiter_lines() if line]
    assert len(parts) > 1
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert end == {"finish_reason": "length"}


async def test_a_client_that_leaves_a_stream_frees_its_sequence(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    async with client.stream("POST", "/stream", json=ENDLESS) as response:
        assert data(await anext(response.aiter_lines()))["text"]
        assert engine.stats().running == 1
    await until_aborted(engine)


async def test_a_client_that_leaves_after_it_stopped_reading_frees_its_sequence(
    engine: Engine,
) -> None:
    """The app then waits for its client, not for the engine. Without a server, whose buffers and
    those of the sockets hold more than is said here."""
    stuck = anyio.Event()
    body: dict[str, Any] = {"type": "http.request", "body": json.dumps(ENDLESS).encode()}
    incoming = iter([body])

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        await stuck.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            stuck.set()
            await anyio.sleep_forever()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/stream",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    with anyio.fail_after(PATIENCE):
        await fastapi_app.app(scope, receive, send)
    await until_aborted(engine)


async def test_a_client_that_does_not_wait_for_its_answer_frees_its_sequence(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            await client.post("/generate", json=ENDLESS)

        tasks.start_soon(ask)
        with anyio.fail_after(PATIENCE):
            await until(lambda: engine.stats().running == 1)
        tasks.cancel_scope.cancel()
    await until_aborted(engine)


async def test_clients_that_leave_the_queue_make_room(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    running = [engine.submit("In the", max_tokens=4000, ignore_eos=True) for _ in range(8)]
    with anyio.fail_after(PATIENCE):
        await until(lambda: engine.stats().running == 8)  # else some of these are seen to wait
    async with anyio.create_task_group() as tasks:

        async def ask(path: str) -> None:
            await client.post(path, json=ENDLESS)

        tasks.start_soon(ask, "/stream")
        tasks.start_soon(ask, "/generate")
        with anyio.fail_after(PATIENCE):
            await until(lambda: engine.stats().waiting == 2)
        tasks.cancel_scope.cancel()
    with anyio.fail_after(PATIENCE):
        await until(lambda: engine.stats().waiting == 0)
    assert engine.stats().running == 8
    for generation in running:
        generation.cancel()
    await until_aborted(engine, 10)


async def test_a_full_engine_sends_clients_away(client: httpx.AsyncClient, engine: Engine) -> None:
    full = [engine.submit("In the", max_tokens=4000, ignore_eos=True) for _ in range(8 + 32)]
    await until(lambda: engine.stats().running == 8)
    for path in ("/stream", "/generate"):
        response = await client.post(path, json=ENDLESS)
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        assert "the engine is full: 8 requests run and 32 wait" in response.json()["error"]
    for generation in full:
        generation.cancel()
    await until_aborted(engine, 40)


async def test_what_cannot_be_done_is_refused_with_the_figures(client: httpx.AsyncClient) -> None:
    response = await client.post("/stream", json={"prompt": "x " * 5000})
    assert response.status_code == 400
    assert "a sequence holds n_ctx=4096" in response.json()["error"]
    assert (await client.post("/stream", json={"prompt": "x", "max_tokens": 0})).status_code == 422


async def test_health_tells_that_an_engine_is_closed(
    client: httpx.AsyncClient, engine: Engine
) -> None:
    assert (await client.get("/health")).status_code == 200
    await engine.aclose()
    for response in (await client.get("/health"), await client.post("/generate", json=ENDLESS)):
        assert response.status_code == 503
        assert "closed" in response.json()["error"]


@contextmanager
def started(name: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """An example that runs as its readers run it, and its address. It is to end by itself."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "PORT": "0"},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stderr is not None
        try:
            running = next(line for line in server.stderr if "Uvicorn running on " in line)
            yield running.split("Uvicorn running on ")[1].split()[0], server
            log = server.stderr.read()
            assert "Application shutdown complete" in log
            assert "Traceback" not in log
        finally:
            server.kill()


def test_a_service_that_is_told_to_stop_finishes_what_it_has_begun() -> None:
    with (
        started("fastapi_app.py") as (url, server),
        httpx.stream("POST", f"{url}/stream", json=ENDLESS, timeout=PATIENCE) as response,
    ):
        lines = filter(None, response.iter_lines())
        assert data(next(lines))["text"]
        server.send_signal(signal.SIGTERM)
        *_, end = map(data, lines)
        assert end == {"finish_reason": "length"}


async def test_a_chat_that_is_told_to_stop_says_goodbye() -> None:
    with started("websocket_chat.py") as (url, server):
        async with connect(f"{url.replace('http', 'ws')}/chat", proxy=None) as websocket:
            await websocket.send("In the beginning")
            # A word of the answer, or its end: it is sampled, and may be empty.
            assert {"text", "finish_reason"} & (await heard(websocket)).keys()
            server.send_signal(signal.SIGTERM)
            with anyio.fail_after(PATIENCE), pytest.raises(ConnectionClosed, match="1012"):
                _ = [said async for said in websocket]  # 1012: the service restarts


@pytest.fixture
async def chat(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(websocket_chat, "SAMPLING", {"max_tokens": 3000, "ignore_eos": True})
    async with serving(websocket_chat.app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            assert "new WebSocket" in (await client.get("/")).text
        yield f"{url.replace('http', 'ws')}/chat"


async def heard(websocket: ClientConnection) -> Any:
    with anyio.fail_after(PATIENCE):
        return json.loads(await websocket.recv())


async def test_a_conversation_over_a_websocket(chat: str) -> None:
    """Stopped and gone on with, then left in the middle of an answer."""
    async with connect(chat, proxy=None) as websocket:
        await websocket.send("In the beginning")
        assert (await heard(websocket))["text"]
        await websocket.send("")
        while "text" in (said := await heard(websocket)):
            pass
        assert said == {"finish_reason": "abort"}
        await websocket.send("And then?")
        assert (await heard(websocket))["text"]
    await until_aborted(websocket_chat.app.state.engine, 2)


async def test_what_is_too_much_for_a_conversation_does_not_end_it(
    chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket_chat, "SAMPLING", {"max_tokens": 5, "ignore_eos": True})
    async with connect(chat, proxy=None) as websocket:
        await websocket.send("x " * 5000)
        assert "a sequence holds n_ctx=4096" in (await heard(websocket))["error"]
        await websocket.send("In the beginning")
        assert (await heard(websocket))["text"]
