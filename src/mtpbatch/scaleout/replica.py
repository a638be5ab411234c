"""A replica: an engine, and the server's ASGI app over it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Final

import msgspec
import ray
from ray import serve
from starlette.types import Message

from mtpbatch._log import log
from mtpbatch.chat import ChatCompletion, ChatDelta
from mtpbatch.engine import Engine
from mtpbatch.exceptions import EngineDeadError, NativeDiedError
from mtpbatch.scaleout.passing import HttpRequest
from mtpbatch.server import ServerConfig, create_app
from mtpbatch.tokenizing import Prompt
from mtpbatch.types import Completion, Delta, Embeddings, EngineStats, parse

_ENGINE_DIED: Final = 70  # EX_SOFTWARE


class EngineReplica:
    """A class to deploy: one engine, with the resources that the replica's actor was given.

    ``model``, ``engine`` and ``server`` are those of :class:`AppSettings`. Unless ``engine`` says
    how many ``n_threads``, there are as many as the actor has CPUs; of GPUs llama.cpp sees those
    that Ray assigns.

    Through a handle the methods are those of :class:`~mtpbatch.Engine`, with the same arguments,
    results and errors. ``stream`` and ``stream_chat`` need ``handle.options(stream=True)``.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        model: str | None = None,
        engine: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
    ) -> None:
        self._server = parse(ServerConfig, server or {})
        self._opened = AsyncExitStack()
        opening = self._open(model, dict(engine or {}))
        self._engine: Engine = await self._opened.enter_async_context(opening)
        self._app = create_app(self._engine, **msgspec.structs.asdict(self._server))
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._watch = asyncio.create_task(self._leave_when_dead())

    # ------------------------------------------------------------------ by handles

    async def generate(self, prompt: Prompt, **params: Any) -> Completion:
        """See :meth:`mtpbatch.Engine.generate`."""
        return await self._engine.generate(prompt, **params)

    async def stream(self, prompt: Prompt, **params: Any) -> AsyncIterator[Delta]:
        """The deltas of :meth:`mtpbatch.Engine.stream`."""
        async with self._engine.stream(prompt, **params) as deltas:
            async for delta in deltas:
                yield delta

    async def chat(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **params: Any
    ) -> ChatCompletion:
        """See :meth:`mtpbatch.Engine.chat`."""
        return await self._engine.chat(messages, tools, **params)

    async def stream_chat(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **params: Any
    ) -> AsyncIterator[ChatDelta]:
        """The deltas of :meth:`mtpbatch.Engine.stream_chat`."""
        async with self._engine.stream_chat(messages, tools, **params) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, texts: Sequence[Prompt], *, normalize: bool = True) -> Embeddings:
        """See :meth:`mtpbatch.Engine.embed`."""
        return await self._engine.embed(texts, normalize=normalize)

    async def stats(self) -> EngineStats:
        """See :meth:`mtpbatch.Engine.stats`; ``handle.broadcast("stats")`` asks all replicas."""
        return self._engine.stats()

    # --------------------------------------------------------------- by the ingress

    async def answer(self, request: HttpRequest) -> AsyncIterator[list[Message]]:
        """What the server's app sends in answer to a request, as ASGI messages.

        Those that have come meanwhile come together: each item costs Ray about a millisecond.
        """
        ended: Message = {"type": "ended"}
        messages: asyncio.Queue[Message] = asyncio.Queue()
        parts = iter([{"type": "http.request", "body": request.body, "more_body": False}])

        async def receive() -> Message:
            for part in parts:
                return part
            return await asyncio.Future()  # a client that goes cancels the call

        async def run() -> None:
            try:
                await self._app(request.scope, receive, messages.put)
            finally:
                messages.put_nowait(ended)

        running = asyncio.create_task(run())
        try:
            while True:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                more = batch[-1] is not ended
                for message in batch:
                    if message["type"] == "http.response.start":
                        message["headers"] = self._headers(message["headers"])
                if batch := batch if more else batch[:-1]:
                    yield batch
                if not more:
                    break
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])

    def _headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        # Serve's proxy has given the request its id, and adds it to the answer itself.
        rest = [(name, value) for name, value in headers if name != b"x-request-id"]
        return [*rest, (b"x-mtpbatch-replica", self._name)]

    # --------------------------------------------------------------------- by Serve

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica for which this raises."""
        with suppress(NativeDiedError):  # which mends itself, and requests wait for that
            self._engine.check_health(self._server.stall_timeout)

    async def __del__(self) -> None:
        """Serve awaits this when it takes the replica away and its requests have ended."""
        self._watch.cancel()
        await self._engine.drain()
        await self._opened.aclose()

    def _open(
        self, model: str | None, config: dict[str, Any]
    ) -> AbstractAsyncContextManager[Engine]:
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
        if cpus >= 1:
            config.setdefault("n_threads", int(cpus))
        return Engine.open(model, **config)

    async def _leave_when_dead(self) -> None:
        try:
            await self._engine.wait_closed()
        except EngineDeadError as error:
            log.critical("replica.leaves", error=str(error))
            os._exit(_ENGINE_DIED)
