"""The doctor: on this machine, and with the ailments of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtpbatch import Completion, Timings, TokenLogprobs, Usage
from mtpbatch.cli import doctor
from mtpbatch.cli.doctor import Report
from mtpbatch.machine import MachineMemory, machine_memory
from mtpbatch.native.devices import build_flags, devices
from test_cli import run


def test_a_healthy_machine() -> None:
    result = run("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "llama-cpp-python 0.3.36",
        "n_threads is",
        "MiB available",
        "one MTP head, for each depth anew, at most 3 tokens",
        "self-test the same answers with and without drafts",
        "tokens/s with drafts",
        "Verdict:",
    ):
        assert words in result.stdout
    assert "PROBLEM" not in result.stdout


def test_a_damaged_file_is_a_problem_beside_which_the_rest_is_told(
    demo_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(demo_path.read_bytes()[:100_000])
    result = run("doctor", "--model", str(path))
    assert (result.returncode, result.stderr) == (1, "")
    assert f"PROBLEM:  {path}: llama.cpp could not load the model" in result.stdout
    assert "the same answers" in result.stdout
    assert result.stdout.endswith("see above for what to change.\n")


def test_a_model_without_heads_works_and_could_work_better(
    dense_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report()
    doctor.look_at_model(report, str(dense_path))
    assert not report.problems
    assert "GGUF file with MTP heads" in report.advice[0]
    assert "drafts    none: the model has no MTP heads" in capsys.readouterr().out
    assert report.verdict() == 0


def test_a_model_that_does_not_fit(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine_memory()
    for available, problems, advice in ((20 << 20, 1, 0), (200 << 20, 0, 1)):
        this = MachineMemory(memory.total, available, available)
        monkeypatch.setattr(doctor, "machine_memory", lambda this=this: this)
        report = Report()
        doctor.look_at_model(report, str(demo_path))
        assert (len(report.problems), len(report.advice)) == (problems, advice)
        assert "mtpbatch plan" in (report.problems + report.advice)[0]


def test_what_the_build_leaves_unused(tmp_path: Path) -> None:
    """But for what this very build has."""
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    (tmp_path / "proc/cpuinfo").write_text("model name: x\nflags\t\t: fpu sse2 i8mm avx2\n")
    report = Report()
    doctor.look_at_build(report, tmp_path)
    expected = {
        "MATMUL_INT8": "MATMUL_INT8 = 1" not in build_flags(),
        "-DGGML_CUDA=on": len(devices()) == 1,
    }
    for words, missing in expected.items():
        assert any(words in advice for advice in report.advice) == missing
    assert not report.problems
    assert doctor.unused_instructions("CPU : AVX2 = 1 | ", tmp_path) == ["MATMUL_INT8"]
    assert doctor.unused_instructions("CPU : AVX2 = 1 | ", tmp_path / "nowhere") == []


def test_too_few_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    report = Report()
    doctor.look_at_machine(report, 1000.0, tmp_path)
    quota, busy = report.advice
    assert "allows 0.5 CPUs" in quota
    assert "n_threads=1" in quota
    assert "load average 1000.0" in busy
    assert "OMP_WAIT_POLICY=passive" in busy
    report = Report()
    doctor.look_at_machine(report, 0.0, tmp_path / "nowhere")
    assert not report.advice


def answer(tokens: tuple[int, ...], accepted: int, runner_up: float = -9.0) -> Completion:
    """One whose tokens are nearly certain; token 99 comes next at each place."""
    return Completion(
        request_id="r",
        text="",
        token_ids=tokens,
        prompt_token_ids=(1,),
        finish_reason="length",
        drafted=9,
        accepted=accepted,
        accepted_by_depth=(accepted,),
        steps=2,
        usage=Usage(1, len(tokens)),
        timings=Timings(0, 0, 0, 0, 0),
        logprobs=tuple(
            TokenLogprobs(token, -0.5, 1, ((token, -0.5), (99, runner_up))) for token in tokens
        ),
    )


@pytest.mark.parametrize(
    ("runner_up", "accepted", "problem"),
    [
        (-0.55, 2, None),  # a tie, as good as: rounding settled it
        (-3.0, 2, "drafts change answers"),
        (-0.55, 0, "no draft of the packaged model was accepted"),
    ],
)
def test_answers_that_differ(runner_up: float, accepted: int, problem: str | None) -> None:
    drafted = answer((5, 6, 7), accepted, runner_up)
    report = Report()
    doctor.compare(report, [drafted], [answer((5, 99, 3), 0)])
    assert len(report.problems) == (problem is not None)
    assert all(problem and problem in found for found in report.problems)
    assert doctor.gap_where_they_part(drafted, answer((5, 6, 7), 0)) == 0


def test_a_token_that_was_not_even_second_is_no_tie() -> None:
    report = Report()
    doctor.compare(report, [answer((5, 6), 1)], [answer((5, 42), 0)])
    assert "drafts change answers" in report.problems[0]


@pytest.mark.anyio
async def test_a_machine_on_which_nothing_gets_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 1e-6)
    report = Report()
    await doctor.try_out(report)
    assert "far too slow here" in report.problems[0]
    assert report.verdict() == 1
