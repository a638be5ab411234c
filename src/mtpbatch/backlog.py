"""How many requests may wait for a sequence, and the line of those that find no room. Pure.

::

    arrives ── tokenised ──▶ enters ── begins ──▶ leaves
                   │            ▲        (a sequence id)
                   └─ in line ──┘

- A request enters when its prompt is tokenised: whether there is room and that it takes it is one
  act, with the prompt's real length.
- Who finds a sequence free need not wait, and always enters, however long its prompt is. So as many
  requests as there are sequences are there in any case, and ``max_waiting`` more may wait.
- Of those that have not begun, the prompts have at most ``max_waiting_tokens`` tokens together.
- Who finds no room stands in line, or goes away. Nobody overtakes who stands in line, so that a
  long prompt gets its room, at the latest when a sequence is free.
"""

from __future__ import annotations

from mtpbatch.exceptions import EngineOverloaded, InternalError
from mtpbatch.sequence import Sequence


class Backlog:
    """Requests from when they have their tokens until they end.

    State: ``_entered`` are those that have entered, by request id, with their prompts' tokens while
    they have not begun, and 0 from then on; ``_n_tokens`` is their sum and ``_n_begun`` how many
    have begun. ``_line`` are those in line, first come first. ``n_rejected`` found no room.
    """

    def __init__(
        self, n_seq: int, max_waiting: int | None = None, max_waiting_tokens: int | None = None
    ) -> None:
        self._n_seq = n_seq
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._entered: dict[str, int] = {}
        self._line: dict[str, Sequence] = {}
        self._n_tokens = 0
        self._n_begun = 0
        self.n_rejected = 0

    def __len__(self) -> int:
        return len(self._entered) + len(self._line)

    def has_room(self, n_requests: int) -> bool:
        """Whether there is room beside so many requests, as far as their number goes."""
        return self._max_waiting is None or n_requests < self._n_seq + self._max_waiting

    def enter(self, sequence: Sequence) -> bool:
        """Take the room that a request needs, if nobody stands in line and there is enough."""
        request_id, n_tokens = sequence.request_id, len(sequence.prompt)
        if request_id in self._entered or request_id in self._line:
            raise InternalError(f"request {request_id} comes twice")
        if self._line or not self._fits(n_tokens):
            return False
        self._take(request_id, n_tokens)
        return True

    def stand_in_line(self, sequence: Sequence) -> None:
        """Wait for room, behind those that do already."""
        self._line[sequence.request_id] = sequence

    def move_up(self) -> list[Sequence]:
        """Those from the line that enter now."""
        entered = []
        while self._line:
            request_id, sequence = next(iter(self._line.items()))
            if not self._fits(len(sequence.prompt)):
                break
            del self._line[request_id]
            self._take(request_id, len(sequence.prompt))
            entered.append(sequence)
        return entered

    def begin(self, request_id: str) -> None:
        """It has a sequence, perhaps not for the first time."""
        n_tokens = self._entered[request_id]
        if n_tokens:
            self._n_tokens -= n_tokens
            self._n_begun += 1
            self._entered[request_id] = 0

    def leave(self, request_id: str) -> Sequence | None:
        """It has ended, wherever it was, if it had come; itself, if it stood in line."""
        n_tokens = self._entered.pop(request_id, None)
        if n_tokens is not None:
            self._n_tokens -= n_tokens
            self._n_begun -= not n_tokens
        return self._line.pop(request_id, None)

    def reject(self, n_requests: int) -> EngineOverloaded:
        """Count one that finds no room beside so many requests; what to tell it."""
        self.n_rejected += 1
        return EngineOverloaded(
            running=self._n_begun,
            waiting=n_requests - self._n_begun,
            waiting_tokens=self._n_tokens + sum(len(s.prompt) for s in self._line.values()),
            max_waiting=self._max_waiting,
            max_waiting_tokens=self._max_waiting_tokens,
        )

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks its rules. Looks at everything."""
        n_begun = sum(not n_tokens for n_tokens in self._entered.values())
        first = next(iter(self._line.values()), None)
        for rule, words in (
            (sum(self._entered.values()) == self._n_tokens, "tokens add up"),
            (n_begun == self._n_begun, "it is known how many have begun"),
            (not self._line.keys() & self._entered.keys(), "nobody is in line and has entered"),
            (first is None or bool(self._entered), "nobody stands in line before an idle engine"),
        ):
            if not rule:
                raise InternalError(f"backlog: it does not hold that {words}")

    def _fits(self, n_tokens: int) -> bool:
        if len(self._entered) < self._n_seq:
            return True
        most = self._max_waiting_tokens
        return self.has_room(len(self._entered)) and (
            most is None or self._n_tokens + n_tokens <= most
        )

    def _take(self, request_id: str, n_tokens: int) -> None:
        self._entered[request_id] = n_tokens
        self._n_tokens += n_tokens
