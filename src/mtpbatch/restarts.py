"""When a native part is taken for stuck, and when one that died is started again.

Pure: time is a number that callers hand in.

After a death the first restart waits ``FIRST`` seconds, and each further one twice as long as the
one before it. Who has run for ``WELL`` seconds since has recovered, and the next death is a first
one again. More than ``MOST`` deaths in a row are too many: something kills it each time.
"""

from __future__ import annotations

from typing import Final

FIRST: Final = 1.0  # seconds
MOST: Final = 5
WELL: Final = 60.0  # seconds
LONGEST_LOOK: Final = 2.0  # seconds


class Restarts:
    """Counts deaths in a row.

    State: ``_n_deaths`` in the row, and when it came up after the last, ``None`` until it has.
    """

    def __init__(self) -> None:
        self._n_deaths = 0
        self._up: float | None = None

    def up(self, now: float) -> None:
        """It runs again."""
        self._up = now

    def died(self, now: float) -> float | None:
        """It has died, or could not be started: seconds until the next try; ``None``: no more."""
        if self._up is not None and now - self._up >= WELL:
            self._n_deaths = 0
        self._up = None
        self._n_deaths += 1
        if self._n_deaths > MOST:
            return None
        return FIRST * 2.0 ** (self._n_deaths - 1)


class Watchdog:
    """Adds up how long a native part has given no result although it has work.

    A look much later than the one before says that the whole program stood still, as when its
    container was frozen. That is no fault of the native part, which stood still as well: no more
    than ``LONGEST_LOOK`` seconds of it count.

    State: ``_last`` is when it looked last, ``None`` before the first time; ``_silence`` the
    seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._last: float | None = None
        self._silence = 0.0

    def look(self, now: float, *, silent: bool) -> bool:
        """Whether it is taken for stuck. ``silent``: it has work, and has given nothing."""
        since = 0.0 if self._last is None else min(now - self._last, LONGEST_LOOK)
        self._last = now
        self._silence = self._silence + since if silent else 0.0
        return self._silence > self._timeout
