"""Programs of users, as type checkers see them: those in `right` have no error, and those in
`wrong` have one in each line that expects it, and nowhere else.

Both checkers are as strict as they can be, and look at the installed package.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="type checkers come with the extra dev")
pytest.importorskip("basedpyright", reason="type checkers come with the extra dev")

FOLDER = Path(__file__).parent
PROGRAMS = sorted([*FOLDER.glob("right/*.py"), *FOLDER.glob("wrong/*.py")])

Lines = set[tuple[str, int]]


def expected() -> Lines:
    return {
        (path.relative_to(FOLDER).as_posix(), number)
        for path in PROGRAMS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# expect error")
    }


def told_by(*command: str | Path, found: str) -> Lines:
    """Where a checker finds errors; ``found`` is how it writes one, with file and line."""
    done = subprocess.run(
        [sys.executable, "-m", *command, *PROGRAMS],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # errors, and no crash
    errors = re.findall(found, done.stdout, re.MULTILINE)
    return {(Path(path).relative_to(FOLDER).as_posix(), int(line)) for path, line in errors}


def test_mypy(tmp_path: Path) -> None:
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n")
    lines = told_by(
        *("mypy", "--config-file", settings, "--cache-dir", tmp_path, "--show-absolute-path"),
        found=r"^(/.+):(\d+): error:",
    )
    assert lines == expected()


def test_pyright(tmp_path: Path) -> None:
    """By basedpyright, which brings pyright in its wheel, with pyright's own rules."""
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text('{"typeCheckingMode": "strict"}')
    lines = told_by(
        *("basedpyright", "--project", settings, "--pythonpath", sys.executable),
        found=r"^ +(/.+):(\d+):\d+ - error:",
    )
    assert lines == expected()


def test_there_are_programs_of_both_kinds() -> None:
    assert len(list(FOLDER.glob("right/*.py"))) >= 12
    assert len(expected()) >= 20
    assert all(path.startswith("wrong/") for path, _ in expected())
