"""Who is next. Pure: the order of the requests that wait for a sequence id.

Every request has a time at which it is due, fixed when it is submitted, and whoever is due first
is next::

    due = submitted + min(deadline, PATIENCE + priority * AGEING)

- One level of priority weighs as much as ``AGEING`` seconds of waiting. So a request of low
  priority gains on those that come after it, and nothing needs to be computed while it waits.
- A request without a deadline is taken to have ``PATIENCE`` seconds, more or less by its priority.
  So a deadline can only bring a request forward, and while requests without one wait less than
  ``PATIENCE``, those with one wait less than their deadlines.
- Equal priority and no deadline: first come, first served.

Nobody waits forever. From ``submitted`` to ``due`` it is the same time for all, but for at most
``2 * MAX_PRIORITY * AGEING`` seconds, so only requests that come at most so much later can go
before one that waits. Those are a finite number; each of them goes before it once, and ends at its
token limit at the latest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Set
from typing import Final, TypeAlias

from mtpbatch.exceptions import InternalError
from mtpbatch.sequence import Sequence

AGEING: Final = 10.0  # seconds
PATIENCE: Final = 60.0  # seconds

_Entry: TypeAlias = tuple[float, int, Sequence]  # when it is due, its ticket, itself


def due(sequence: Sequence) -> float:
    """When it should have come to its turn, in seconds of the clock that it was submitted by."""
    params = sequence.params
    patience = PATIENCE + params.priority * AGEING
    if params.deadline is not None:
        patience = min(patience, params.deadline)
    return sequence.submitted + patience


class WaitingQueue:
    """Requests by when they are due; equal ones by their tickets.

    One that is put back, after a pause, stands where it stood before. One that waits for
    something else as well is set aside until that has come, and others go before it.

    State: ``_entries`` holds the entry of each request that waits, by request id; ``_aside`` says
    what those wait for who are set aside, and ``_by_reason`` has their ids by that. ``_heap`` has
    the entries of the others, and some of requests that have left or were set aside; the first is
    of one whose turn it can be, and at most half of them are not. So :meth:`push`, :meth:`pop`,
    :meth:`remove`, and :meth:`set_aside` with its part of :meth:`bring_back`, taken together, take
    O(log n) each.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._heap: list[_Entry] = []
        self._aside: dict[str, int] = {}
        self._by_reason: dict[int, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (sequence for _, _, sequence in self._entries.values())

    @property
    def first(self) -> Sequence | None:
        """Who is next; ``None`` if nobody is."""
        return self._heap[0][2] if self._heap else None

    def push(self, sequence: Sequence) -> None:
        """Let a request wait, for the first time or again. Its id must not be waiting."""
        if sequence.request_id in self._entries:
            raise InternalError(f"{sequence!r} waits already")
        entry = (due(sequence), sequence.ticket, sequence)
        self._entries[sequence.request_id] = entry
        heapq.heappush(self._heap, entry)

    def pop(self) -> Sequence:
        """Take out who is next. There must be one."""
        _, _, sequence = heapq.heappop(self._heap)
        del self._entries[sequence.request_id]
        self._tidy()
        return sequence

    def remove(self, request_id: str) -> Sequence | None:
        """Take a request out; ``None`` if it does not wait."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        reason = self._aside.pop(request_id, None)
        if reason is not None:
            del self._by_reason[reason][request_id]
        self._tidy()
        return entry[2]

    def set_aside(self, reason: int) -> None:
        """Let others go before who is next, until :meth:`bring_back` with that reason."""
        _, _, sequence = heapq.heappop(self._heap)
        self._aside[sequence.request_id] = reason
        self._by_reason.setdefault(reason, {})[sequence.request_id] = None
        self._tidy()

    def bring_back(self, reason: int) -> None:
        """What some were set aside for has come: they stand where they stood before."""
        for request_id in self._by_reason.pop(reason, ()):
            del self._aside[request_id]
            heapq.heappush(self._heap, self._entries[request_id])

    @property
    def reasons(self) -> Set[int]:
        """Those for which requests are, or were, set aside."""
        return self._by_reason.keys()

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks its rules. Looks at everything."""
        heap = self._heap
        live = [entry for entry in heap if self._waits(entry)]
        parents = [heap[(i - 1) // 2] for i in range(1, len(heap))]
        for rule, words in (
            (
                not any(child < p for p, child in zip(parents, heap[1:], strict=True)),
                "the heap is in order",
            ),
            (
                len(live) + len(self._aside) == len(self._entries),
                "each request that waits has one entry, or is set aside",
            ),
            (
                {id_: r for r, ids in self._by_reason.items() for id_ in ids} == self._aside,
                "who is set aside is so for one reason",
            ),
            (not heap or self._waits(heap[0]), "the first entry is of one that waits"),
            (len(heap) <= 2 * len(live), "at most half of the entries are of no use"),
            (all(entry[0] == due(entry[2]) for entry in live), "what is due stays"),
        ):
            if not rule:
                raise InternalError(f"waiting queue: it does not hold that {words}")

    def _waits(self, entry: _Entry) -> bool:
        request_id = entry[2].request_id
        return self._entries.get(request_id) is entry and request_id not in self._aside

    def _tidy(self) -> None:
        """Drop entries of requests that have left: the first, and all if they are too many."""
        while self._heap and not self._waits(self._heap[0]):
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * (len(self._entries) - len(self._aside)):
            self._heap = [entry for entry in self._heap if self._waits(entry)]
            heapq.heapify(self._heap)
