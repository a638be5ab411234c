"""Who may ask, how much, and when to try again."""

from __future__ import annotations

import hmac
import math
from collections.abc import Sequence
from typing import Final

import anyio
from starlette.types import Receive, Scope

from mtpbatch.exceptions import EngineOverloaded
from mtpbatch.server.config import ServerConfig
from mtpbatch.server.errors import ApiError
from mtpbatch.types import Completion

_LONGEST_WAIT: Final = 60  # seconds: who is told more gives up
_WEIGHT: Final = 0.1  # of the last request in the mean


class ClientGone(Exception):
    """Nobody waits for an answer any more."""


class ApiKeys:
    """The keys of those who may ask; with none, everybody may."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, scope: Scope) -> None:
        """Raise unless the request carries one of the keys.

        All keys are compared, and each in a time that tells nothing of how much of it is right.
        """
        if not self._keys:
            return
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )


async def read_json(scope: Scope, receive: Receive, config: ServerConfig) -> bytes:
    """The body of a request that says it is JSON.

    Raises :class:`ApiError` for another type (415), and what :func:`read_body` raises.
    """
    kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "the body must be JSON: send 'Content-Type: application/json'")
    told = _header(scope, b"content-length")
    if told.isdigit() and int(told) > config.max_body:
        raise _too_large(config.max_body)
    return await read_body(receive, config.max_body, config.body_timeout)


async def read_body(receive: Receive, max_body: int, body_timeout: float) -> bytes:
    """The body of a request.

    Raises :class:`ApiError` if it has more than ``max_body`` bytes (413), or takes longer than
    ``body_timeout`` seconds (408), and :class:`ClientGone` if the client leaves meanwhile.
    """
    body = bytearray()
    with anyio.move_on_after(body_timeout):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > max_body:
                raise _too_large(max_body)
            if not message.get("more_body", False):
                return bytes(body)
    raise ApiError(
        408,
        f"after {body_timeout:g} s the body was not all there; {len(body)} bytes had come",
        code="body_too_slow",
        close=True,
    )


def _too_large(max_body: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {max_body} bytes, the most that this server takes",
        code="body_too_large",
    )


class Pace:
    """How soon a full engine has room again, by how long its last requests took."""

    def __init__(self) -> None:
        self._seconds = 1.0

    def learn(self, done: Completion) -> None:
        """A request has ended."""
        taken = done.timings.total - done.timings.queued
        self._seconds += _WEIGHT * (taken - self._seconds)

    def retry_after(self, error: EngineOverloaded) -> int:
        """Whole seconds in which as many requests end as wait now, and at least one."""
        rounds = max(1, error.waiting) / max(1, error.running)
        return min(_LONGEST_WAIT, max(1, math.ceil(self._seconds * rounds)))


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
