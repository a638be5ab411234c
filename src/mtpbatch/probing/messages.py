"""What goes in and out of the process that tries files out: a line of JSON each."""

from __future__ import annotations

from msgspec import Struct


class Probe(Struct, frozen=True):
    """The files to load together."""

    model: str
    draft_model: str | None = None
    lora: dict[str, float] = {}


class Found(Struct, frozen=True):
    """What came of it."""

    error: str | None = None
    """What is wrong with them; ``None``: they can be used."""
