"""The library's log: structured events on the standard logger ``mtpbatch``.

Silent until the app configures logging, and independent of how it configures structlog.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger


def _render(
    logger: WrappedLogger, method: str, event: EventDict
) -> tuple[tuple[str], dict[str, Any]]:
    exc_info = event.pop("exc_info", None)
    words = [event.pop("event"), *(f"{name}={value!r}" for name, value in event.items())]
    return (" ".join(words),), {"exc_info": exc_info}


_standard = logging.getLogger("mtpbatch")
_standard.addHandler(logging.NullHandler())

log: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _standard,
    wrapper_class=structlog.stdlib.BoundLogger,
    processors=[structlog.stdlib.filter_by_level, _render],
)
