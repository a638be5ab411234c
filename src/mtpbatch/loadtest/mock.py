"""A server that plays a model: its first token and those after it come at given times.

It speaks enough of OpenAI's API to be load-tested, and ``/truth`` says what it really did, so that
a measurement can be compared with it. A program of its own, in a process of its own::

    python -m mtpbatch.loadtest.mock --port 8000 --ttft 50ms --itl 10ms
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Final

import anyio
import msgspec
import uvicorn
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mtpbatch.loadtest.units import duration

_READY: Final = "listening on "


class Pace(Struct, frozen=True, kw_only=True):
    """How a mock answers. Seconds."""

    ttft: float = 0.0
    """From when it has read a request until it sends the first chunk."""
    itl: float = 0.0
    """Between tokens: a chunk of n comes n times as long after the one before."""
    chunk: int = 1
    """Tokens of each chunk."""
    fail: int | None = None
    """The HTTP status that every request gets."""
    break_after: int | None = None
    """The connection is closed after so many chunks."""


class Served(Struct):
    """What the mock did for a request; seconds of this machine's monotonic clock."""

    request_id: str
    authorization: str
    received: float
    sent: list[float] = []
    """When each chunk was."""
    whole: bool = False
    """Whether the answer was sent to its end."""


class _Asked(Struct):
    max_tokens: int = 16
    messages: Any = None


def app(pace: Pace) -> Starlette:
    """The mock, as an ASGI app."""
    served: list[Served] = []

    async def answer(request: Request) -> Response:
        headers = request.headers
        record = Served(
            headers.get("x-request-id", ""), headers.get("authorization", ""), time.monotonic()
        )
        served.append(record)
        asked = msgspec.json.decode(await request.body(), type=_Asked)
        if pace.fail is not None:
            return _json({"error": {"message": "as it was told to"}}, pace.fail)
        events = _events(pace, record, asked)
        return StreamingResponse(events, media_type="text/event-stream")

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [{"id": "mock", "owned_by": "mock"}]})

    async def truth(request: Request) -> Response:
        return _json(served)

    return Starlette(
        routes=[
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/truth", truth),
        ]
    )


async def _events(pace: Pace, record: Served, asked: _Asked) -> AsyncIterator[bytes]:
    now = time.monotonic
    left, due = asked.max_tokens, record.received + pace.ttft
    while left > 0:
        tokens = min(pace.chunk, left)
        left -= tokens
        if len(record.sent) == pace.break_after:
            raise ConnectionAbortedError
        while (wait := due - now()) > 0:  # noqa: ASYNC110 - event loops may wake up too early
            await anyio.sleep(wait)
        record.sent.append(now())
        yield _event(_choice(asked, " word" * tokens, None if left else "length"))
        due += pace.itl * min(pace.chunk, left)
    record.whole = True
    usage = {"prompt_tokens": 1, "completion_tokens": asked.max_tokens}
    yield _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def _choice(asked: _Asked, text: str, finish_reason: str | None) -> dict[str, Any]:
    said = {"text": text} if asked.messages is None else {"delta": {"content": text}}
    return {"choices": [{"index": 0, "finish_reason": finish_reason} | said]}


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


# ------------------------------------------------------------------ in its own process


@contextlib.contextmanager
def running(pace: Pace) -> Iterator[str]:
    """A mock in a process of its own, on a free port; gives its URL."""
    command = [sys.executable, "-m", "mtpbatch.loadtest.mock"]
    for name, value in msgspec.structs.asdict(pace).items():
        if value:
            command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(_READY):
                raise RuntimeError(f"the mock server did not start: {line!r}")
            yield line.removeprefix(_READY).strip()
        finally:
            process.terminate()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtpbatch.loadtest.mock", description=__doc__)
    seconds = partial(duration, "pace")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--ttft", type=seconds, default=0.0, help="until the first chunk: 50ms")
    parser.add_argument("--itl", type=seconds, default=0.0, help="between tokens: 10ms")
    parser.add_argument("--chunk", type=int, default=1, help="tokens in each chunk")
    parser.add_argument("--fail", type=int, metavar="STATUS", help="answer everything with this")
    parser.add_argument("--break-after", type=int, metavar="N", help="close after N chunks")
    return parser


def main() -> None:
    """Serve until terminated; the first line of output says where."""
    options = vars(_parser().parse_args())
    listener = socket.create_server(("127.0.0.1", options.pop("port")))
    print(f"{_READY}http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app(Pace(**options)), log_level="critical", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
