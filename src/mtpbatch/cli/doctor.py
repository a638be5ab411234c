"""``mtpbatch doctor``: whether all is as it should be here, and what to change."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

from mtpbatch.engine import Engine
from mtpbatch.exceptions import MtpBatchError
from mtpbatch.loading import model_path
from mtpbatch.machine import affine_cpus, available_cpus, cpu_quota, machine_memory
from mtpbatch.types import Completion, EngineConfig

# What each extra brings, by the package that nobody has without wanting it.
EXTRAS = {
    "cli": "rich",
    "structured": "llguidance",
    "server": "starlette",
    "otel": "opentelemetry-api",
    "bench": "aiohttp",
    "ray": "ray",
}
# Instruction sets that make a difference: the kernel's name, and llama.cpp's.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
}
# What shows that there is a GPU, and how llama-cpp-python is built for it.
GPUS = {
    "proc/driver/nvidia/version": "an NVIDIA GPU: -DGGML_CUDA=on",
    "dev/kfd": "an AMD GPU: -DGGML_HIP=on",
}
PROMPTS = (
    "In the beginning",
    "And Moses said unto the children of Israel,",
    "And it came to pass in those days, that",
    "class Server:\n    def __init__(self",
    "import os\nimport sys\n\ndef main():\n",
    "def read_config(path):\n",
)
TOKENS = 64
DEPTH = 3
PATIENCE = 20.0  # seconds for one run of the self-test, which takes well under one
MEASURED = 3.0  # seconds of runs, after those that are compared
NEAR_TIE = 0.1  # of log probabilities: between such tokens rounding may decide
MIB = 1 << 20


class Report:
    """What was found, printed as it is found, and what to change."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """What does not work."""
        self.advice: list[str] = []
        """What works, and could work better."""

    def say(self, title: str, text: str) -> None:
        print(f"{title:<10}{text}", flush=True)

    def verdict(self) -> int:
        """Print the end of it; the exit status."""
        print()
        for kind, findings in (("PROBLEM", self.problems), ("advice", self.advice)):
            for finding in findings:
                print(f"{kind + ':':<10}{finding}")
        if self.problems:
            print("Verdict:  it does not work as it should: see above for what to change.")
            return 1
        well = "all is well" if not self.advice else "it works, and could work better: see above"
        print(f"Verdict:  {well}.")
        return 0


async def run(model: str | None) -> int:
    """Look at everything; the exit status, which is 1 if something does not work."""
    report = Report()
    look_at_versions(report)
    look_at_build(report)
    look_at_machine(report, os.getloadavg()[0])
    look_at_model(report, model)
    await try_out(report)
    return report.verdict()


def look_at_versions(report: Report) -> None:
    """Of what is installed."""
    names = ("mtpbatch", "llama-cpp-python")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    report.say("versions", f"{versions}, {python}, {platform.platform()}")
    there = []
    for extra, package in EXTRAS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        there.append(f"{extra} ({package} {version})")
    report.say("extras", ", ".join(there) or "none")


def look_at_build(report: Report, root: Path = Path("/")) -> None:
    """What llama.cpp was built for, and whether this machine has more."""
    from mtpbatch.native.devices import build_flags, devices  # loads llama.cpp

    flags = build_flags()
    cpu, *gpus = devices()
    report.say("build", flags)
    report.say("CPU", cpu.description)
    for gpu in gpus:
        report.say(
            gpu.name, f"{gpu.description}, {gpu.free // MIB:,} of {gpu.total // MIB:,} MiB free"
        )
    if not gpus:
        report.say("GPU", "none: this build of llama-cpp-python computes on the CPU")
        for sign, build in GPUS.items():
            if (root / sign).exists():
                found, _, flag = build.partition(": ")
                report.advice.append(
                    f"this machine has {found}, which the build does not use. Run: "
                    f'CMAKE_ARGS="{flag}" {build_anew()}'
                )
    missing = unused_instructions(flags, root)
    if missing:
        report.advice.append(
            f"the CPU has {', '.join(missing)}, which llama-cpp-python was built without. Run: "
            f'CMAKE_ARGS="-DGGML_NATIVE=on" {build_anew()}'
        )


def build_anew() -> str:
    """The command that compiles llama-cpp-python here, whatever wheels of it there are."""
    return (
        "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
        f"llama-cpp-python=={importlib.metadata.version('llama-cpp-python')}"
    )


def unused_instructions(flags: str, root: Path) -> list[str]:
    """Instruction sets that the CPU has and the build has not."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:  # not on Linux
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    of_cpu = set(found[1].split()) if found else set()
    return [
        name
        for kernel, name in INSTRUCTIONS.items()
        if kernel in of_cpu and f"{name} = 1" not in flags
    ]


def look_at_machine(report: Report, load: float, root: Path = Path("/")) -> None:
    """CPUs and memory that this process really has. ``load``: the system's load average."""
    cpus, quota, memory = available_cpus(root), cpu_quota(root), machine_memory(root)
    allowed = "no limit" if quota is None else f"{quota:g} CPUs"
    report.say(
        "CPUs",
        f"{os.cpu_count()} in the machine, {affine_cpus()} by affinity, control group: {allowed}; "
        f"n_threads is {cpus} by default; load average {load:.1f}",
    )
    if quota is not None and quota < cpus:
        report.advice.append(
            f"the control group allows {quota:g} CPUs, less than one for each of {cpus} threads, "
            f"so that steps are held up: open engines with n_threads={max(1, math.floor(quota))}, "
            f"or give it whole CPUs"
        )
    if load > affine_cpus() + 0.5:
        passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        spin = "" if passive else "; OMP_WAIT_POLICY=passive keeps waiting threads from spinning"
        report.advice.append(
            f"others keep the CPUs busy (load average {load:.1f} on {affine_cpus()}), so that "
            f"figures are lower than they could be{spin}"
        )
    limit = "no limit" if memory.limit is None else f"at most {memory.limit // MIB:,} MiB"
    left = f"{memory.available // MIB:,} of {memory.total // MIB:,} MiB available"
    report.say("memory", f"{left}, control group: {limit}")


def look_at_model(report: Report, model: str | None) -> None:
    """Whether it can be loaded, what drafts, and whether it fits."""
    from mtpbatch.native.footprint import footprint  # loads llama.cpp

    memory = machine_memory()
    try:
        with model_path(model) as path:
            plan = footprint(path, EngineConfig(), available=memory.available)
    except MtpBatchError as error:
        report.say("model", f"{model or 'the packaged one'}: it cannot be used")
        report.problems.append(str(error))
        return
    report.say("model", plan.model)
    if plan.no_drafts:
        report.say("drafts", f"none: {plan.no_drafts}")
        report.advice.append(
            f"nothing drafts: {plan.no_drafts}. Engines generate a token a step; for more, take a "
            f"GGUF file with MTP heads, or for a gemma4 model its assistant as draft_model"
        )
    else:
        report.say(
            "drafts",
            f"{plan.drafted_by}, at most {plan.config.n_draft_max} tokens a step by default",
        )
    available = [memory.available, *(device.free for device in plan.devices[1:])]
    for device, free in enumerate(available):
        total, n_seq, n_ctx = plan.total(device), plan.config.n_seq, plan.config.n_ctx
        name = plan.devices[device].name
        report.say("takes", f"{total // MIB:,} MiB on {name}, with n_seq={n_seq}, n_ctx={n_ctx}")
        if plan.at_once(device) > free:
            report.problems.append(
                f"the model does not fit into the {free // MIB:,} MiB that {name} has left: "
                f"mtpbatch plan says which n_seq and n_ctx do"
            )
        elif total > free:
            report.advice.append(
                f"{name} has {free // MIB:,} MiB left, fewer than the engine may come to take: "
                f"lower snapshot_memory, or ask mtpbatch plan what fits"
            )


async def try_out(report: Report) -> None:
    """Generate with the packaged model, with drafts and without: the same, and how fast."""
    try:
        async with Engine.open(
            n_seq=len(PROMPTS), n_ctx=512, n_draft_max=DEPTH, kv_type="f32"
        ) as engine:
            drafted, plain = await _answers(engine, DEPTH), await _answers(engine, 0)
            if any(done.finish_reason == "timeout" for done in (*drafted, *plain)):
                report.say("self-test", f"not done in {PATIENCE:.0f} s")
                report.problems.append(
                    "the packaged model of 3 MB is far too slow here: see what else runs, and "
                    "whether n_threads is more than the CPUs that are really free"
                )
                return
            speeds = await _speeds(engine)
    except MtpBatchError as error:
        report.say("self-test", "failed")
        report.problems.append(f"the packaged model did not generate: {error}")
        return
    compare(report, drafted, plain)
    with_drafts, without = speeds
    report.say(
        "", f"{with_drafts:,.0f} tokens/s with drafts, {without:,.0f} without: in so small a"
    )
    report.say("", "model a draft costs nearly what a token does; mtpbatch bench tells of yours")


def compare(report: Report, drafted: Sequence[Completion], plain: Sequence[Completion]) -> None:
    """The same answers, drafted and not."""
    gaps = [gap_where_they_part(a, b) for a, b in zip(drafted, plain, strict=True)]
    accepted, steps = sum(d.accepted for d in drafted), sum(d.steps for d in drafted)
    per_step = sum(len(d.token_ids) for d in drafted) / steps
    same = "the same answers with and without drafts"
    if any(gaps):
        same += f", but for {sum(gap > 0 for gap in gaps)} in which rounding settled a tie"
    if max(gaps) > NEAR_TIE:
        same = "other answers with drafts than without"
        report.problems.append(
            "drafts change answers, which they never should: this build of llama-cpp-python "
            "computes wrongly. Build it anew; if that does not help, please report it"
        )
    if not accepted:
        report.problems.append(
            "no draft of the packaged model was accepted: its heads do not work with this build of "
            "llama-cpp-python. Build it anew; if that does not help, please report it"
        )
    report.say("self-test", f"{same}; {per_step:.2f} tokens a step with them")


def gap_where_they_part(one: Completion, other: Completion) -> float:
    """How much more probable the first token that differs is in the one; 0: none does."""
    assert one.logprobs is not None
    for i, (token, instead) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if token != instead:
            chosen = one.logprobs[i]
            return abs(chosen.logprob - dict(chosen.top).get(instead, -math.inf))
    return 0.0


async def _answers(engine: Engine, depth: int) -> list[Completion]:
    return await engine.generate_many(
        PROMPTS,
        max_tokens=TOKENS,
        ignore_eos=True,
        speculation=depth,
        logprobs=2,
        timeout=PATIENCE,
    )


async def _speeds(engine: Engine) -> tuple[float, float]:
    """Tokens a second with drafts and without, in turns: of each the median run."""
    runs: dict[int, list[float]] = {DEPTH: [], 0: []}
    end = time.perf_counter() + MEASURED
    while time.perf_counter() < end or len(runs[0]) < 3:
        for depth, speeds in runs.items():
            begin = time.perf_counter()
            done = await engine.generate_many(
                PROMPTS, max_tokens=TOKENS, ignore_eos=True, speculation=depth
            )
            tokens = sum(len(each.token_ids) for each in done)
            speeds.append(tokens / (time.perf_counter() - begin))
    drafted, plain = (sorted(speeds)[len(speeds) // 2] for speeds in runs.values())
    return drafted, plain
