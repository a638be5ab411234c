"""Check that a wheel holds the files that ``tests/wheel_files.txt`` lists, and no others.

python tools/check_wheel.py WHEEL ...
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Final

LIST: Final = Path(__file__).parents[1] / "tests" / "wheel_files.txt"


def listed_files() -> list[str]:
    """What a wheel is to hold; versions are ``*``."""
    lines = LIST.read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def check(wheel: Path) -> None:
    """Raises SystemExit if it holds anything else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    found = {re.sub(r"^mtpbatch-[^/]+\.dist-info/", "mtpbatch-*.dist-info/", n) for n in names}
    expected = set(listed_files())
    if found != expected:
        raise SystemExit(
            f"{wheel.name}: more than in {LIST.name}: {sorted(found - expected)}; "
            f"missing: {sorted(expected - found)}"
        )


if __name__ == "__main__":
    for path in sys.argv[1:]:
        check(Path(path))
