"""The other examples, run as their readers run them."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import anyio
import nbclient
import nbformat
import pytest
from traitlets.config import Config

import agent_loop
import worker_queue
from mtpbatch import Engine
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # for which these examples are written


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_each_example_is_in_the_table_and_is_run_by_a_test() -> None:
    table = (EXAMPLES / "README.md").read_text()
    tests = "".join(path.read_text() for path in EXAMPLES.parent.glob("tests/**/test_*.py"))
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"({path.name})" in table
        assert f'"{path.name}"' in tests, f"nobody runs {path.name}"


def test_agents_come_to_an_answer() -> None:
    answers = run("agent_loop.py").splitlines()[-3:]
    for line, question in zip(answers, agent_loop.QUESTIONS, strict=True):
        assert re.fullmatch(re.escape(question) + r" -> (['\"]).+\1", line)


@pytest.mark.anyio
async def test_agents_only_make_calls_that_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    """On the demo model, which has no idea. Twenty of them, so that some do call."""
    answers: list[str] = []

    async def ask(engine: Engine, seed: int) -> None:
        answers.append(await agent_loop.agent(engine, "Well?", seed))

    async with Engine.open(n_seq=4) as engine, anyio.create_task_group() as tasks:
        for i in range(20):
            tasks.start_soon(ask, engine, 100 * i)
    assert len(answers) == 20
    assert not any(answer.startswith("(no answer") for answer in answers)
    calls = capsys.readouterr().out.splitlines()
    assert calls
    for call in calls:
        weather = re.fullmatch(r"Well\? -> Weather\(city='(Cairo|Lima|Oslo)'\) = .+ °C", call)
        product = re.fullmatch(r"Well\? -> Multiply\(a=(-?\d+), b=(-?\d+)\) = (-?\d+)", call)
        assert weather or (product and int(product[1]) * int(product[2]) == int(product[3]))


@pytest.mark.anyio
async def test_an_agent_sees_what_its_tools_return(capsys: pytest.CaptureFixture[str]) -> None:
    """With a model that can reason: a scripted one."""

    def think(prompt: str) -> str:
        assert "user: How much is 6 times 7?" in prompt
        if "tool: 42" in prompt:
            return '{"tool": "answer", "text": "It is 42."}'
        return '{"tool": "multiply", "a": 6, "b": 7}'

    async with open_scripted_engine(ScriptedBackend(think, n_ctx=4096)) as engine:
        answer = await agent_loop.agent(engine, "How much is 6 times 7?", seed=0)
    assert answer == "It is 42."
    assert "Multiply(a=6, b=7) = 42" in capsys.readouterr().out


def test_a_race_on_trio_frees_the_sequences_of_those_that_lost() -> None:
    *_, winner, ended = run("trio_race.py").splitlines()
    assert winner.startswith("The race went to: ")
    counts = Counter(json.loads(ended.removeprefix("Ended: ").replace("'", '"')))
    assert counts.total() == 5
    assert counts["abort"] >= 1
    assert counts["error"] == counts["timeout"] == 0


def results(path: Path) -> dict[int, tuple[str, str]]:
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT id, text, result FROM jobs WHERE result IS NOT NULL").fetchall()
    db.close()
    return {job_id: (text, result) for job_id, text, result in rows}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_jobs_survive_the_death_of_their_worker(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    command = [sys.executable, str(EXAMPLES / "worker_queue.py"), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    before = results(path)
    assert before
    said = run("worker_queue.py", str(path))
    after = results(path)
    assert sorted(after) == list(range(1, 13))
    assert {result for _, result in after.values()} <= {"length", "stop"}
    assert {job_id: after[job_id] for job_id in before} == before
    done = {int(number) for number in re.findall(r"^job (\d+)", said, re.MULTILINE)}
    assert done == after.keys() - before.keys(), "a job was done twice, or not at all"
    assert first.startswith("job ")


@pytest.mark.anyio
async def test_jobs_are_done_by_priority_and_their_errors_are_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "jobs.db"
    jobs = worker_queue.Jobs(str(path))
    for prompt, priority in (("a", 0), ("b", 5), ("x" * 300, 0), ("c", -5)):
        jobs.add(prompt, priority)
    async with (
        open_scripted_engine(ScriptedBackend(lambda prompt: prompt * 2, n_ctx=256)) as engine,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(jobs.work, engine)
        with anyio.fail_after(60):
            await jobs.queue.join()
        tasks.cancel_scope.cancel()
    jobs.db.close()
    order = re.findall(r"^job (\d)", capsys.readouterr().out, re.MULTILINE)
    assert order == ["4", "1", "3", "2"]
    found = results(path)
    too_long = found.pop(3)
    assert too_long[1].startswith("error: prompt: has 300 tokens, but a sequence holds n_ctx=256")
    assert found == {1: ("aa", "stop"), 2: ("bb", "stop"), 4: ("cc", "stop")}


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "kept without outputs: they differ each time"
    with tempfile.TemporaryDirectory() as folder:  # its name is short enough for a socket's
        # By files rather than TCP ports, which somebody else could take in between.
        monkeypatch.setenv("IPYTHONDIR", folder)
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", folder)
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        nbclient.NotebookClient(notebook, config=config, timeout=120).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "drafted tokens accepted" in said[1]
    assert len(said[2].splitlines()) == 4
    assert "<span" in cells[3].outputs[0].data["text/html"]
    assert said[4].startswith("22 requests")
    assert cells[-1].outputs[0].data["text/plain"] == "True"


def test_an_app_is_tested_without_a_model() -> None:
    program = EXAMPLES / "test_fastapi_app.py"
    command = [sys.executable, "-m", "pytest", "-q", str(program)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True)
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout
