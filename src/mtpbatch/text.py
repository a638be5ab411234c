"""From tokens to text that may be shown: whole characters only, and never a stop text.

A token is a run of bytes, so a character can be split over several of them, and a stop text can
begin in one token and end in another. :class:`TextAssembler` gives out text as soon as both
questions are settled. Its cost per token depends on the token and the stop texts, never on how
much text there already is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final

_SLICE: Final = 4096  # tokens; in a call in C that takes longer no other thread gets the GIL


class TextAssembler:
    """Turns the generated tokens of one request into text.

    What :meth:`feed` and :meth:`flush` return, joined, is the text of all the tokens up to, and
    without, the first stop text. One that the first ``min_tokens`` tokens complete does not
    count. Bytes that are not UTF-8 become U+FFFD.
    """

    __slots__ = (
        "_between_characters",
        "_bytes_of",
        "_decoder",
        "_first_chars",
        "_held",
        "_matchers",
        "_n_before",
        "_n_vocab",
        "stopped",
    )

    def __init__(
        self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._bytes_of = token_bytes.__getitem__
        self._n_vocab = len(token_bytes)
        self._between_characters = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = tuple(_StopMatcher(text) for text in stop)
        self._first_chars = frozenset(text[0] for text in stop)
        self._held = ""  # the longest end of the text so far that begins a stop text
        self._n_before = min_tokens  # tokens to come that complete no stop text
        self.stopped = False
        """Whether a stop text was completed; nothing is taken in after that."""

    def knows(self, token_ids: Sequence[int]) -> bool:
        """Whether all of these are in the vocabulary."""
        n_vocab = self._n_vocab
        for token_id in token_ids:  # noqa: SIM110 - each step asks; all() takes twice as long
            if not 0 <= token_id < n_vocab:
                return False
        return True

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take in tokens: the text that may now be shown, and how many tokens were taken.

        Fewer are taken than were given only if a stop text was completed; the last one taken
        completed it.
        """
        if not self._matchers:
            n_tokens = len(token_ids)
            if n_tokens <= _SLICE:
                return self._decode(token_ids), n_tokens
            parts = (token_ids[i : i + _SLICE] for i in range(0, n_tokens, _SLICE))
            return "".join(map(self._decode, parts)), n_tokens
        shown = ""
        for n_taken, token_id in enumerate(token_ids, 1):
            shown += self._settle(self._decoder.decode(self._bytes_of(token_id)))
            if self.stopped:
                return shown, n_taken
            self._n_before -= 1
        return shown, len(token_ids)

    def flush(self) -> str:
        """The end of the request: the text that was held back, a cut character as U+FFFD."""
        if self.stopped:
            return ""
        shown = self._settle(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    def _decode(self, token_ids: Sequence[int]) -> str:
        joined = b"".join(map(self._bytes_of, token_ids))
        if self._between_characters and joined.isascii():
            return joined.decode("ascii")  # the usual case, in a quarter of the time
        text = self._decoder.decode(joined)
        self._between_characters = not self._decoder.getstate()[0]
        return text

    def _settle(self, text: str) -> str:
        """Append decoded text; return what can no longer be part of a stop text."""
        if not self._held and self._first_chars.isdisjoint(text):
            return text  # the usual case: no stop text is under way, and none begins
        n_held = len(self._held)
        pending = self._held + text
        for end, char in enumerate(text, n_held + 1):
            # Of stop texts that end together the longest counts: none of it may be shown.
            completed = max((m.n_stop for m in self._matchers if m.advance(char)), default=0)
            if completed and self._n_before <= 0:
                self.stopped = True
                self._held = ""
                return pending[: end - completed]
        settled = len(pending) - max(m.n_matched for m in self._matchers)
        self._held = pending[settled:]
        return pending[:settled]


class _StopMatcher:
    """Knuth, Morris and Pratt: how much of one stop text the text so far ends with."""

    __slots__ = ("_borders", "_stop", "n_matched", "n_stop")

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = _borders(stop)
        self.n_stop = len(stop)
        self.n_matched = 0

    def advance(self, char: str) -> bool:
        """Take in one character; whether it completes the stop text."""
        while self.n_matched and self._stop[self.n_matched] != char:
            self.n_matched = self._borders[self.n_matched - 1]
        if self._stop[self.n_matched] == char:
            self.n_matched += 1
        if self.n_matched < self.n_stop:
            return False
        self.n_matched = self._borders[-1]
        return True


def _borders(text: str) -> list[int]:
    """For every prefix of ``text``, the length of its longest proper prefix that also ends it."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
