"""The command line, as a person or a script runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from terminal import screen_of

ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive", "COLUMNS": "100", "LINES": "40"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mtpbatch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
        check=False,
    )


def test_generate_writes_the_text_and_nothing_else() -> None:
    one = run("generate", "--max-tokens", "8", "--ignore-eos", "In the beginning")
    assert (one.returncode, one.stderr) == (0, "")
    assert len(one.stdout.strip()) > 0
    again = run("generate", "--max-tokens", "8", "--ignore-eos", "In the beginning")
    assert again.stdout == one.stdout


def test_verbose_logs_to_stderr() -> None:
    result = run("-v", "generate", "--max-tokens", "2", "--ignore-eos", "In the")
    assert result.returncode == 0
    events = [line.split()[3] for line in result.stderr.splitlines()]
    assert events == ["engine.opened", "request.submitted", "request.ended", "engine.closed"]
    quiet = run("generate", "--max-tokens", "2", "--ignore-eos", "In the")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_generate_keeps_the_order_of_several_prompts() -> None:
    result = run("generate", "--max-tokens", "8", "In the", "def main(", "And")
    heads = [line for line in result.stdout.splitlines() if line.startswith("==> ")]
    assert heads == ["==> In the", "==> def main(", "==> And"]


def test_generate_gives_one_json_record_for_each_prompt() -> None:
    result = run("generate", "--json", "--max-tokens", "8", "--ignore-eos", "In the", "And")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(record["prompt"] for record in records) == ["And", "In the"]
    for record in records:
        assert len(record["token_ids"]) == record["usage"]["completion_tokens"] == 8
        assert record["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "--temperature: "),
        (["--n-seq", "0"], "--n-seq: "),
        (["--n-seq", "many"], "--n-seq: "),
        (["--warmth", "1"], "unrecognized arguments: --warmth 1"),
        (["--speculation", "9"], "--speculation: "),
        (["--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(arguments: list[str], words: str) -> None:
    result = run("generate", "In the", *arguments)
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_prompt_found_too_long_while_others_run_is_one_line(as_json: list[str]) -> None:
    """Long texts are tokenised beside the engine, so that this error comes late."""
    result = run("generate", "--n-ctx", "64", *as_json, "In the", "word " * 500)
    assert result.returncode == 2
    assert result.stderr.startswith("mtpbatch: prompt: has ")
    assert len(result.stderr.splitlines()) == 1


def test_the_demo_is_plain_when_nobody_watches() -> None:
    result = run("demo")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert result.stdout.count("drafted tokens accepted") == 8
    assert "tokens per step" in result.stdout
    assert "accepted at depth" in result.stdout


def test_the_demo_tells_accepted_drafts_apart_on_a_terminal() -> None:
    """On a real pseudo-terminal: accepted tokens are bold green, the table comes last."""
    environment = ENVIRONMENT | {"TERM": "xterm-256color"}
    screen = screen_of([sys.executable, "-m", "mtpbatch", "demo"], environment)
    assert "\x1b[1;32m" in screen
    assert "accepted draft" in screen
    assert screen.rindex("tokens per step") > screen.rindex("\x1b[1;32m")


def test_a_plan_has_a_total_of_its_parts_and_what_fits() -> None:
    result = run("plan", "--n-seq", "4", "--snapshot-memory", "16")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    numbers = dict(re.findall(r"^  (\S.*?)  +([\d.,]+)", result.stdout, re.MULTILINE))
    parts = lines[lines.index("") + 2 : next(i for i, s in enumerate(lines) if "total" in s)]
    assert len(parts) >= 9
    values = [float(numbers[part[2:34].strip()].replace(",", "")) for part in parts]
    assert float(numbers["total"].replace(",", "")) == pytest.approx(sum(values), abs=1)
    assert numbers["snapshots"] == "16.0"
    assert any(line.split() == ["4096", "256"] for line in lines)


def test_a_plan_that_does_not_fit_says_what_to_lower() -> None:
    result = run("plan", "--snapshot-memory", str(1 << 24))
    assert result.returncode == 1
    assert "It does NOT fit" in result.stdout
    assert result.stdout.endswith("Lower snapshot_memory.\n")


def test_a_plan_of_a_bad_file_is_one_line(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.gguf", "no such file"), (Path(__file__), "not a GGUF")):
        result = run("plan", "--model", str(path))
        assert (result.returncode, result.stdout) == (1, "")
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
