"""Quantities as they are written on a command line: durations, ranges, SLOs. Pure."""

from __future__ import annotations

import math
import re
from typing import Final, get_args

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.in_words import shown
from mtpbatch.loadtest.records import Slo, SloName

_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"([0-9.]+(?:e-?[0-9]+)?)\s*([a-z]*)")
_SLO_NAMES: Final[tuple[SloName, ...]] = get_args(SloName)


def duration(parameter: str, text: str) -> float:
    """Seconds of "500ms", "2s", "1.5m", "1h"; a number alone is seconds. Above 0."""
    match = _DURATION.fullmatch(text.strip())
    try:
        if match is None or match[2] not in _SECONDS:
            raise ValueError
        seconds = float(match[1]) * _SECONDS[match[2]]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidParameterError(
            parameter, f"must be a time such as 500ms, 2s or 1.5m, above 0; got {shown(text)}"
        )
    return seconds


def span(parameter: str, text: str) -> tuple[float, float]:
    """Both ends of "2..20"; of "2", twice the same. Numbers from 0 on, the greater one above 0."""
    low, dots, high = text.partition("..")
    try:
        ends = float(low), float(high if dots else low)
    except ValueError:
        ends = math.nan, math.nan
    if not (all(end >= 0 for end in ends) and max(ends) > 0):  # nor NaN
        raise InvalidParameterError(
            parameter, f"must be a number above 0, or a range such as 2..20; got {shown(text)}"
        )
    return ends


def slo(parameter: str, text: str) -> Slo:
    """The limits of "ttft=500ms,tpot=50ms"."""
    limits: Slo = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        known = next((each for each in _SLO_NAMES if each == name.strip().lower()), None)
        if known is None:
            raise InvalidParameterError(
                parameter,
                f"must be limits for {', '.join(_SLO_NAMES)}, such as ttft=500ms,tpot=50ms; "
                f"got {shown(text)}",
            )
        limits[known] = duration(parameter, limit)
    return limits
