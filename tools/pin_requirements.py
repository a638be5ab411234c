"""Write down the exact packages that CI installs, with their hashes.

    pip install '.[release]' && python tools/pin_requirements.py [--upgrade]

What `pyproject.toml` asks for, to build and for all extras, becomes `requirements/ci.txt`; versions
that stand there stay, if they can, but for `--upgrade`. `requirements/constraints.txt` has the same
versions without hashes, which pip wants of all packages or of none, and mtpbatch itself has none.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PINNED: Final = ROOT / "requirements" / "ci.txt"
CONSTRAINTS: Final = ROOT / "requirements" / "constraints.txt"


# What scikit-build-core asks for besides, where the system has none.
BUILD_TOOLS: Final = ("cmake", "ninja")


def asked_for(project: dict[str, Any]) -> Iterator[str]:
    """The requirements of a pyproject.toml, but for those on its own extras."""
    yield from BUILD_TOOLS
    yield from project["build-system"]["requires"]
    yield from project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        yield from (r for r in extra if not r.startswith(f"{project['project']['name']}["))


def without_hashes(pinned: str) -> str:
    """A line for each package."""
    return re.sub(r" \\\n( +--hash=\S+( \\)?\n)+", "\n", pinned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="to the newest versions")
    asked = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes"),
            *("--universal", "--python-version", "3.11", "--no-header", "--no-annotate"),
            *(["--upgrade"] if asked.upgrade else []),
            *("--output-file", PINNED, "-"),
        ],
        input="\n".join(asked_for(project)),
        text=True,
        check=True,
    )
    CONSTRAINTS.write_text(without_hashes(PINNED.read_text()))


if __name__ == "__main__":
    main()
