"""The pages of the reference that are made from the code: errors and the command line.

    python tools/reference_pages.py

A test holds that ``docs/errors.md`` and ``docs/reference/command-line.md`` are what this writes.
"""

from __future__ import annotations

from pathlib import Path

from from_code import command_line, errors

DOCS = Path(__file__).parents[1] / "docs"


def pages() -> dict[Path, str]:
    return {
        DOCS / "errors.md": errors.page(),
        DOCS / "reference" / "command-line.md": command_line.page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
