"""Whom the load goes to: a protocol, and an engine in this process.

:mod:`mtpbatch.loadtest.openai_target` is the other one: any server that speaks OpenAI's API.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio.to_thread
import msgspec

from mtpbatch.engine import Engine
from mtpbatch.exceptions import EngineOverloaded, InvalidParameterError, MtpBatchError
from mtpbatch.generation import Generation
from mtpbatch.loadtest.answer import Answer, RequestFailed
from mtpbatch.loadtest.datasets import Work
from mtpbatch.loadtest.records import Facts
from mtpbatch.types import SamplingParams, parse


class Target(Protocol):
    """Answers requests."""

    @property
    def name(self) -> str:
        """What it is, as a label: "mtpbatch", "llama-server"."""

    @property
    def facts(self) -> Facts:
        """Its settings, for the record."""

    async def ask(self, index: int, work: Work, answer: Answer) -> None:
        """Make one request and fill in its answer.

        Raises :class:`RequestFailed`. When it is cancelled it frees what the request holds.
        """


class EngineTarget:
    """An engine in this process. Made by :func:`open_engine`."""

    name = "mtpbatch"

    def __init__(self, engine: Engine, params: Mapping[str, Any]) -> None:
        self._engine = engine
        self._params = dict(params)
        self.facts: Facts = {"model": engine.description}
        for name, value in msgspec.structs.asdict(engine.config).items():
            if isinstance(value, str | int | float | None):
                self.facts[name] = value

    async def ask(self, index: int, work: Work, answer: Answer) -> None:
        """Make one request. Its tokens are those of the engine's steps, each a chunk."""
        generation: Generation | None = None
        try:
            prompt = await self._prompt(work)
            params = self._params | {"max_tokens": work.max_tokens}
            async with self._engine.stream(prompt, **params) as generation:
                answer.begin()
                async for delta in generation:
                    if delta.token_ids:
                        answer.receive(len(delta.token_ids))
                    if answer.enough:
                        break
        except MtpBatchError as error:
            raise RequestFailed(_kind(error), str(error)) from error
        finally:
            if generation is not None and (done := generation.completion) is not None:
                answer.prompt_tokens = done.usage.prompt_tokens
                answer.cached_tokens = done.usage.cached_tokens
                answer.output_tokens = done.usage.completion_tokens
                answer.finish_reason = done.finish_reason
                answer.drafted, answer.accepted = done.drafted, done.accepted
                answer.steps = done.steps

    async def _prompt(self, work: Work) -> str | Sequence[int]:
        prompt = work.prompt
        if isinstance(prompt, str):
            return prompt
        token_ids = [each for each in prompt if isinstance(each, int)]
        if token_ids:
            return token_ids
        text = await anyio.to_thread.run_sync(self._engine.apply_chat_template, prompt)
        return await self._engine.tokenize(text, add_special=False)


@asynccontextmanager
async def open_engine(
    model: str | None, config: Mapping[str, Any], params: Mapping[str, Any]
) -> AsyncIterator[EngineTarget]:
    """An engine to measure. ``config`` is for the engine, ``params`` for each request."""
    try:
        parse(SamplingParams, params)
    except InvalidParameterError as error:
        raise InvalidParameterError("params", str(error)) from None
    async with Engine.open(model, **config) as engine:
        yield EngineTarget(engine, params)


def _kind(error: MtpBatchError) -> str:
    """What its class is called, in words: "prompt too long"."""
    if isinstance(error, EngineOverloaded):
        return "overloaded"
    name = type(error).__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()
