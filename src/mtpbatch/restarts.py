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
LONGEST_GAP: Final = 2.0  # seconds


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

    def died(self, now: float, silence: float = 0.0) -> float | None:
        """It has died, or could not be started: seconds until the next try; ``None``: no more.

        In its last ``silence`` seconds it was stuck, and not well.
        """
        if self._up is not None and now - silence - self._up >= WELL:
            self._n_deaths = 0
        self._up = None
        self._n_deaths += 1
        if self._n_deaths > MOST:
            return None
        return FIRST * 2.0 ** (self._n_deaths - 1)


class Watchdog:
    """Adds up how long a native part has been silent although something is expected of it.

    A look much later than the one before says that the whole program stood still, as when its
    container was frozen. That is no fault of the native part, which stood still as well: no more
    than ``LONGEST_GAP`` seconds of it count.

    State: ``silence``, the seconds; ``_last`` is when it looked last, ``None`` before that.
    """

    def __init__(self) -> None:
        self.silence = 0.0
        self._last: float | None = None

    def look(self, now: float, *, silent: bool) -> None:
        """Whether it has been silent since the last look, with something expected of it."""
        gap = 0.0 if self._last is None else min(now - self._last, LONGEST_GAP)
        self._last = now
        self.silence = self.silence + gap if silent else 0.0
