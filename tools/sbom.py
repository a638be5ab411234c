"""Write down what a plain installation of a wheel brings, as a CycloneDX document, and check it.

pip install '.[release]' && python tools/sbom.py WHEEL PATH
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pin_requirements import CONSTRAINTS

PROJECT: Final = Path(__file__).parents[1] / "pyproject.toml"


def write(wheel: Path, path: Path) -> None:
    """Install a wheel in a fresh environment, and describe that.

    Raises SystemExit if the document does not name what mtpbatch depends on.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        python = Path(folder) / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python)
        subprocess.run([*pip, "install", "-q", "-c", CONSTRAINTS, wheel], check=True)
        subprocess.run(
            [
                *(sys.executable, "-m", "cyclonedx_py", "environment", python),
                *("--pyproject", PROJECT, "--output-reproducible"),
                *("--output-format", "JSON", "--output-file", path),
            ],
            check=True,
        )
    check(path.read_text())


def check(document: str) -> None:
    """Raises SystemExit unless it names mtpbatch's dependencies, in versions it asks for."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    found = {
        canonicalize_name(component["name"]): component["version"]
        for component in json.loads(document)["components"]
    }
    asked = [Requirement(line) for line in project["dependencies"]]
    wrong = [
        f"{each}: {found.get(canonicalize_name(each.name), 'missing')}"
        for each in asked
        if not each.specifier.contains(found.get(canonicalize_name(each.name), ""))
    ]
    if wrong:
        raise SystemExit("not in the SBOM as asked for: " + "; ".join(wrong))


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:3]))
