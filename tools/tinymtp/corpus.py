"""The text the demo model learns: the King James Bible and Python's own standard library.

Both are on the machine already or one package away, and both may be redistributed.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinymtp.tokenizer import Tokenizer

_HELD_OUT = 0.02

_VERSE = re.compile(r"(?P<chapter>\w+):\d+ (?P<text>.*)")
_PARAGRAPH_CHARS = 400

# Generated tables, other programs' sources and tests would teach the model little.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "encodings",
        "ensurepip",
        "idlelib",
        "idle_test",
        "lib2to3",
        "macholib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_TABLE_ROW = re.compile(r"""\s*[\[({'"\d\\].*[,'"\\]\s*""")
_MOST_TABLE_ROWS = 0.25
_LEAST_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of text: complete documents, in a fixed order."""

    name: str
    documents: tuple[str, ...]

    @property
    def chars(self) -> int:
        return sum(map(len, self.documents))

    @property
    def sha256(self) -> str:
        """Fingerprint of the documents and of where one ends and the next begins."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Split:
    """The token ids of a part, its end held out from training."""

    name: str
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


def split(part: Part, tokenizer: Tokenizer) -> Split:
    """Encode a part, with an end-of-turn token after each document so that a model can end."""
    ids = [
        token
        for document in part.documents
        for token in (*tokenizer.encode(document), tokenizer.end_of_turn)
    ]
    cut = round(len(ids) * (1 - _HELD_OUT))
    return Split(part.name, np.array(ids[:cut]), np.array(ids[cut:]))


def prose() -> Part:
    """The King James Bible, a document per chapter, without chapter and verse numbers."""
    program = shutil.which("bible")
    if program is None:
        raise SystemExit(
            "The `bible` program is needed for the text: "
            "install Debian's bible-kjv package (apt-get install bible-kjv)."
        )
    listing = subprocess.run(
        [program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    verses = [match for line in listing.splitlines() if (match := _VERSE.fullmatch(line))]
    chapters = itertools.groupby(verses, key=lambda verse: verse["chapter"])
    return Part(
        "prose",
        tuple("\n\n".join(_paragraphs(verse["text"] for verse in group)) for _, group in chapters),
    )


def code() -> Part:
    """The running interpreter's standard library, a document per file, ASCII lines only."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    documents = (
        _ascii_lines((root / path).read_text(encoding="utf-8", errors="replace"))
        for path in paths
        if _SKIPPED_FOLDERS.isdisjoint(path.parts) and not path.name.startswith("_sysconfigdata")
    )
    return Part("code", tuple(text for text in documents if _is_worth_reading(text)))


def _paragraphs(verses: Iterator[str]) -> Iterator[str]:
    """Join verses into paragraphs that end with a sentence and are about equally long."""
    paragraph = ""
    for verse in verses:
        paragraph = f"{paragraph} {verse.strip()}".lstrip()
        if len(paragraph) >= _PARAGRAPH_CHARS and paragraph.endswith((".", "?", "!")):
            yield paragraph
            paragraph = ""
    if paragraph:
        yield paragraph


def _ascii_lines(text: str) -> str:
    """Leave out lines with other characters: bytes never trained on are never drafted either."""
    return "".join(
        line.rstrip() + "\n" for line in text.expandtabs(4).splitlines() if line.isascii()
    )


def _is_worth_reading(text: str) -> bool:
    lines = [line for line in text.splitlines() if line]
    table_rows = sum(_TABLE_ROW.fullmatch(line) is not None for line in lines)
    return len(text) >= _LEAST_CHARS and table_rows <= _MOST_TABLE_ROWS * len(lines)
