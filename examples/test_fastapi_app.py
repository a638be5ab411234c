"""Testing an app without a model: the engine is the real one, what the model says is a script.

    pip install '.[examples]'       # fastapi, httpx and pytest
    pytest examples/test_fastapi_app.py

The app is that of fastapi_app.py; errors that real models hardly ever make can be played.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from fastapi_app import app
from mtpbatch import DecodeError
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # which FastAPI apps run on


@asynccontextmanager
async def client_of(backend: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    # httpx calls the app without its lifespan, so that the engine is for the test to open.
    async with open_scripted_engine(backend) as engine:
        app.state.engine = engine
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            yield client


async def test_the_answer_is_that_of_the_model() -> None:
    backend = ScriptedBackend(lambda prompt: f"You said: {prompt}")
    async with client_of(backend) as client:
        response = await client.post("/generate", json={"prompt": "hello"})
        assert response.json() == {"text": "You said: hello", "finish_reason": "stop"}


async def test_a_prompt_that_is_too_long_is_the_clients_fault() -> None:
    async with client_of(ScriptedBackend(n_ctx=64)) as client:
        response = await client.post("/generate", json={"prompt": "x" * 100})
        assert response.status_code == 400
        assert "has 100 tokens, but a sequence holds n_ctx=64" in response.json()["error"]


async def test_whoever_finds_the_queue_full_is_to_come_again() -> None:
    backend = ScriptedBackend(n_seq=1, max_waiting=0, on_full="reject")
    # The first step waits for the test, so that its request is still running when another comes.
    gate = backend.hold_step(0)
    async with client_of(backend) as client:
        running = app.state.engine.submit("a long story")
        await gate.reached()
        response = await client.post("/generate", json={"prompt": "hello"})
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        gate.release()
        await running


async def test_what_fails_in_the_middle_of_a_stream_is_told_there() -> None:
    backend = ScriptedBackend(lambda _: "once more", mtp=False)
    backend.fail_step(3, DecodeError("the GPU fell off"))
    async with client_of(backend) as client:
        response = await client.post("/stream", json={"prompt": "hello"})
        *texts, last = response.text.removesuffix("\n\n").split("\n\n")
        assert texts == ['data: {"text": "o"}', 'data: {"text": "n"}', 'data: {"text": "c"}']
        assert last.startswith("event: error\n")
        assert "the GPU fell off" in last
