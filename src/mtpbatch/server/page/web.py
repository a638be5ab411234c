"""The live page over HTTP: three files, and a stream of events."""

from __future__ import annotations

import importlib.resources
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from mtpbatch.engine import Engine
from mtpbatch.server.endpoint import event
from mtpbatch.server.page.feed import INTERVAL, Feed, Viewer

# Seconds, after which the page opens the next one. A server that shuts down may wait for open
# streams, and tells them nothing; those of an engine that drains or closes end by themselves.
_LONGEST_STREAM: Final = 15.0

_FILES: Final = {
    "/": ("page.html", "text/html"),
    "/live/page.css": ("page.css", "text/css"),
    "/live/page.js": ("page.js", "text/javascript"),
}
OPEN_PATHS: Final = frozenset(_FILES)
"""Which of the paths have to be open to everybody, where others ask for an API key."""

_HEADERS: Final = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def routes(engine: Engine) -> list[Route]:
    """The live page at ``/``, with what it needs under ``/live/``, for a Starlette app.

    ``/live/events`` tells figures and request ids, no texts. Where the app asks for an API key, ask
    for it there too: the page asks its user for the key, and sends it as ``Authorization: Bearer``.
    ``OPEN_PATHS``, which are files of the package, have to be open to everybody.

    ::

        from mtpbatch.server.page import routes
        from starlette.applications import Starlette

        app = Starlette(routes=routes(engine))
    """
    feed = Feed(engine)

    async def events(request: Request) -> Response:
        return _EventStream(feed)

    files = [Route(path, _file(*file)) for path, file in _FILES.items()]
    return [*files, Route("/live/events", events)]


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (importlib.resources.files("mtpbatch.server.page") / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer


class _EventStream(StreamingResponse):
    def __init__(self, feed: Feed) -> None:
        # The last header keeps proxies from holding events back.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._feed = feed

    async def stream_response(self, send: Send) -> None:
        # Not in the iterator: nobody closes that when the client has gone.
        with self._feed.viewer() as viewer:
            self.body_iterator = _events(self._feed, viewer)
            await super().stream_response(send)


async def _events(feed: Feed, viewer: Viewer) -> AsyncIterator[bytes]:
    end = time.monotonic() + _LONGEST_STREAM
    last = False
    while True:
        if frames := viewer.take():
            yield b"".join(map(event, frames))
        if last:
            return
        await anyio.sleep(INTERVAL)
        last = feed.over or time.monotonic() >= end  # with the frames that are due by now
