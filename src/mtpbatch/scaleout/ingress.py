"""The way in for HTTP: picks a replica for each request and passes on what it sends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol, cast

import anyio
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtpbatch._log import log
from mtpbatch.scaleout.passing import HttpRequest
from mtpbatch.scaleout.routing import beginning
from mtpbatch.server.errors import ApiError
from mtpbatch.server.limits import ClientGone, read_body

# A request that is itself what replicas die of takes two of them with it, not all.
_ATTEMPTS: Final = 2
_RETRY_AFTER: Final = 5  # seconds


class Answer(Protocol):
    """What a replica sends in answer to a request."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> None:
        """Nobody wants the rest."""
        ...


class PassOn:
    """An ASGI app that has a replica answer.

    ``ask`` starts a request on a replica. ``max_body`` and ``body_timeout`` are as in
    :class:`~mtpbatch.server.ServerConfig`.
    """

    def __init__(
        self, ask: Callable[[HttpRequest], Answer], max_body: int, body_timeout: float
    ) -> None:
        self._ask = ask
        self._max_body = max_body
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes."""
        reply = _Reply(send)
        try:
            body = await read_body(receive, self._max_body, self._body_timeout)
        except ApiError as error:
            await reply.fail(error)
            return
        except ClientGone:
            return
        request = HttpRequest.of(scope, body, beginning(body))
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await self._answer(request, reply)
            group.cancel_scope.cancel()

    async def _answer(self, request: HttpRequest, reply: _Reply) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            answer = self._ask(request)
            try:
                async for messages in answer:
                    await reply.take(messages)
            except RayActorError as error:
                log.warning("replica.died", path=request.path, attempt=attempt, error=str(error))
                if not reply.begun and attempt < _ATTEMPTS:
                    reply.forget()
                    continue
                await reply.fail(
                    ApiError(
                        503,
                        "the replica that answered has died; send the request again",
                        code="replica_died",
                        retry_after=_RETRY_AFTER,
                    )
                )
            except BackPressureError:
                await reply.fail(
                    ApiError(
                        429,
                        f"all replicas are full; try again in {_RETRY_AFTER} s",
                        code="engine_overloaded",
                        retry_after=_RETRY_AFTER,
                    )
                )
            except (DeploymentUnavailableError, RayError) as error:
                log.error("replica.failed", path=request.path, exc_info=error)
                await reply.fail(
                    ApiError(500, "the server failed; its log says more", code="internal_error")
                )
            finally:
                answer.cancel()
            return


class _Reply:
    """What the client gets. Headers wait for the first part of the body: until that has been sent,
    another replica may still answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._events = False
        self._ended = False
        self.begun = False

    async def take(self, messages: list[Message]) -> None:
        """Pass on what a replica sends."""
        for message in messages:
            if message["type"] == "http.response.start":
                self._start = message
                self._events = (b"content-type", b"text/event-stream") in (
                    (name.lower(), value.partition(b";")[0]) for name, value in message["headers"]
                )
                continue
            if not self.begun and (message.get("body") or not message.get("more_body")):
                assert self._start is not None  # ASGI has it come first
                self.begun = True
                await self._send(self._start)
            if self.begun:
                self._ended = not message.get("more_body")
                await self._send(message)

    def forget(self) -> None:
        """Another replica begins anew."""
        self._start = None

    async def fail(self, error: ApiError) -> None:
        """End with an error: as an event, if events have been sent.

        Any other answer stays without an end, so that the connection is cut.
        """
        if self._ended:
            return
        if not self.begun:
            headers = {"content-type": "application/json", **error.headers}
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._send(
                {"type": "http.response.start", "status": error.status, "headers": pairs}
            )
            await self._send({"type": "http.response.body", "body": error.body})
        elif self._events:
            event = b"data: " + error.body + b"\n\n"
            await self._send({"type": "http.response.body", "body": event})


@serve.ingress()
class Ingress:
    """A class to deploy: serves ``/v1/…``, ``/health`` and ``/openapi.json``. Several may run.

    ``engines`` is a deployment of :class:`EngineReplica`, the rest is as in ``ServerConfig``. What
    speaks of one engine, its metrics and its page, is not passed on: each request would show
    another replica's.
    """

    def __init__(
        self, engines: DeploymentHandle[object], max_body: int, body_timeout: float
    ) -> None:
        ask = engines.options(stream=True).answer.remote
        self._pass_on = PassOn(cast("Callable[[HttpRequest], Answer]", ask), max_body, body_timeout)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve asks for it when the replica has been made."""
        return Starlette(
            routes=[
                Route(path, self._pass_on)
                for path in ("/v1/{path:path}", "/health", "/openapi.json")
            ]
        )
