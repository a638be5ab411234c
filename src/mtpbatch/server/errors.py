"""What goes wrong, in OpenAI's words: a status, and an error object that names the field.

Clients see no traceback, and nothing of what the server is made of: what is no fault of theirs
and not foreseen is told as a request id, under which the log has the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import (
    ContextError,
    EngineClosedError,
    EngineDeadError,
    EngineOverloaded,
    EngineStalledError,
    GrammarError,
    InvalidParameterError,
    InvalidRequestError,
    NativeDiedError,
    PromptTooLongError,
)
from mtpbatch.restarts import FIRST

_PLACE = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetails(Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field of the request that is wrong, if it is one."""
    code: str | None


class ErrorBody(Struct, frozen=True):
    """The body of every answer that is none."""

    error: ErrorDetails


class ApiError(Exception):
    """An answer that is none.

    ``retry_after`` is in seconds. ``close``: the rest of the request is not waited for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.close = close

    @property
    def body(self) -> bytes:
        """The error object, as JSON."""
        kind = _KINDS.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        details = ErrorDetails(str(self), kind, self.param, self.code)
        return msgspec.json.encode(ErrorBody(details))

    @property
    def headers(self) -> dict[str, str]:
        """What else a client should know."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return headers


def api_error(
    error: Exception, *, request_id: str, retry_after: Callable[[EngineOverloaded], int]
) -> ApiError:
    """What a client is told of any error. ``retry_after``: in how many seconds to try again."""
    match error:
        case ApiError():
            return error
        case msgspec.ValidationError():
            return _invalid(error)
        case msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return ApiError(400, f"the body is no JSON that can be read: {error}")
        case PromptTooLongError():
            return ApiError(400, str(error), param=error.parameter, code="context_length_exceeded")
        case InvalidParameterError():
            return ApiError(400, str(error), param=error.parameter, code="invalid_value")
        case InvalidRequestError() | GrammarError():
            return ApiError(400, str(error))
        case EngineOverloaded():
            seconds = retry_after(error)
            return ApiError(
                429,
                f"the server is full: {error.running} requests run and {error.waiting} wait, with "
                f"prompts of {error.waiting_tokens} tokens; try again in {seconds} s",
                code="engine_overloaded",
                retry_after=seconds,
            )
        case EngineClosedError():
            return ApiError(503, "the server is shutting down", code="engine_closed")
        case EngineDeadError():
            return ApiError(503, "the engine has died; the server restarts", code="engine_dead")
        case EngineStalledError():
            return ApiError(503, str(error), code="engine_stalled")
        case NativeDiedError():
            return ApiError(
                503,
                "the process that runs the model died; another one is started: try again",
                code="engine_restarting",
                retry_after=round(FIRST),
            )
        case ContextError():
            return ApiError(501, str(error), code="not_possible")
        case _:
            return ApiError(
                500,
                f"the server failed; its log says more under the request id {request_id}",
                code="internal_error",
            )


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors of the engine's parameters name the fields that clients know instead."""
    try:
        yield
    except InvalidParameterError as error:
        name = names.get(error.parameter)
        if name is not None:
            message = f"{name}: {str(error).removeprefix(f'{error.parameter}: ')}"
            error.args = (message,)
            error.parameter = name
        raise


def _invalid(error: msgspec.ValidationError) -> ApiError:
    """msgspec's words, with the field first."""
    reason = str(error)
    place = _PLACE.search(reason)
    field = place[1] if place else ""
    reason = _PLACE.sub("", reason)
    for pattern, words in ((_UNKNOWN, "is not known"), (_MISSING, "is missing")):
        if found := pattern.fullmatch(reason):
            field, reason = f"{field}.{found[1]}".removeprefix("."), words
    reason = reason.replace("`", "").replace("Expected ", "must be ")
    reason = reason[:1].lower() + reason[1:]
    if not field:
        return ApiError(400, f"the body: {reason}")
    return ApiError(400, f"{field}: {reason}", param=field, code="invalid_value")
