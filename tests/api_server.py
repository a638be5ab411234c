"""A real server on a free port, in the test's own event loop."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import httpx
import uvicorn
from starlette.types import ASGIApp

from mtpbatch import Engine
from mtpbatch.server import create_app
from mtpbatch.testing import ScriptedBackend, open_scripted_engine


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the tests'


@asynccontextmanager
async def serving(app: ASGIApp, *, send_buffer: int | None = None) -> AsyncIterator[str]:
    """Serve an app; its URL.

    ``send_buffer``: about so many bytes that a client has not read stay with the system; by
    default as many as it likes, which can be megabytes.
    """
    server = _Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    )
    ended = anyio.Event()

    async def serve() -> None:
        try:
            await server.serve([listener])
        finally:
            ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects waits until it is ready
        if send_buffer is not None:  # of each connection, which takes it over
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        port = listener.getsockname()[1]
        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                # Also where a test fails: one that is cancelled leaves its socket open, and uvloop
                # waits for that when it is closed.
                server.should_exit = True
                with anyio.CancelScope(shield=True):
                    await ended.wait()


@asynccontextmanager
async def scripted(
    backend: ScriptedBackend, **config: Any
) -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    """A scripted engine, and a client of a server on it."""
    async with (
        open_scripted_engine(backend) as engine,
        serving(create_app(engine, **config)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield engine, client
