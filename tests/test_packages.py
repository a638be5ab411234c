"""What is released: the wheel's files, and how packages are looked up among vulnerabilities."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import check_wheel
import pin_requirements
import release
import sbom

ROOT = Path(__file__).parents[1]
BUILT = {"mtpbatch/_built_with.py", "mtpbatch/native/_ffi.abi3.so"}


def test_the_wheels_files_are_those_of_the_sources_and_what_is_built() -> None:
    package = ROOT / "src" / "mtpbatch"
    sources = {
        f"mtpbatch/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    listed = check_wheel.listed_files()
    assert listed == sorted(set(listed))
    assert {name for name in listed if name.startswith("mtpbatch/")} == sources | BUILT


def test_a_wheel_that_holds_anything_else_is_noticed(tmp_path: Path) -> None:
    names = [name.replace("*", "1.2") for name in check_wheel.listed_files()]

    def wheel(*names: str) -> Path:
        path = tmp_path / "mtpbatch-1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")
        return path

    check_wheel.check(wheel(*names))
    with pytest.raises(SystemExit, match=r"more .*secret\.txt.*missing: \[\]"):
        check_wheel.check(wheel(*names, "mtpbatch/secret.txt"))
    with pytest.raises(SystemExit, match=r"missing: \['mtpbatch/types\.py'\]"):
        check_wheel.check(wheel(*(name for name in names if name != "mtpbatch/types.py")))


def test_only_a_release_of_which_all_is_looked_up_and_sound_passes_its_audit() -> None:
    def report(**package: object) -> str:
        return json.dumps({"dependencies": [{"name": "a", "version": "1", "vulns": []} | package]})

    release.audit(report())
    with pytest.raises(SystemExit, match="a 1: CVE-1"):
        release.audit(report(vulns=[{"id": "CVE-1"}]))
    with pytest.raises(SystemExit, match=r"NOT AUDITED .* 1 of 1 packages, such as a: not found"):
        release.audit(report(skip_reason="not found"))
    with pytest.raises(SystemExit, match="NOT AUDITED"):
        release.audit("")


def test_an_sbom_that_misses_a_dependency_is_noticed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.partition(";")[0].strip().split("==")
        for line in pin_requirements.CONSTRAINTS.read_text().splitlines()
    )
    names = [Requirement(line).name for line in project["dependencies"]]
    assert {"llama-cpp-python", "msgspec", "numpy"} <= set(names)
    components = [{"name": name, "version": pinned[name]} for name in names]

    sbom.check(json.dumps({"components": [*components, {"name": "pip", "version": "1"}]}))
    for index, name in enumerate(names):
        others = [*components[:index], *components[index + 1 :]]
        with pytest.raises(SystemExit, match=f"SBOM as asked for: {name}[^;]*: missing$"):
            sbom.check(json.dumps({"components": others}))
        old = {"name": name, "version": "0.0.1"}
        with pytest.raises(SystemExit, match=rf"SBOM as asked for: {name}[^;]*: 0\.0\.1$"):
            sbom.check(json.dumps({"components": [*others, old]}))


def test_all_requirements_are_pinned_with_hashes() -> None:
    pinned: dict[str, str] = {}
    lines = []
    for entry in pin_requirements.PINNED.read_text().replace("\\\n", "").splitlines():
        line, *hashes = entry.split(" --hash=sha256:")
        assert hashes, entry
        lines.append(line.strip())
        name, _, version = line.partition(";")[0].partition("==")
        pinned[canonicalize_name(name)] = version.strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in pin_requirements.asked_for(project):
        asked = Requirement(line)
        assert asked.specifier.contains(pinned[canonicalize_name(asked.name)]), line
    assert pin_requirements.CONSTRAINTS.read_text().splitlines() == lines
