"""The project keeps its own promises: what the README prints is what CI runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import msgspec
import pytest

from mtpbatch import EngineConfig, SamplingParams

ROOT = Path(__file__).parents[1]


def commands(heading: str) -> list[str]:
    """The command lines below a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh.*?\n(.+?)^```", section, re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


def test_ci_runs_the_commands_of_the_readme() -> None:
    create, *to_run = commands("Try it")
    assert create.startswith("python3 -m venv")
    assert len(to_run) == 2
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in to_run:
        assert command in ci


def test_a_hundred_generations_of_which_half_are_cancelled_leave_nothing_behind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_path(str(ROOT / "examples" / "cancel_half.py"), run_name="__main__")
    assert "0 running, 0 waiting" in capsys.readouterr().out


def test_the_packaged_model_is_small_and_documented() -> None:
    models = ROOT / "src" / "mtpbatch" / "models"
    assert (models / "demo.gguf").stat().st_size <= 8_000_000
    card = (models / "README.md").read_text().lower()
    for word in ("held out", "accepted at depth 1", "per character", "licence", "limits"):
        assert word in card
    assert (models / "LICENSE").read_text().strip()


def test_every_parameter_stands_in_a_table_with_a_test_that_exists() -> None:
    lines = (ROOT / "docs" / "requests.md").read_text().splitlines()
    rows = {
        match[1]: line.count("|")
        for line in lines
        if (match := re.match(r"\| `(\w+)`.* \|", line)) is not None
    }
    names = {
        f.name for kind in (EngineConfig, SamplingParams) for f in msgspec.structs.fields(kind)
    }
    assert names <= rows.keys()
    assert {rows[name] for name in names} == {7}, "six columns"
    for path in re.findall(r"`(tests/[\w/]+\.py)`", "\n".join(lines)):
        assert (ROOT / path).exists(), path
