"""What servers send is read as it was meant, and what goes wrong is told apart.

The server here sends bytes that are written down: those of llama-server, vLLM and others.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream, TaskStatus

from mtpbatch import InvalidParameterError
from mtpbatch.loadtest.answer import Answer, RequestFailed, Tally
from mtpbatch.loadtest.datasets import Prompt, Work
from mtpbatch.loadtest.openai_target import OpenAITarget, open_server

pytestmark = pytest.mark.anyio

Script = Callable[[SocketStream], Awaitable[None]]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """aiohttp knows no trio."""
    return "asyncio", {"use_uvloop": request.param}


class Server:
    """Answers ``/v1/models`` as told, and everything else by a script."""

    def __init__(self, models: Mapping[str, Any] | None, script: Script) -> None:
        self.models, self.script = models, script
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers and body of each request."""
        self.gone = anyio.Event()
        """A client has closed its connection."""
        self._listening = anyio.CancelScope()
        self._closed = anyio.Event()

    async def listen(self, *, task_status: TaskStatus[int]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener:
            with self._listening:
                task_status.started(listener.extra(anyio.abc.SocketAttribute.local_port))
                await listener.serve(self.serve)
        self._closed.set()

    async def close(self) -> None:
        self._listening.cancel()
        await self._closed.wait()

    async def serve(self, stream: SocketStream) -> None:
        async with stream:
            head, _, rest = (await stream.receive()).partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            while len(rest) < int(headers.get("content-length", 0)):
                rest += await stream.receive()
            path = first.split()[1]
            if path == "/v1/models":
                status = b"404 Not Found" if self.models is None else b"200 OK"
                body = json.dumps(self.models or {}).encode()
                await stream.send(b"HTTP/1.1 %b\r\nConnection: close\r\n\r\n%b" % (status, body))
                return
            self.asked.append((path, headers, json.loads(rest)))
            try:
                await self.script(stream)
            except anyio.BrokenResourceError:
                self.gone.set()


@asynccontextmanager
async def serving(
    script: Script,
    *,
    owner: str = "somebody",
    models: Mapping[str, Any] | None = None,
    chat: bool = False,
    params: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> AsyncIterator[tuple[OpenAITarget, Server]]:
    server = Server(models or {"data": [{"id": "m", "owned_by": owner}]}, script)
    async with anyio.create_task_group() as group:
        port = await group.start(server.listen)
        url = f"http://127.0.0.1:{port}"
        async with open_server(
            url, chat=chat, model=None, api_key=api_key, params=params or {}
        ) as target:
            yield target, server
        await server.close()


def sends(*parts: bytes) -> Script:
    async def script(stream: SocketStream) -> None:
        for part in parts:
            await stream.send(part)

    return script


def events(*values: object) -> bytes:
    return b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)


def text(words: str, **more: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": None}], **more}


def end(reason: str = "length", **more: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "", "finish_reason": reason}], **more}


DONE = b"data: [DONE]\n\n"
USAGE = {"include_usage": True}


async def ask(
    target: OpenAITarget, prompt: Prompt = "hello", cancel_after: int | None = None
) -> Answer:
    scope = anyio.CancelScope()
    answer = Answer(time.monotonic, Tally(), cancel_after, scope.cancel)
    work = Work(prompt=prompt, prompt_tokens=None, max_tokens=9, cancel_after=cancel_after)
    with scope:
        await target.ask(3, work, answer)
    return answer


async def answered(*parts: bytes, owner: str = "somebody", chat: bool = False) -> Answer:
    async with serving(sends(STREAM, *parts), owner=owner, chat=chat) as (target, _):
        return await ask(target)


# ------------------------------------------------------------------------- what is read


async def test_each_chunk_is_a_token_where_the_server_does_not_count() -> None:
    usage = {"prompt_tokens": 4, "completion_tokens": 7}
    answer = await answered(
        events(text("a"), text("bc"), end(), {"choices": [], "usage": usage}), DONE
    )
    assert list(answer.tokens) == [1, 1]
    assert (answer.prompt_tokens, answer.output_tokens) == (4, 7)
    assert answer.finish_reason == "length"
    assert (answer.cached_tokens, answer.drafted, answer.accepted) == (None, None, None)


async def test_tokens_of_chunks_are_the_servers_where_it_counts() -> None:
    def counted(n: int) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": 4, "completion_tokens": n}}

    last = counted(8)["usage"] | {
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 5,
            "rejected_prediction_tokens": 2,
        },
    }
    chunks = [text("a", **counted(1)), text("bcd", **counted(4)), text("", **counted(5))]
    chunks += [text("e", **counted(7)), end(**counted(8)), {"choices": [], "usage": last}]
    answer = await answered(events(*chunks), DONE, owner="vllm")
    # The fifth token had no text yet: it comes with the next that has.
    assert list(answer.tokens) == [1, 3, 3]
    assert answer.output_tokens == 8
    assert (answer.cached_tokens, answer.drafted, answer.accepted) == (3, 7, 5)


async def test_llama_servers_timings_tell_tokens_and_drafts() -> None:
    def timed(n: int, **more: int) -> dict[str, Any]:
        return {"timings": {"predicted_n": n, "predicted_ms": 3.5, **more}}

    chunks = [text("a", **timed(1)), text("b", **timed(3, draft_n=3, draft_n_accepted=1))]
    usage = {"prompt_tokens": 4, "completion_tokens": 3}
    chunks += [end("stop", usage=usage, **timed(3, draft_n=6, draft_n_accepted=2))]
    answer = await answered(events(*chunks), DONE, owner="llamacpp")
    assert list(answer.tokens) == [1, 2]
    assert (answer.drafted, answer.accepted, answer.finish_reason) == (6, 2, "stop")


async def test_chat_content_reasoning_and_tool_calls_count_and_a_role_does_not() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"content": "yes"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {},
    ]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    last = {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}
    answer = await answered(events(*chunks, last), DONE, chat=True)
    assert len(answer.times) == 4
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize("size", [1, 7, 64])
async def test_events_may_be_split_anywhere(size: int) -> None:
    body = b": a comment\r\n\r\nevent: message\n" + events(text("é"), text("日本"), end()) + DONE
    body = body.replace(b"data: {", b"data:{", 1).replace(b"\n\n", b"\r\n\r\n", 1)
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    answer = await answered(*parts)
    assert list(answer.tokens) == [1, 1]
    assert answer.finish_reason == "length"


# ------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    ("owner", "name", "counting"),
    [
        ("somebody", "somebody", {"stream_options": USAGE}),
        ("llamacpp", "llama-server", {"stream_options": USAGE, "timings_per_token": True}),
        ("mtpbatch", "mtpbatch", {"stream_options": USAGE | {"continuous_usage_stats": True}}),
        ("vllm", "vLLM", {"stream_options": USAGE | {"continuous_usage_stats": True}}),
    ],
)
async def test_a_completion_is_asked_for_as_its_server_counts(
    owner: str, name: str, counting: dict[str, Any]
) -> None:
    async with serving(
        sends(STREAM, events(text("a"), end()), DONE),
        owner=owner,
        params={"temperature": 0.5},
        api_key="secret",
    ) as (target, server):
        await ask(target, (1, 2, 3))
    [(path, headers, body)] = server.asked
    assert path == "/v1/completions"
    assert headers["authorization"] == "bearer secret"
    assert headers["x-request-id"] == "bench-3"
    assert body | counting == body
    wanted = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 9, "stream": True}
    assert body | wanted | {"temperature": 0.5} == body
    assert target.name == name
    assert "secret" not in repr(target.facts)


@pytest.mark.parametrize("prompt", ["hello", ({"role": "user", "content": "hello"},)])
async def test_a_text_becomes_a_users_message_in_a_chat(prompt: Prompt) -> None:
    async with serving(sends(STREAM, DONE), chat=True) as (target, server):
        await ask(target, prompt)
    [(path, _, body)] = server.asked
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hello"}]


# -------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("parts", "kind", "words"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull"], "http 429", "full"),
        ([b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\n", b"x" * 9999], "http 500", "xxx"),
        ([STREAM, events(text("a"))], "broken stream", "before the answer did"),
        ([STREAM], "broken stream", "before the answer did"),
        ([], "broken stream", "Disconnected"),
        ([b"nonsense\r\n\r\n"], "broken stream", ""),
        ([STREAM, b"data: {]\n\n"], "broken stream", "{]"),
        ([STREAM, b'data: {"choices": 3}\n\n'], "broken stream", "choices"),
        (
            [STREAM, events(text("a"), {"error": {"message": "out of memory"}})],
            "error in stream",
            "out of memory",
        ),
        (
            [STREAM.replace(b"Connection: close", b"Content-Length: 99"), events(text("a"))],
            "broken stream",
            "",
        ),
    ],
)
async def test_failures_are_told_apart(parts: list[bytes], kind: str, words: str) -> None:
    async with serving(sends(*parts)) as (target, _):
        with pytest.raises(RequestFailed) as caught:
            await ask(target)
    assert caught.value.kind == kind
    assert words in caught.value.detail
    assert len(caught.value.detail) < 1000


async def test_a_server_that_is_gone_refuses_the_connection() -> None:
    async with serving(sends(STREAM)) as (target, server):
        await server.close()
        with pytest.raises(RequestFailed) as caught:
            await ask(target)
    assert caught.value.kind == "connect"


async def test_giving_up_closes_the_connection_at_once() -> None:
    async def forever(stream: SocketStream) -> None:
        await stream.send(STREAM)
        for _ in itertools.count():
            await stream.send(events(text("a")))
            await anyio.lowlevel.checkpoint()

    async with serving(forever) as (target, server):
        answer = await ask(target, cancel_after=5)
        assert answer.enough
        assert answer.received >= 5
        with anyio.fail_after(30):
            await server.gone.wait()


async def test_a_request_can_be_given_up_before_anything_has_come() -> None:
    async def silent(stream: SocketStream) -> None:
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        raise anyio.BrokenResourceError

    async with serving(silent) as (target, server):
        answer = await ask(target, cancel_after=0)
        assert answer.enough
        assert answer.received == 0
        with anyio.fail_after(30):
            await server.gone.wait()


# ----------------------------------------------------------------------------- opening


async def test_nobody_there_is_said_in_words() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    await listener.aclose()
    with pytest.raises(InvalidParameterError, match="target: nobody answers at"):
        async with open_server(
            f"http://127.0.0.1:{port}", chat=False, model=None, api_key=None, params={}
        ):
            pass


async def test_a_url_is_one() -> None:
    with pytest.raises(InvalidParameterError, match="target: must be a URL"):
        async with open_server("localhost:80", chat=False, model=None, api_key=None, params={}):
            pass


async def test_a_server_that_names_no_model_needs_one() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(sends(), models={"data": []}):
            pass
    assert caught.group_contains(InvalidParameterError, match="model: must be given")
