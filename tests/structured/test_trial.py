"""Grammars are tried in a process of their own: whatever they do, this one lives on."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.structured.trial import Trial
from mtpbatch.types import GrammarSource


@pytest.fixture
def trial() -> Iterator[Trial]:
    trial = Trial(cpu_seconds=1)
    yield trial
    trial.close()


def schema(value: Any) -> GrammarSource:
    return GrammarSource("json_schema", json.dumps(value))


def chain_of_references(n: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    definitions[f"d{n}"] = {"type": "null"}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def nested(n: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "null"}
    for _ in range(n):
        value = {"type": "object", "properties": {"x": value}, "required": ["x"]}
    return value


def chain_of_rules(n: int) -> str:
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(n))
    return f"start: r0\n{rules}r{n}: /a/\n"


GOOD = [
    GrammarSource("regex", r"[a-z]+ \d{2}"),
    GrammarSource("choice", json.dumps(["yes", "no"])),
    GrammarSource("grammar", 'start: "a" /[0-9]/'),
    GrammarSource("grammar", 'root ::= "a" [0-9]+'),
    schema(nested(30)),
    schema(chain_of_references(50)),
    schema({"enum": [f"value {i}" for i in range(1000)]}),
]

BAD = [
    (GrammarSource("regex", "(?=a)b"), "look-around"),
    (GrammarSource("regex", "(" * 1000), "unclosed group|exceed"),
    (GrammarSource("regex", "\ud800"), "surrogates"),
    (GrammarSource("grammar", "start: nobody"), "nobody"),
    (GrammarSource("grammar", "root ::= ("), "root"),
    (GrammarSource("grammar", ""), "root"),
    (GrammarSource("grammar", 'answer ::= "a"'), "root"),
    (GrammarSource("grammar", "root ::= \n|[\\"), "out of range"),
    (GrammarSource("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion|nested"),
    (GrammarSource("json_schema", "{"), "EOF"),
    (schema(5), "object"),
    (schema({"type": "nothing"}), "nothing"),
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"allOf": [{"type": "null"}, {"type": "string"}]}), "nsatisfiable"),
    (schema({"$ref": "https://example.com/schema"}), "example.com"),
]

BOMBS = {
    "stack of a schema": schema(chain_of_references(5000)),
    "stack of a grammar": GrammarSource("grammar", chain_of_rules(20_000)),
    "time": schema({"type": "integer", "multipleOf": 1_000_003}),
}


@pytest.mark.parametrize("source", GOOD, ids=[f"{g.parameter} {i}" for i, g in enumerate(GOOD)])
def test_what_can_be_done_becomes_a_grammar(trial: Trial, source: GrammarSource) -> None:
    assert trial.compile(source) == trial.compile(source) != ""


@pytest.mark.parametrize(("source", "words"), BAD, ids=[words for _, words in BAD])
def test_what_cannot_be_done_is_refused_in_words(
    trial: Trial, source: GrammarSource, words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=f"(?s)^{source.parameter}: .*({words})"):
        trial.compile(source)


@pytest.mark.parametrize("name", BOMBS)
def test_what_takes_too_much_is_refused(trial: Trial, name: str) -> None:
    source = BOMBS[name]
    with pytest.raises(
        InvalidParameterError, match=f"{source.parameter}: takes more than 1 s or 2048 MiB"
    ):
        trial.compile(source)
    assert trial.compile(GOOD[0])  # others are not affected


def test_what_takes_too_much_memory_is_refused() -> None:
    trial = Trial(cpu_seconds=60, memory=150 << 20)
    assert trial.compile(GOOD[0])
    with pytest.raises(InvalidParameterError, match="takes more than 60 s or 150 MiB"):
        trial.compile(GrammarSource("regex", "((a{100}){100}){100}"))
    trial.close()


@pytest.mark.parametrize("since", ["long", "just now"])
def test_a_process_that_died_while_it_had_nothing_to_do_is_replaced(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    assert trial.compile(GOOD[0])
    process = trial._process
    assert process is not None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if since == "just now":
        monkeypatch.setattr(process, "poll", lambda: None)  # it was there at the last look
    assert trial.compile(GOOD[0])
    assert trial._process is not process
    assert process.returncode == -signal.SIGKILL, "nothing is left of it"


def test_what_the_terminal_and_supervisors_send_is_for_the_app(trial: Trial) -> None:
    assert trial.compile(GOOD[0])
    process = trial._process
    assert process is not None
    assert os.getpgid(process.pid) == process.pid, "Ctrl-C goes to another group"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert trial.compile(GOOD[1])
    assert trial._process is process


def test_it_ends_with_the_app() -> None:
    program = """
from mtpbatch.structured.trial import Trial
from mtpbatch.types import GrammarSource

trial = Trial()
trial.compile(GrammarSource("regex", "a"))
print(trial._process.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as app:
        assert app.stdout is not None
        process = os.pidfd_open(int(app.stdout.readline()))
        app.kill()
    select.select([process], [], [])
    os.close(process)


@pytest.mark.parametrize(("name", "value"), [("executable", None), ("frozen", True)])
def test_an_app_that_is_its_own_interpreter_is_not_started_again(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(InvalidParameterError, match=r"regex: .* no Python interpreter .* leave it"):
        trial.compile(GOOD[0])


def test_it_may_be_closed_before_it_began_and_twice(trial: Trial) -> None:
    trial.close()
    trial.close()
    assert trial.compile(GOOD[0])
