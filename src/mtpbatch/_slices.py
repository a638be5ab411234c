"""Long work in Python beside an event loop: in slices, between which the loop gets the GIL.

A call in C holds the GIL until it returns. Python code gives it up when somebody has waited for
5 ms (``sys.getswitchinterval``), which is too long for an event loop, and to let go of it for an
instant is no help: who holds it has it back before the other one has woken up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from mtpbatch.exceptions import InvalidParameterError

SLICE: Final = 4096  # numbers, or bytes; to convert as many takes a tenth of a millisecond
_NAP: Final = 50e-6  # seconds, in which a thread that waits for the GIL wakes up and takes it


def slices(n_items: int) -> Iterator[slice]:
    """What ``n_items`` are cut into. Other threads get the GIL between one and the next."""
    for start in range(0, n_items, SLICE):
        if start:
            time.sleep(_NAP)
        yield slice(start, min(start + SLICE, n_items))


def encoded(parameter: str, text: str) -> bytes:
    """A text in UTF-8, which has no lone surrogates: one is refused."""
    pieces = []
    for part in slices(len(text)):
        try:
            pieces.append(text[part].encode())
        except UnicodeEncodeError as error:
            index = part.start + error.start
            raise InvalidParameterError(
                parameter,
                f"is not valid Unicode: {text[index]!r} at index {index} is a lone surrogate; "
                f"take it out, or decode the text with errors='replace' where it comes from",
            ) from None
    return b"".join(pieces)
