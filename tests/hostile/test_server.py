"""What anybody may send to the server: by its own description and against it, and bytes as such."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import httpx
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

import mtpbatch
from api_server import serving
from mtpbatch.server import create_app

SLOW = settings(suppress_health_check=list(HealthCheck))
SOME = settings(SLOW, max_examples=SLOW.max_examples // 8)


@contextmanager
def server(**config: Any) -> Iterator[str]:
    """One on the demo model, which runs in a thread while tests block theirs."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[str]:
        async with (
            mtpbatch.Engine.open(n_seq=2, n_ctx=128, n_threads=1) as engine,
            serving(create_app(engine, max_body=100_000, **config)) as url,
        ):
            yield url.removeprefix("http://")
            assert engine.stats().free_sequences == 2

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(opened()) as address:
        yield address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as address:
        yield address


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """That of a server that wants a key, and does not wait long for bodies."""
    with server(api_keys=["key"], body_timeout=0.5) as address:
        yield address


POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
GETS = (
    "/v1/models",
    "/v1/models/{model}",
    "/health",
    "/metrics",
)  # in which nothing could be wrong
SENT = [(path, "POST", mode) for path in POSTS for mode in GenerationMode]
SENT += [(path, "GET", GenerationMode.POSITIVE) for path in GETS]


def test_these_are_all_operations(address: str) -> None:
    described = httpx.get(f"http://{address}/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path, item in described.items() for method in item} == {
        (path, method) for path, method, _ in SENT
    }


def with_integers(value: Any) -> Any:
    """To a schema 3.0 is an integer; it is refused, though nobody writes one so."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [with_integers(item) for item in value]
        case dict():
            return {key: with_integers(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize(("path", "method", "mode"), SENT)
def test_the_description_holds_whatever_is_sent(
    address: str, path: str, method: str, mode: GenerationMode
) -> None:
    """Statuses, types and bodies are those described; what is wrong is refused, nothing is 5xx."""
    schema = schemathesis.openapi.from_url(f"http://{address}/openapi.json")
    operation = schema[path][method]

    statuses = set()

    @SOME
    @given(operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case[Any]) -> None:
        case.body = with_integers(case.body)
        # Not all that a value must be is in its schema, such as which tokens there are.
        response = case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])
        statuses.add(response.status_code)

    send()
    if mode is GenerationMode.POSITIVE and path in POSTS and SOME.max_examples > 100:
        assert 200 in statuses, "of few there may be none that is answered"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_description_holds_of_a_stream(address: str, path: str, asked: dict[str, Any]) -> None:
    """Few of the requests above both ask for one and get it."""
    operation = schemathesis.openapi.from_url(f"http://{address}/openapi.json")[path]["POST"]
    case = operation.Case(body=asked | {"max_tokens": 3, "stream": True})
    response = case.call_and_validate(timeout=60)
    assert response.content.count(b"data: ") > 1


LINE = b"POST /v1/completions HTTP/1.1"
BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
HEADERS = {
    b"Host": b"a",
    b"Authorization": b"Bearer key",
    b"Content-Type": b"application/json",
    b"Content-Length": str(len(BODY)).encode(),
}
LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
"""Ends the headers of what it follows, and the connection."""

Headers: TypeAlias = list[tuple[bytes, bytes]]


def request(headers: Headers) -> bytes:
    lines = [LINE, *(name + b": " + value for name, value in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + BODY


@st.composite
def other_headers(draw: st.DrawFn) -> Headers:
    """Those of a request, with some that the server reads set to something else, or twice."""
    headers = [*HEADERS.items()]
    names = [*HEADERS, b"Transfer-Encoding", b"X-Request-ID", b"Connection", b"Expect", b"Upgrade"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        if draw(st.booleans()):
            headers = [header for header in headers if header[0] != name]
        value = draw(
            st.binary(max_size=12)
            | st.sampled_from([*HEADERS.values(), b"bearer  key ", b"Bearer \xff", b"Basic key"])
            | st.sampled_from([b"application/json; charset=x", b"text/plain", b"", b"a" * 300])
            | st.sampled_from([b"0", b"1", b"-1", b"+32", b"\xb2", b"9" * 30, b"32, 32"])
            | st.sampled_from([b"chunked", b"identity", b"close", b"100-continue", b"websocket"])
        )
        headers.append((name, value))
    return headers


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request with bytes put in, taken out, or in the place of others."""
    data = bytearray(request([*HEADERS.items()]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\r\n", b"\r\n\r\n", b"\0", b": ", b"9" * 30, b"a" * 70_000])
            | st.sampled_from(
                [b"\r\nTransfer-Encoding: chunked\r\n", b"\r\nUpgrade: websocket\r\n"]
            )
        )
    return bytes(data)


def answers(address: str, data: bytes) -> list[int]:
    """The statuses that come back until the server closes the connection."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(data + LAST)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except (ConnectionResetError, BrokenPipeError):  # it did not read all of it
            return []
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def test_the_request_that_is_damaged_is_a_right_one(guarded: str) -> None:
    assert answers(guarded, request([*HEADERS.items()])) == [200, 200]


@SOME
@given(data=other_headers().map(request) | damaged() | st.binary(max_size=200))
def test_bytes_that_are_no_request_trouble_nobody_else(guarded: str, data: bytes) -> None:
    """The connection ends; others are served."""
    assert all(status < 500 for status in answers(guarded, data))
    assert httpx.get(f"http://{guarded}/health").status_code == 200
