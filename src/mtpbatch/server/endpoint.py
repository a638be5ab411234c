"""A request and its answer: JSON in, JSON or a stream of events out, while the client stays.

A client that leaves cancels what is done for it, streamed or not: its sequences are free after
the step under way.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar

import anyio
import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from mtpbatch._log import log
from mtpbatch.engine import Engine
from mtpbatch.exceptions import EngineDeadError, NativeDiedError
from mtpbatch.server.config import ServerConfig
from mtpbatch.server.errors import ApiError, api_error
from mtpbatch.server.limits import ClientGone, Pace, read_json

REQUEST_ID = "mtpbatch.request_id"
"""Where a scope has the id of its request."""

_Asked = TypeVar("_Asked", bound=Struct)


class Service(NamedTuple):
    """What all endpoints serve from."""

    engine: Engine
    config: ServerConfig
    pace: Pace
    created: int
    """When it began to serve, in seconds since 1970."""

    def check(self) -> None:
        """Raise if the engine serves nobody any more."""
        with suppress(NativeDiedError):  # requests wait until the model is there again
            self.engine.check_health(stall_timeout=math.inf)

    def check_model(self, name: str | None) -> None:
        """Raise unless that is the name of our model, or none."""
        known = self.config.model_name
        if name not in (None, known):
            raise ApiError(
                404,
                f"model: there is no {name!r}; this server has {known!r}",
                param="model",
                code="model_not_found",
            )

    def told(self, error: Exception, request_id: str) -> ApiError:
        """What a client is told of an error, or of the first in a task group. What it is not told
        is logged."""
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        told = api_error(error, request_id=request_id, retry_after=self.pace.retry_after)
        if told.status == 500:
            log.error("http.failed", exc_info=error)
        return told


class Answer:
    """The way back to the client."""

    def __init__(self, service: Service, scope: Scope, send: Send, prefix: str) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.head: dict[str, Any] = {
            "id": self.id,
            "created": int(time.time()),
            "model": service.config.model_name,
        }
        """What every event, or the answer as a whole, begins with."""
        self.ended = False
        self._service = service
        self._request_id: str = scope[REQUEST_ID]
        self._send = send
        self._sending = anyio.Lock()

    async def json(self, value: object) -> None:
        """The answer as a whole."""
        body = msgspec.json.encode(value)
        length = str(len(body))
        await self._start({"content-type": "application/json", "content-length": length})
        await self._end(body)

    async def stream(
        self, parts: Sequence[AsyncIterator[Struct]], last: Callable[[], Iterable[Struct]]
    ) -> None:
        """The answer in events: those of all parts as they come, then the last ones.

        An error ends it, as an event with an error object.
        """
        await self._start({"content-type": "text/event-stream", "cache-control": "no-cache"})
        try:
            async with anyio.create_task_group() as group:
                for part in parts:
                    group.start_soon(self._forward, part)
            end = b"".join([*map(event, map(msgspec.json.encode, last())), event(b"[DONE]")])
        except Exception as error:
            end = event(self._service.told(error, self._request_id).body)
        await self._end(end)

    async def _forward(self, part: AsyncIterator[Struct]) -> None:
        async for value in part:
            body = event(msgspec.json.encode(value))
            async with self._sending:
                await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, body: bytes) -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, headers: dict[str, str]) -> None:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})


class Endpoint(Generic[_Asked]):
    """An ASGI app that reads a request of one kind and has it handled.

    ``handle`` answers before it returns, and may be cancelled wherever it waits. What goes wrong
    before the answer begins is raised, for the app to tell.
    """

    def __init__(
        self,
        service: Service,
        kind: type[_Asked],
        handle: Callable[[Service, _Asked, Answer], Awaitable[None]],
        prefix: str,
    ) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(kind)
        self._handle = handle
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(self._service, scope, send, self._prefix)
        try:
            body = await self._body(scope, receive)
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_when_gone, receive, answer, group.cancel_scope)
                asked: Any = self._decoder.decode(body)
                self._service.check_model(asked.model)
                await self._handle(self._service, asked, answer)
                group.cancel_scope.cancel()
        except* ClientGone:
            log.info("http.client_gone")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """What is asked. Raises as well if the engine ends before it is all there."""
        body = b""
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_at_end, self._service.engine, group.cancel_scope)
            body = await read_json(scope, receive, self._service.config)
            group.cancel_scope.cancel()
        self._service.check()
        return body


async def _cancel_at_end(engine: Engine, work: anyio.CancelScope) -> None:
    with suppress(EngineDeadError):
        await engine.wait_closed()
    work.cancel()


async def _cancel_when_gone(receive: Receive, answer: Answer, work: anyio.CancelScope) -> None:
    """Cancel the work when the client has left; to be cancelled itself when that is done."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not answer.ended:
        log.info("http.client_gone")
        work.cancel()


def event(data: bytes) -> bytes:
    """One event of a stream, as it goes over the wire."""
    return b"data: %b\n\n" % data
