"""A server that speaks OpenAI's API, over HTTP: mtpbatch, llama-server, vLLM and others.

How many tokens a chunk has is asked for where the server can tell: mtpbatch and vLLM count the
answer's tokens in each chunk (``continuous_usage_stats``), llama-server likewise in its timings
(``timings_per_token``). Of others each chunk counts as one token, and the usage at the end says
how many there were.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.in_words import shown
from mtpbatch.loadtest.answer import Answer, RequestFailed
from mtpbatch.loadtest.datasets import Work
from mtpbatch.loadtest.records import Facts

_NAMES: Final = {"llamacpp": "llama-server", "vllm": "vLLM", "mtpbatch": "mtpbatch"}
"""By what servers say of their models: who owns them."""
_IN_USAGE: Final = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_COUNTING: Final[dict[str, dict[str, Any]]] = {
    "llama-server": {"timings_per_token": True},
    "mtpbatch": _IN_USAGE,
    "vLLM": _IN_USAGE,
}
"""What makes a server tell how many tokens its chunks have."""
_PROBE_TIMEOUT: Final = aiohttp.ClientTimeout(total=30)
_SHOWN: Final = 300  # characters of what a server says is wrong


# ------------------------------------------------------------------- what servers send


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _CompletionDetails(Struct):
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Timings(Struct):  # llama-server's
    predicted_n: int | None = None
    draft_n: int | None = None
    draft_n_accepted: int | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


class _Model(Struct):
    id: str
    owned_by: str = ""


class _Models(Struct):
    data: list[_Model]


_decode = msgspec.json.Decoder(_Chunk).decode


class OpenAITarget:
    """A server. Made by :func:`open_server`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base: str,
        chat: bool,
        model: _Model,
        params: Mapping[str, Any],
    ) -> None:
        self.name = _NAMES.get(model.owned_by, model.owned_by or base)
        endpoint = "chat/completions" if chat else "completions"
        self.facts: Facts = {"url": base, "endpoint": endpoint, "model": model.id}
        self._session = session
        self._url = f"{base}/{endpoint}"
        self._chat = chat
        self._body = (
            {"model": model.id, "stream": True, "stream_options": {"include_usage": True}}
            | _COUNTING.get(self.name, {})
            | dict(params)
        )

    async def ask(self, index: int, work: Work, answer: Answer) -> None:
        """Make one request, and follow the answer."""
        body = self._body | self._prompt(work) | {"max_tokens": work.max_tokens}
        try:
            async with self._session.post(
                self._url,
                data=msgspec.json.encode(body),
                headers={"Content-Type": "application/json", "X-Request-Id": f"bench-{index}"},
                trace_request_ctx=answer,
            ) as response:
                if response.status != 200:
                    detail = (await response.text())[:_SHOWN]
                    raise RequestFailed(f"http {response.status}", detail)
                await self._follow(response, answer)
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed("connect", str(error)) from error
        except TimeoutError as error:
            raise RequestFailed("timeout", "the connection gave no answer in time") from error
        except aiohttp.ClientError as error:
            raise RequestFailed("broken stream", repr(error)) from error

    def _prompt(self, work: Work) -> dict[str, Any]:
        is_text = isinstance(work.prompt, str)
        if not self._chat:
            return {"prompt": work.prompt}
        return {"messages": [{"role": "user", "content": work.prompt}] if is_text else work.prompt}

    async def _follow(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        rest = b""
        complete = False
        async for data in response.content.iter_any():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                event = line[5:].strip()
                if event == b"[DONE]":
                    complete = True
                else:
                    _take(event, answer)
                if answer.enough:
                    return
        if not (complete or answer.finish_reason):
            raise RequestFailed("broken stream", "the stream ended before the answer did")


def _take(event: bytes, answer: Answer) -> None:
    try:
        chunk = _decode(event)
    except msgspec.DecodeError as error:
        what = shown(event.decode(errors="replace"))
        raise RequestFailed("broken stream", f"{error}: {what}") from error
    if chunk.error is not None:
        raise RequestFailed("error in stream", shown(chunk.error))
    total = _counted(chunk)
    for choice in chunk.choices:
        if choice.finish_reason is not None:
            answer.finish_reason = choice.finish_reason
        if _has_content(choice):
            answer.receive(1 if total is None else max(0, total - answer.received))
    if chunk.usage is not None:
        _take_usage(chunk.usage, answer)
    if chunk.timings is not None and chunk.timings.draft_n is not None:
        answer.drafted = chunk.timings.draft_n
        answer.accepted = chunk.timings.draft_n_accepted


def _counted(chunk: _Chunk) -> int | None:
    """Tokens of the answer so far, if the chunk tells."""
    if chunk.usage is not None:
        return chunk.usage.completion_tokens
    return chunk.timings.predicted_n if chunk.timings is not None else None


def _has_content(choice: _Choice) -> bool:
    if choice.text:
        return True
    delta = choice.delta
    return delta is not None and bool(
        delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls
    )


def _take_usage(usage: _Usage, answer: Answer) -> None:
    answer.prompt_tokens = usage.prompt_tokens
    answer.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        answer.cached_tokens = usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    if details is not None and details.accepted_prediction_tokens is not None:
        answer.accepted = details.accepted_prediction_tokens
        answer.drafted = answer.accepted + (details.rejected_prediction_tokens or 0)


# ----------------------------------------------------------------------------- opening


@asynccontextmanager
async def open_server(
    url: str,
    *,
    chat: bool,
    model: str | None,
    api_key: str | None,
    params: Mapping[str, Any],
) -> AsyncIterator[OpenAITarget]:
    """A server to measure, which is asked for its models first.

    ``chat``: requests are conversations, and a text is a user's message; else they are texts or
    tokens to go on with. ``params`` are fields of each request's body.

    Raises :class:`~mtpbatch.InvalidParameterError` if nobody answers there, or does not name a
    model and none is given.
    """
    base = url.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise InvalidParameterError(
            "target", f"must be a URL such as http://127.0.0.1:8000, got {url}"
        )
    if not base.endswith("/v1"):
        base += "/v1"
    trace = aiohttp.TraceConfig()
    trace.on_request_chunk_sent.append(_sent)
    async with aiohttp.ClientSession(
        # A connection for each request, as each user has: llama-server closes them after a stream
        # although it says that it keeps them, and the next request on one would fail.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),  # the driver's timeout is the one
        headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        trace_configs=[trace],
        read_bufsize=1 << 20,
    ) as session:
        yield OpenAITarget(session, base, chat, await _model(session, base, model), params)


async def _sent(
    session: aiohttp.ClientSession,
    context: SimpleNamespace,
    params: aiohttp.TraceRequestChunkSentParams,
) -> None:
    answer = context.trace_request_ctx
    if answer is not None:
        answer.begin()


async def _model(session: aiohttp.ClientSession, base: str, given: str | None) -> _Model:
    try:
        async with session.get(f"{base}/models", timeout=_PROBE_TIMEOUT) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise InvalidParameterError("target", f"nobody answers at {base}: {error}") from None
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError:
        models = []
    if given is not None:
        return _Model(given, models[0].owned_by if models else "")
    if not models:
        raise InvalidParameterError(
            "model", f"must be given: {base}/models answers {response.status} and names none"
        )
    return models[0]
