"""What comes back of requests: of each one, and of all that are under way."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable


class RequestFailed(Exception):
    """A request failed. ``kind`` is what errors are counted by, ``detail`` is for a reader."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Tally:
    """How a run stands: counted by the run and by its answers, read by whoever watches."""

    def __init__(self) -> None:
        self.sent = 0
        self.begun = 0
        """Requests that have had their first chunk, or ended without one."""
        self.ended = 0
        self.cancelled = 0
        self.tokens = 0
        self.first_chunks = array("d")
        """Seconds from sending to the first chunk, of every request that had one."""
        self.errors: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """Of each kind of error, what the first one said."""

    @property
    def running(self) -> int:
        """Requests under way that have had their first chunk."""
        return self.begun - self.ended

    @property
    def waiting(self) -> int:
        """Requests under way of which nothing has come yet."""
        return self.sent - self.begun

    def fail(self, kind: str, detail: str) -> None:
        """Count an error."""
        self.errors[kind] += 1
        self.examples.setdefault(kind, detail)


class Answer:
    """One request's answer. Its target fills it in as it comes."""

    __slots__ = (
        "_cancel",
        "_cancel_after",
        "_clock",
        "_tally",
        "accepted",
        "cached_tokens",
        "drafted",
        "enough",
        "finish_reason",
        "output_tokens",
        "prompt_tokens",
        "received",
        "sent",
        "steps",
        "times",
        "tokens",
    )

    def __init__(
        self,
        clock: Callable[[], float],
        tally: Tally,
        cancel_after: int | None,
        cancel: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._tally = tally
        self._cancel_after = cancel_after
        self._cancel = cancel
        self.sent = clock()
        self.enough = False
        """So much has come that it is given up."""
        self.times = array("d")
        self.tokens = array("L")
        self.received = 0
        self.output_tokens: int | None = None
        """The tokens of the whole answer, as the server counted them at its end."""
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.drafted: int | None = None
        self.accepted: int | None = None
        self.steps: int | None = None

    def begin(self) -> None:
        """The request is on its way."""
        if self._cancel_after == 0:
            self._give_up()

    def receive(self, n_tokens: int) -> None:
        """Take in a chunk that came just now."""
        now = self._clock()
        if not self.times:
            self._tally.begun += 1
            self._tally.first_chunks.append(now - self.sent)
        self.times.append(now)
        self.tokens.append(n_tokens)
        self.received += n_tokens
        self._tally.tokens += n_tokens
        if self._cancel_after is not None and self.received >= self._cancel_after:
            self._give_up()

    def _give_up(self) -> None:
        self.enough = True
        self._cancel()
