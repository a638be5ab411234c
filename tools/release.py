"""Make what a release consists of, and check it.

    pip install '.[release]' && python tools/release.py [FOLDER]

FOLDER (`dist` by default) then holds the source distribution, the wheel, and `sbom.cdx.json`: what
a plain installation of the wheel brings, as a CycloneDX document. The wheel holds exactly the files
that `tests/wheel_files.txt` lists. At the end what `requirements/ci.txt` pins is looked up among
known vulnerabilities, over the network. Without an answer for every package the release is not
audited, and the status is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import check_wheel
import sbom
from pin_requirements import PINNED

ROOT: Final = Path(__file__).parents[1]


def audit(report: str) -> None:
    """Raises SystemExit unless pip-audit's report, JSON or nothing, knows all packages as sound."""
    if not report.strip():
        raise SystemExit("NOT AUDITED for vulnerabilities: there is no answer")
    packages = json.loads(report)["dependencies"]
    bad = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        for package in packages
        for vulnerability in package.get("vulns", [])
    ]
    if bad:
        raise SystemExit("known vulnerabilities:\n" + "\n".join(bad))
    unknown = [f"{p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    if unknown:
        raise SystemExit(
            f"NOT AUDITED for vulnerabilities: {len(unknown)} of {len(packages)} packages, "
            f"such as {unknown[0]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    wheel = max(folder.glob("mtpbatch-*.whl"), key=lambda path: path.stat().st_mtime)
    check_wheel.check(wheel)
    sbom.write(wheel, folder / "sbom.cdx.json")
    print(f"{wheel.name} and its sbom.cdx.json are in {folder}")

    looked_up = subprocess.run(
        [
            *(sys.executable, "-m", "pip_audit", "--requirement", PINNED, "--format", "json"),
            *("--no-deps", "--disable-pip", "--progress-spinner", "off"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    audit(looked_up.stdout)


if __name__ == "__main__":
    main()
