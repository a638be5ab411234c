"""When requests come. Pure, and the same for the same seed.

Open loop: at times of their own, however the server fares. Closed loop: so many clients, each of
which sends its next request when its last one has ended.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Final, TypeAlias

from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError

_ROUNDING: Final = 1e-6  # of a client: whoever joins at a moment does not leave at the same one


class Level(Struct, frozen=True):
    """A number that goes from ``begin`` to ``end`` in a straight line, and then stays."""

    begin: float
    end: float
    seconds: float = 0.0
    """How long that takes. 0: it is ``end`` from the start."""

    def __post_init__(self) -> None:
        if not (min(self.begin, self.end, self.seconds) >= 0 and max(self.begin, self.end) > 0):
            raise InvalidParameterError("level", f"must be above 0 somewhere; got {self!r}")

    def at(self, time: float) -> float:
        """The level at a time."""
        if time >= self.seconds:
            return self.end
        return self.begin + (self.end - self.begin) * time / self.seconds

    def reached(self, level: float) -> float:
        """The first time at which it is at least ``level``; infinity if it never is."""
        if self.at(0.0) >= level:
            return 0.0
        if self.end < level:
            return math.inf
        return self.seconds * (level - self.begin) / (self.end - self.begin)

    def filled(self, amount: float) -> float:
        """When the level, added up over time, comes to ``amount``; infinity if it never does."""
        of_ramp = (self.begin + self.end) / 2 * self.seconds
        if amount >= of_ramp:
            return self.seconds + (amount - of_ramp) / self.end if self.end else math.inf
        if amount <= 0:
            return 0.0
        slope = (self.end - self.begin) / self.seconds
        return 2 * amount / (self.begin + math.sqrt(max(0.0, self.begin**2 + 2 * slope * amount)))


class OpenLoop(Struct, frozen=True):
    """Requests come at a rate, whether or not earlier ones have ended."""

    rate: Level
    """Requests per second. Infinity: all at once."""
    burstiness: float = 1.0
    """The shape of the gamma distribution of the gaps, as in ``vllm bench``: 1 is a Poisson
    process, less comes in bursts, infinity is one after another evenly."""
    together: int = 1
    """How many come at the same moment, at the same rate altogether."""

    def __post_init__(self) -> None:
        if not self.burstiness > 0:
            raise InvalidParameterError("burstiness", f"must be above 0, got {self.burstiness}")
        if self.together < 1:
            raise InvalidParameterError("burst_size", f"must be at least 1, got {self.together}")

    def times(self, chance: random.Random) -> Iterator[float]:
        """When they come, in order, without end while the rate is above 0."""
        if self.rate.end == math.inf:
            yield from itertools.repeat(0.0)
        due = 0.0  # in requests: the rate, added up
        while (now := self.rate.filled(due)) < math.inf:
            yield from itertools.repeat(now, self.together)
            due += self.together * self._gap(chance)

    def _gap(self, chance: random.Random) -> float:
        if self.burstiness == math.inf:
            return 1.0
        return chance.gammavariate(self.burstiness, 1 / self.burstiness)


class Replay(Struct, frozen=True):
    """Requests come when others once did."""

    moments: tuple[float, ...]
    """Seconds from the first one on, in order."""

    def times(self, chance: random.Random) -> Iterator[float]:
        """When they come, in order."""
        yield from self.moments


class ClosedLoop(Struct, frozen=True):
    """So many clients, each with one request at a time."""

    clients: Level

    @property
    def most(self) -> int:
        """Clients that there are at some time."""
        return math.floor(max(self.clients.at(0.0), self.clients.end))

    def joins(self, client: int) -> float:
        """When a client, the first of which is 0, sends its first request."""
        return self.clients.reached(client + 1)

    def leaves(self, client: int, time: float) -> bool:
        """Whether a client that has joined sends no more from this time on."""
        return client + 1 > self.clients.at(time) + _ROUNDING


Arrivals: TypeAlias = OpenLoop | Replay | ClosedLoop
