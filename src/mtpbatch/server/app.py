"""The ASGI app: its routes, and what every request passes."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from mtpbatch._log import log
from mtpbatch.engine import Engine
from mtpbatch.exceptions import EngineClosedError, InvalidParameterError
from mtpbatch.metrics import EngineMetrics
from mtpbatch.server import page
from mtpbatch.server.chat import chat
from mtpbatch.server.completions import complete
from mtpbatch.server.config import ServerConfig
from mtpbatch.server.embeddings import embed
from mtpbatch.server.endpoint import REQUEST_ID, Endpoint, Service
from mtpbatch.server.errors import ApiError
from mtpbatch.server.limits import ApiKeys, Pace
from mtpbatch.server.openapi import description
from mtpbatch.server.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Health,
    ModelCard,
    ModelList,
)
from mtpbatch.types import EngineConfig, parse

_SANE_ID: Final = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)
_TELL_OF_THE_END: Final = frozenset({"/health", "/metrics"})
_OPEN_TO_ALL: Final = frozenset({"/health", "/openapi.json"}) | page.OPEN_PATHS


def create_app(
    engine: Engine | EngineConfig,
    model: str | os.PathLike[str] | None = None,
    **config: Any,
) -> Starlette:
    """An OpenAI-compatible ASGI app.

    With an open engine it can be mounted into another app, for whose life the engine is that app's
    to open and to close. Make one of an engine: for its metrics it watches that until it ends::

        from mtpbatch.server import create_app
        from starlette.applications import Starlette

        app = Starlette()
        async with mtpbatch.Engine.open("model.gguf") as engine:
            app.mount("/llm", create_app(engine))

    With a config it runs alone: it opens an engine on ``model`` (without one, on the demo model)
    when its lifespan begins, and closes it when that ends. ``config`` are the fields of
    :class:`~mtpbatch.server.ServerConfig`.

    Whoever finds the queue full is told so (429), whatever the engine's ``on_full`` says.

    Raises :class:`~mtpbatch.InvalidParameterError`, and :class:`~mtpbatch.EngineClosedError` or
    :class:`~mtpbatch.EngineDeadError` if the engine has ended.
    """
    parsed = parse(ServerConfig, config)
    if isinstance(engine, Engine):
        return _app(engine, parsed)
    if not isinstance(engine, EngineConfig):
        kind = type(engine).__name__
        raise InvalidParameterError("engine", f"must be an Engine or an EngineConfig, got {kind}")
    return _app_alone(engine, model, parsed)


def _app_alone(
    config: EngineConfig, model: str | os.PathLike[str] | None, server: ServerConfig
) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Engine.open(model, **msgspec.structs.asdict(config)) as engine:
            trace(engine, server.model_name)
            app.router.routes[:] = [Mount("", _app(engine, server))]  # not that of an earlier start
            yield

    return Starlette(lifespan=lifespan)


def trace(engine: Engine, model_name: str | None) -> None:
    """Have spans of an engine's requests made, where OpenTelemetry is installed.

    They go where the process has configured it to bring them. An engine that an app has opened is
    the app's to watch.
    """
    try:
        from mtpbatch.tracing import RequestSpans
    except ModuleNotFoundError:
        return
    engine.watch(RequestSpans(model_name=model_name))


def _app(engine: Engine, config: ServerConfig) -> Starlette:
    service = Service(engine, config, Pace(), int(time.time()))
    return Starlette(
        routes=_routes(service),
        middleware=[Middleware(_Door, service=service)],
        exception_handlers={HTTPException: _no_such_thing},
    )


def _routes(service: Service) -> Sequence[BaseRoute]:
    document = msgspec.json.encode(description(has_keys=bool(service.config.api_keys)))
    card = ModelCard(
        id=service.config.model_name,
        created=service.created,
        max_model_len=service.engine.model.n_ctx,
    )

    async def models(request: Request) -> Response:
        return _json(ModelList(data=[card]))

    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["model"])
        return _json(card)

    async def health(request: Request) -> Response:
        engine = service.engine
        engine.check_health(service.config.stall_timeout)
        if engine.draining:
            raise EngineClosedError("the engine is draining; send the request to another one")
        stats = engine.stats()
        return _json(Health(running=stats.running, waiting=stats.waiting))

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

    # Its registry is this app's own, so that apps of several engines do not meet in one.
    metrics = EngineMetrics(
        service.engine, CollectorRegistry(), model_name=service.config.model_name
    ).asgi_app()

    def post(path: str, endpoint: Endpoint[Any]) -> Route:
        return Route(path, endpoint, methods=["POST"])

    return [
        post("/v1/completions", Endpoint(service, CompletionRequest, complete, "cmpl")),
        post("/v1/chat/completions", Endpoint(service, ChatRequest, chat, "chatcmpl")),
        post("/v1/embeddings", Endpoint(service, EmbeddingRequest, embed, "embd")),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", one_model),
        Route("/health", health),
        Route("/metrics", _Plain(metrics), methods=["GET"]),
        *page.routes(service.engine),
        Route("/openapi.json", openapi),
    ]


class _Plain:
    """An ASGI app that is a function, which a route would take for a handler of requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Door:
    """What every request passes: it gets an id, shows its key, and finds the engine alive; and
    what goes wrong is told.

    The id is the client's ``X-Request-ID``, if that is one; it comes back with the answer and
    stands in the log's events, those of the engine's requests included.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = ApiKeys(service.config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope = {**scope, REQUEST_ID: request_id}
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        begin = time.monotonic()
        with bound_contextvars(http_request_id=request_id):
            try:
                await self._enter(scope, receive, send_with_id)
            except Exception as error:
                told = self._service.told(error, request_id)
                if status is not None:
                    return  # the server closes the connection in the middle of the answer
                await _error(told)(scope, receive, send_with_id)
            finally:
                log.info(
                    "http.request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=round(time.monotonic() - begin, 3),
                )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in _OPEN_TO_ALL:
            self._keys.check(scope)
        if path not in _TELL_OF_THE_END:
            self._service.check()
        await self._app(scope, receive, send)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value).decode()
    return secrets.token_hex(12)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """What the router has found out."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see /openapi.json"
    response = _error(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _error(told: ApiError) -> Response:
    return Response(told.body, told.status, headers=told.headers, media_type="application/json")
