"""The server as a process of its own: signals, and how it ends.

::

    SIGTERM, SIGINT ──▶ drain: no new requests (503), those under way end ──▶ exit 0
      and once more ──▶ all requests end now ──▶ exit 128 + signal
    the engine dies ──▶ all endpoints answer 503, those under way with errors ──▶ exit 70
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import anyio
import uvicorn
from anyio.abc import TaskStatus

from mtpbatch._log import log
from mtpbatch.engine import Engine
from mtpbatch.exceptions import EngineDeadError
from mtpbatch.server.app import create_app, trace
from mtpbatch.server.config import ServerConfig
from mtpbatch.types import parse

ENGINE_DIED: Final = 70
"""The exit status (EX_SOFTWARE) by which a supervisor knows that it is worth to start again."""
_LEAVING_TIME: Final = 3  # seconds for what is written to clients, once no request is left


async def serve(
    host: str,
    port: int,
    model: str | os.PathLike[str] | None,
    *,
    engine: Mapping[str, Any],
    server: Mapping[str, Any],
    grace: float,
    ready: Callable[[str], object],
) -> int:
    """Serve until a signal comes or the engine dies; the process's exit status.

    ``engine`` and ``server`` are the fields of :class:`~mtpbatch.EngineConfig` and
    :class:`~mtpbatch.server.ServerConfig`. On port 0 a free one is taken. ``grace``: seconds that
    requests may take once the process is asked to end. ``ready`` is called with the URL when
    clients can connect.

    Raises :class:`OSError` if the address cannot be had, and what opening an engine raises.
    """
    parse(ServerConfig, server)  # before a model is loaded, which may take long
    with _bound(host, port) as listener:
        async with Engine.open(model, **engine) as opened:
            trace(opened, server.get("model_name"))
            return await _Process(opened, server, grace).run(listener, ready)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on that address, which refuses connections until somebody listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, f"{host} port {port}: {error.strerror}") from None
        yield listener


class _Process:
    """One run of the server."""

    def __init__(self, engine: Engine, server: Mapping[str, Any], grace: float) -> None:
        self._engine = engine
        self._grace = grace
        self._status = 0
        self._http = _Http(
            uvicorn.Config(
                create_app(engine, **server),
                lifespan="off",
                log_config=None,
                access_log=False,  # ours names the requests' ids
                server_header=False,
                timeout_graceful_shutdown=_LEAVING_TIME,
            )
        )

    async def run(self, listener: socket.socket, ready: Callable[[str], object]) -> int:
        """Serve on a bound socket until the end; the exit status."""
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        async with anyio.create_task_group() as group:
            await group.start(self._end_on_signals)
            group.start_soon(self._end_with_engine)
            listener.listen()  # who connects from now on waits until uvicorn is there
            ready(url)
            await self._http.serve([listener])
            group.cancel_scope.cancel()
        try:
            self._engine.stats()  # of a closed engine there are some, of a dead one not
        except EngineDeadError:
            return ENGINE_DIED
        return self._status

    async def _end_on_signals(self, *, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async with anyio.create_task_group() as group:
                first = await anext(signals)
                log.info("server.draining", signal=first.name, grace=self._grace)
                group.start_soon(self._drain)
                second = await anext(signals)
                self._status = 128 + second
                self._http.force_exit = self._http.should_exit = True
                await self._engine.aclose()

    async def _drain(self) -> None:
        with suppress(EngineDeadError):
            await self._engine.drain(self._grace)
        await self._engine.aclose()  # now, so that nobody waits for the rest of a body
        self._http.should_exit = True

    async def _end_with_engine(self) -> None:
        with suppress(EngineDeadError):
            await self._engine.wait_closed()
        self._http.should_exit = True


class _Http(uvicorn.Server):
    """uvicorn's server, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
