"""What is asked of a simulated engine: which requests, how many, and when they come."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import N_CONFIDENCES, SamplingParams, parse

Lengths: TypeAlias = Callable[[random.Random], int]
"""Draws how many tokens a prompt or an answer has, at least 1."""


def _check(rule: bool, parameter: str, words: str, value: object) -> None:
    if not rule:
        raise InvalidParameterError(parameter, f"{words}, got {value!r}")


# ------------------------------------------------------------------------------- lengths


class Fixed(Struct, frozen=True):
    """Always ``n`` tokens.

    ::

        kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
    """

    n: int
    """Tokens; at least 1."""

    def __post_init__(self) -> None:
        _check(self.n >= 1, "n", "must be at least 1", self.n)

    def __call__(self, chance: random.Random) -> int:
        """Draw a length."""
        return self.n


class Uniform(Struct, frozen=True):
    """From ``low`` to ``high`` tokens, all equally probable.

    ::

        kind = RequestKind(prompt=Uniform(50, 200), answer=Fixed(100))
    """

    low: int
    """The fewest tokens; at least 1."""
    high: int
    """The most tokens."""

    def __post_init__(self) -> None:
        _check(1 <= self.low <= self.high, "low", f"must be from 1 to high={self.high}", self.low)

    def __call__(self, chance: random.Random) -> int:
        """Draw a length."""
        return self.low + int(chance.random() * (self.high - self.low + 1))


class LogNormal(Struct, frozen=True):
    """Mostly short and now and then long, as prompts and answers are: never beyond ``most``.

    ::

        kind = RequestKind(prompt=LogNormal(200, 1.0, most=2000), answer=Fixed(100))
    """

    median: float
    """Tokens that half of them reach; above 0."""
    sigma: float
    """Standard deviation of the logarithm: two thirds lie within a factor of e**sigma."""
    most: int
    """Tokens; longer ones are cut to it."""

    def __post_init__(self) -> None:
        _check(self.median > 0, "median", "must be positive", self.median)
        _check(self.sigma >= 0, "sigma", "must not be negative", self.sigma)
        _check(self.most >= 1, "most", "must be at least 1", self.most)

    def __call__(self, chance: random.Random) -> int:
        """Draw a length."""
        drawn = self.median * math.exp(self.sigma * chance.gauss(0.0, 1.0))
        return max(1, min(self.most, round(drawn)))


# -------------------------------------------------------------------------------- drafts

N_LUCK: Final = 1 << 16  # a request reads its luck from a table, from a place of its own on


class Drafts(Struct, frozen=True):
    """How well the MTP head predicts a kind of text.

    Each position of a text has a chance that a draft for it is right, which is what the head is
    confident of as well. Whether it is right is settled by the position, not by when it is
    drafted: however drafts are chosen, they meet the same luck.

    ::

        prose = RequestKind(prompt=Fixed(200), answer=Fixed(100), drafts=Drafts(acceptance=0.6))
        code = RequestKind(prompt=Fixed(200), answer=Fixed(100), drafts=Drafts(acceptance=0.9))
    """

    acceptance: float = 0.75
    """The mean chance of a step's first draft."""
    spread: float = 0.5
    """How much positions differ. 0: all have the same chance; 1: each is sure, one way or the
    other. (Beta distributed, with this share of the greatest possible variance.)"""
    falloff: float = 0.9
    """What is left of a position's chance with each draft of the same step before it."""

    def __post_init__(self) -> None:
        for name in ("acceptance", "spread", "falloff"):
            value = getattr(self, name)
            _check(0 <= value <= 1, name, "must be from 0 to 1", value)


class Luck:
    """A :class:`Drafts`, drawn: chances and outcomes of ``N_LUCK`` positions.

    The draft at depth d (0 first) of position i is right if ``needs[i] < left[d]``.
    """

    def __init__(self, drafts: Drafts) -> None:
        chance = random.Random("luck")
        self._chances = [_beta(drafts, chance) for _ in range(N_LUCK)]
        self.needs = [_ratio(chance.random(), p) for p in self._chances]
        self.left = [drafts.falloff**depth for depth in range(33)]
        self._confidences: dict[int, bytes] = {}

    def confidences(self, depth: int) -> bytes:
        """The class of the head's confidence for each position, at a depth."""
        if depth not in self._confidences:
            left = self.left[depth]
            self._confidences[depth] = bytes(_confidence(left * p) for p in self._chances)
        return self._confidences[depth]


def _beta(drafts: Drafts, chance: random.Random) -> float:
    mean, spread = drafts.acceptance, drafts.spread
    if spread == 0 or mean in (0, 1):
        return mean
    if spread == 1:
        return float(chance.random() < mean)
    n = 1 / spread - 1
    return chance.betavariate(mean * n, (1 - mean) * n)


def _ratio(drawn: float, chance: float) -> float:
    return drawn / chance if chance > 0 else math.inf


def _confidence(probability: float) -> int:
    doubt = max(1 - probability, 1e-6)
    return min(N_CONFIDENCES - 1, int(-2 * math.log2(doubt)))


@functools.lru_cache(maxsize=16)
def luck_of(drafts: Drafts) -> Luck:
    """The drawn tables, which take a moment to make. Requests start at places of their own."""
    return Luck(drafts)


# -------------------------------------------------------------------------------- requests


class RequestKind(Struct, frozen=True, kw_only=True):
    """Requests that are alike.

    ::

        chats = RequestKind(prompt=Uniform(20, 200), answer=Fixed(100), weight=9, streaming=True)
        batches = RequestKind(prompt=Fixed(300), answer=Fixed(20), priority=-1)
    """

    prompt: Lengths
    """Tokens of their prompts."""
    answer: Lengths
    """A request ends when its answer has so many tokens, or its context is full."""
    drafts: Drafts = Drafts()
    """How well their text is drafted."""
    weight: float = 1.0
    """How often it comes, beside the other kinds."""
    temperature: float = 0.0
    """Only says by which chances a scheduler picks its drafts: see ``mtpbatch.types.Terms``."""
    priority: int = 0
    """As that of :class:`~mtpbatch.SamplingParams`."""
    deadline: float | None = None
    """Likewise: seconds from submission."""
    streaming: bool = False
    """Whether its tokens are waited for step by step."""

    def __post_init__(self) -> None:
        _check(self.weight > 0, "weight", "must be positive", self.weight)
        asked = ("temperature", "priority", "deadline")
        parse(SamplingParams, {name: getattr(self, name) for name in asked})


# -------------------------------------------------------------------------------- arrivals


class Profile(Struct, frozen=True):
    """A level over time: pieces of ``(seconds, level)``, one after another, again and again.

    ::

        day = Profile(((8 * 3600, 0.5), (16 * 3600, 4.0)))
        arrivals = OpenLoop(day)  # of requests a second: few at night
    """

    pieces: tuple[tuple[float, float], ...]
    """Each of so many seconds, above 0, at a level of at least 0."""

    def __post_init__(self) -> None:
        right = all(seconds > 0 and level >= 0 for seconds, level in self.pieces)
        right = right and any(level > 0 for _, level in self.pieces)
        _check(right, "pieces", "need seconds > 0 and levels >= 0, not all 0", self.pieces)

    def spans(self) -> Iterator[tuple[float, float, float]]:
        """Begin, end and level of each piece in turn, without end."""
        begin = 0.0
        for seconds, level in itertools.cycle(self.pieces):
            yield begin, begin + seconds, level
            begin += seconds


def steady(level: float) -> Profile:
    """Always the same.

    ::

        arrivals = OpenLoop(steady(2.0))  # requests a second
    """
    return Profile(((math.inf, level),))


def ramp(low: int, high: int, seconds: float) -> Profile:
    """From ``low`` to ``high`` and back in steps of 1, within ``seconds``.

    ::

        arrivals = ClosedLoop(ramp(1, 16, 600.0))  # clients
    """
    levels = [*range(low, high), *range(high, low - 1, -1)]
    return Profile(tuple((seconds / len(levels), float(level)) for level in levels))


def square_wave(low: float, high: float, period: float) -> Profile:
    """``low`` for half a period, then ``high``.

    ::

        arrivals = OpenLoop(square_wave(0.5, 4.0, period=60.0))  # requests a second
    """
    return Profile(((period / 2, low), (period / 2, high)))


class OpenLoop(Struct, frozen=True):
    """Requests come whether or not earlier ones have ended, so many a second.

    ::

        arrivals = OpenLoop(steady(2.0), variation=3.0)  # 2 requests a second, in bursts
    """

    rate: Profile
    """Requests a second."""
    variation: float = 1.0
    """Of the gaps between them, standard deviation / mean. 0: evenly; 1: at random (Poisson);
    more: in bursts (gamma distributed gaps)."""

    def __post_init__(self) -> None:
        _check(self.variation >= 0, "variation", "must not be negative", self.variation)

    def times(self, chance: random.Random) -> Iterator[float]:
        """When they come, in order."""
        spans = self.rate.spans()
        now, end, rate = next(spans)
        while True:
            gap = self._gap(chance)  # in requests: the rate, integrated
            while gap >= rate * (end - now):
                gap -= rate * (end - now)
                now, end, rate = next(spans)
            now += gap / rate
            yield now

    def _gap(self, chance: random.Random) -> float:
        if self.variation == 0:
            return 1.0
        square = self.variation**2
        return chance.gammavariate(1 / square, square)


class ClosedLoop(Struct, frozen=True):
    """Clients that each send their next request when their last one ends.

    ::

        arrivals = ClosedLoop(steady(8))  # clients
    """

    clients: Profile
    """How many there are; while they become fewer, some leave when a request ends."""
