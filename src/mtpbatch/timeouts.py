"""When requests are given up. Pure: time is a number that callers hand in."""

from __future__ import annotations

import heapq
import math
from typing import TypeAlias

from mtpbatch.exceptions import InternalError
from mtpbatch.types import SamplingParams

_Entry: TypeAlias = tuple[float, int, str]  # when it is given up, its turn among equals, its id


class Timeouts:
    """The times at which requests end, unless they have ended before or, for some, begun.

    State: ``_entries`` has, by request id, the next time of each request that has one, and
    ``_later`` the time that counts once it has begun, where that is another. ``_heap`` has all of
    these entries, and some that count no more: at most as many, and never the first.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._later: dict[str, float] = {}
        self._heap: list[_Entry] = []
        self._n_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def next(self) -> float:
        """The first time at which somebody is given up; infinite if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, request_id: str, params: SamplingParams, submitted: float) -> None:
        """Take note of a request that has just been submitted. Its id must not be known."""
        if request_id in self._entries:
            raise InternalError(f"request {request_id} has its timeouts already")
        total = math.inf if params.timeout is None else submitted + params.timeout
        queue = math.inf if params.queue_timeout is None else submitted + params.queue_timeout
        if queue < total:
            self._later[request_id] = total
        self._push(request_id, min(queue, total))

    def begin(self, request_id: str) -> None:
        """It has a sequence: from here on only its whole time counts."""
        total = self._later.pop(request_id, None)
        if total is not None:
            del self._entries[request_id]
            self._push(request_id, total)
            self._tidy()

    def remove(self, request_id: str) -> None:
        """It has ended."""
        self._later.pop(request_id, None)
        if self._entries.pop(request_id, None) is not None:
            self._tidy()

    def expired(self, now: float) -> list[str]:
        """Those whose time has come, first things first. They are removed."""
        expired = []
        while self.next <= now:
            expired.append(self._heap[0][2])
            self.remove(expired[-1])
        return expired

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks its rules. Looks at everything."""
        live = [entry for entry in self._heap if self._counts(entry)]
        for rule, words in (
            (sorted(live) == sorted(self._entries.values()), "each time is in the heap once"),
            (not self._heap or self._heap[0] == min(live, default=None), "the first one is first"),
            (len(self._heap) <= 2 * len(live), "at most half of the entries are of no use"),
            (self._later.keys() <= self._entries.keys(), "who has a later time has one before"),
        ):
            if not rule:
                raise InternalError(f"timeouts: it does not hold that {words}")

    def _push(self, request_id: str, at: float) -> None:
        if at == math.inf:
            return
        self._n_pushed += 1
        entry = self._entries[request_id] = (at, self._n_pushed, request_id)
        heapq.heappush(self._heap, entry)

    def _counts(self, entry: _Entry) -> bool:
        return self._entries.get(entry[2]) is entry

    def _tidy(self) -> None:
        """Drop entries that count no more: the first, and all if they are too many."""
        while self._heap and not self._counts(self._heap[0]):
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * len(self._entries):
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapq.heapify(self._heap)
