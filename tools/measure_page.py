"""Measure the figures of a page anew: what its commands print goes into the page.

    python tools/widen_model.py wide.gguf
    python tools/measure_page.py docs/scheduling.md               # all of them: hours
    python tools/measure_page.py docs/scheduling.md churn smooth  # those with one of the words

A shell block of the page that has benchmarks in it is followed by as many places, each between
``<!-- printed -->`` and ``<!-- end -->``, for the outputs in turn. Each is written as soon as its
command has ended. What the page says about the figures is to be read again afterwards. Keep the
machine quiet.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent
_BLOCK: Final = re.compile(r"^```sh[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PLACE: Final = re.compile(r"^<!-- printed -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def places(text: str) -> dict[str, tuple[int, int]]:
    """By command: where in the page its output begins and ends.

    Raises:
        ValueError: a block has more commands than places, or fewer.
    """
    found: dict[str, tuple[int, int]] = {}
    blocks = list(_BLOCK.finditer(text))
    ends = [*(block.start() for block in blocks[1:]), len(text)]
    for block, end in zip(blocks, ends, strict=True):
        commands = [line for line in block[1].splitlines() if "python -m benchmarks." in line]
        spans = [place.span(1) for place in _PLACE.finditer(text, block.end(), end)]
        if len(spans) != len(commands):
            raise ValueError(
                f"{len(commands)} benchmarks are followed by {len(spans)} places between "
                f"<!-- printed --> and <!-- end -->: {'; '.join(commands) or block[1].strip()}"
            )
        found.update(zip(commands, spans, strict=True))
    return found


def measure(page: Path, command: str) -> None:
    """Run a command of the page, and write down what it prints."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    text = page.read_text(encoding="utf-8")  # which may have been edited meanwhile
    begin, end = places(text)[command]
    page.write_text(f"{text[:begin]}\n{done.stdout.strip()}\n\n{text[end:]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the commands to run")
    options = parser.parse_args()
    try:
        commands = list(places(options.page.read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        parser.error(f"{options.page}: {problem}")
    chosen = [
        command
        for command in commands
        if not options.words or set(options.words) & set(re.split(r"[\s./]+", command))
    ]
    if not chosen:
        parser.error(f"no command of {options.page} has {' or '.join(options.words)} in it")
    for number, command in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {command}", file=sys.stderr)
        measure(options.page, command)


if __name__ == "__main__":
    main()
