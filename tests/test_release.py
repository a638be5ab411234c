"""What is released is made in one way: workflows, `.ci/run` and `pyproject.toml` agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CI = (ROOT / ".ci" / "run").read_text()
WORKFLOWS = {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}


def test_mtpbatch_is_built_against_the_llama_cpp_python_that_it_asks_for() -> None:
    def pins(requirements: list[str]) -> list[str]:
        return [line for line in requirements if line.startswith("llama-cpp-python")]

    (pin,) = pins(PROJECT["project"]["dependencies"])
    assert re.fullmatch(r"llama-cpp-python==[\d.]+", pin)
    assert pins(PROJECT["build-system"]["requires"]) == [pin]


def test_ci_makes_and_tests_the_wheel_as_cibuildwheel_does() -> None:
    settings = PROJECT["tool"]["cibuildwheel"]
    repair = settings["linux"]["repair-wheel-command"]
    assert repair.replace("{dest_dir} {wheel}", '"$work/wheels" "$work"/dist/*.whl') in CI
    needed = " ".join(f"'{requirement}'" for requirement in settings["test-requires"])
    assert f"pip install --quiet wheels/*.whl {needed}\n" in CI
    for command in settings["test-command"]:
        as_in_ci = command.replace("{project}", '"$project"')
        assert f"  {as_in_ci}\n" in CI


def test_the_test_workflow_is_ci() -> None:
    assert re.findall(r"- run: (.+)", WORKFLOWS["test.yml"]) == [".ci/run"]


def test_workflows_run_the_tools_that_ci_has_checked() -> None:
    used = {
        tool for text in WORKFLOWS.values() for tool in re.findall(r"pipx run ([\w-]+\S*)", text)
    }
    assert {tool.partition("==")[0] for tool in used} == {"cibuildwheel", "twine"}
    assert used <= set(PROJECT["project"]["optional-dependencies"]["release"])


def test_actions_are_pinned_to_commits() -> None:
    for name, text in WORKFLOWS.items():
        for action in re.findall(r"uses: (.+)", text):
            assert re.fullmatch(r"\./\S+|[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), (name, action)
