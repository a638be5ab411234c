"""The library's log: structured events on the standard logger ``mtpbatch``.

Silent until the app configures logging, and independent of how it configures structlog. Events
carry the context variables of structlog that are bound where they happen; events about a request
those of whoever submitted it, and its ``request_id``.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping
from contextvars import Context, copy_context
from typing import Any, NamedTuple

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.typing import EventDict, WrappedLogger

from mtpbatch.exceptions import InvalidParameterError


def _render(
    logger: WrappedLogger, method: str, event: EventDict
) -> tuple[tuple[str], dict[str, Any]]:
    exc_info = event.pop("exc_info", None)
    words = [event.pop("event"), *(f"{name}={value!r}" for name, value in event.items())]
    return (" ".join(words),), {"exc_info": exc_info}


class _Logger(structlog.stdlib.BoundLogger):
    """What the app's handlers and filters raise, and values of its own that cannot be shown, ends
    neither the engine's thread nor a request: it is told as :mod:`logging` tells its errors."""

    def _proxy_to_logger(
        self, method_name: str, event: str | None = None, *event_args: str, **event_kw: Any
    ) -> Any:
        try:
            return super()._proxy_to_logger(method_name, event, *event_args, **event_kw)
        except Exception:
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()


_standard = logging.getLogger("mtpbatch")
_standard.addHandler(logging.NullHandler())

log: _Logger = structlog.wrap_logger(
    _standard,
    wrapper_class=_Logger,
    processors=[structlog.stdlib.filter_by_level, merge_contextvars, _render],
)


class RequestLog(NamedTuple):
    """Where events about one request go. They cost next to nothing while nobody listens."""

    request_id: str
    metadata: Mapping[str, object]
    """The request's own, which stands in its events."""
    context: Context
    """Of whoever submitted it."""

    @classmethod
    def of(cls, request_id: str, metadata: Mapping[str, object]) -> RequestLog:
        """For a request that is being submitted here."""
        return cls(request_id, metadata, copy_context())

    def debug(self, event: str, **values: Any) -> None:
        """Log an event. Calls must not overlap."""
        if _standard.isEnabledFor(logging.DEBUG):
            self.context.run(self._debug, event, values)

    def _debug(self, event: str, values: dict[str, Any]) -> None:
        own = {"metadata": self.metadata} if self.metadata else {}
        with bound_contextvars(request_id=self.request_id, **own):
            log.debug(event, **values)


class _Console(logging.StreamHandler[Any]):
    """The one that :func:`log_to_console` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))


def log_to_console(level: str = "INFO") -> None:
    """Write the library's events of ``level`` and above to stderr, one per line.

    For scripts, which have no logging set up. Levels are those of :mod:`logging`: "DEBUG" tells of
    each request as well. Called again, it changes the level.

    Raises :class:`~mtpbatch.InvalidParameterError` if there is no such level.

    ::

        mtpbatch.log_to_console("WARNING")
    """
    known = logging.getLevelNamesMapping()
    if level not in known:
        raise InvalidParameterError("level", f"must be one of {', '.join(known)}, got {level!r}")
    _standard.setLevel(level)
    if not any(isinstance(handler, _Console) for handler in _standard.handlers):
        _standard.addHandler(_Console())
