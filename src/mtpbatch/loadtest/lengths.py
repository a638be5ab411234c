"""How many tokens prompts and answers have: distributions, and how they are written. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.in_words import shown
from mtpbatch.testing.workload import Fixed, Lengths, LogNormal, Uniform

_LONGEST: Final = 1 << 20
"""No drawn length is greater: a log-normal one has no end of its own."""


class Normal(Struct, frozen=True):
    """Around ``mean`` tokens, with a standard deviation; never fewer than 1."""

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not (self.mean >= 1 and self.deviation >= 0):
            raise InvalidParameterError(
                "mean", f"must be at least 1, with a deviation from 0 on; got {self!r}"
            )

    def __call__(self, chance: random.Random) -> int:
        """Draw a length."""
        return max(1, min(_LONGEST, round(chance.gauss(self.mean, self.deviation))))


def _normal(mean: str, deviation: str) -> Lengths:
    return Normal(float(mean), float(deviation))


def _lognormal(median: str, sigma: str, most: str = str(_LONGEST)) -> Lengths:
    return LogNormal(float(median), float(sigma), int(most))


_BY_NAME: Final[dict[str, Callable[..., Lengths]]] = {"normal": _normal, "lognormal": _lognormal}


def lengths(parameter: str, text: str) -> Lengths:
    """The distribution of "128", "64..256", "normal:200,50" or "lognormal:200,0.7[,4096]".

    Those are a fixed length; all from 64 to 256 alike; mean and standard deviation; median,
    standard deviation of the logarithm, and the greatest one.
    """
    name, colon, figures = text.partition(":")
    low, dots, high = text.partition("..")
    try:
        if colon:
            return _BY_NAME[name](*figures.split(","))
        return Uniform(int(low), int(high)) if dots else Fixed(int(text))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InvalidParameterError(
            parameter,
            f"must be a length from 1 on, such as 128, or 64..256, normal:MEAN,DEVIATION or "
            f"lognormal:MEDIAN,SIGMA[,MOST]; got {shown(text)}",
        ) from None
