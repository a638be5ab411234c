"""Build the native part with a sanitizer, and run its tests.

    python tools/sanitize.py address [pytest's arguments ...]
    python tools/sanitize.py thread  [pytest's arguments ...]

`address` finds use of memory that is not there or not ours any more, undefined behaviour and, at
the end, leaks: memory that our code or what it called has taken and nobody can give back. `thread`
finds data races. By default the tests are those in `tests/native` and `tests/truth`.

It needs GCC on Linux, and the packages of `mtpbatch[dev]` with cffi, cmake, ninja and
scikit-build-core (nothing is built in isolation) in the environment that runs it, which it
leaves as it is: the build goes into an environment of its own that finds the others'
packages, llama-cpp-python's too. So llama.cpp is not built anew, and neither it nor Python is
instrumented. `tools/sanitizers/` says what is therefore not reported.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SUPPRESSIONS: Final = ROOT / "tools" / "sanitizers"
RUN_TESTS: Final = SUPPRESSIONS / "run_tests.py"
# Tests take many times as long as pytest is told to be patient for.
QUIETLY: Final = ("-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0")
DEFAULT_TESTS: Final = ("tests/native", "tests/truth")
# The error there names libggml instead, which a sanitized build loads before the library that the
# test is about.
_LIBRARY: Final = (
    "tests/native/test_library.py::"
    "test_a_libllama_without_what_is_needed_is_refused_with_the_remedy"
)
# In its figure are three more bytes, or so, for each that threads share.
_FOOTPRINT: Final = "tests/native/test_footprint.py::test_memory_in_use_is_at_most_what_was_planned"
NOT_RUN: Final = {"address": (_LIBRARY,), "thread": (_LIBRARY, _FOOTPRINT)}

_OURS: Final = re.compile(r"_ffi\.abi3|/csrc/")
_RUNTIMES: Final = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def build(kind: str, folder: Path) -> Path:
    """An environment with a sanitized build, which finds this one's packages; its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Not as a site directory, whose own .pth files would bring an editable mtpbatch to the front.
    Path(packages, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
            *("--no-build-isolation", "--no-deps", "--no-cache-dir"),
            *("-C", f"build-dir={folder / 'build'}", "-C", "install.strip=false"),
            *("-C", "cmake.define.CMAKE_CXX_COMPILER=g++"),
            *("-C", f"cmake.define.MTPBATCH_SANITIZE={kind}", ROOT),
        ],
        # Constraints for isolated builds, as CI sets them, are refused for others.
        env={name: value for name, value in os.environ.items() if name != "PIP_BUILD_CONSTRAINT"},
        check=True,
    )
    return python


def environment(kind: str, folder: Path) -> dict[str, str]:
    """What a sanitizer's runtime is told, and how it comes before anything else."""
    # libstdc++ too: what watches exceptions has to find it when the process starts.
    preloaded = [_library(name) for name in (*_RUNTIMES[kind], "libstdc++.so.6")]
    # In files, as pytest keeps what tests that pass have written.
    reports = f"log_path={folder / 'report'}"
    settings = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "OMP_WAIT_POLICY": "passive",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:{reports}",
    }
    if kind == "address":
        # Python's own allocator would hide what is behind it. Leaks are looked at afterwards: the
        # status is that of the tests, as Python leaves memory behind on purpose.
        settings["PYTHONMALLOC"] = "malloc"
        # A test preloads a library of its own before the runtime.
        settings["ASAN_OPTIONS"] = (
            "strict_string_checks=1:detect_stack_use_after_return=1:verify_asan_link_order=0:"
            + reports
        )
        settings["LSAN_OPTIONS"] = "exitcode=0"
    else:
        settings["OMP_NUM_THREADS"] = "1"
        settings["TSAN_OPTIONS"] = (
            f"suppressions={SUPPRESSIONS / 'thread.txt'}:exitcode=66:second_deadlock_stack=1:"
            f"history_size=4:{reports}"
        )
    return settings


def findings(folder: Path) -> Iterator[str]:
    """What the sanitizer has reported; of leaks, those with a frame of ours."""
    for path in sorted(folder.glob("report.*")):
        report = path.read_text(errors="replace")
        if "LeakSanitizer" in report:
            yield from (leak for leak in report.split("\n\n") if _OURS.search(leak))
        else:
            yield report


def _library(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=tuple(_RUNTIMES))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for pytest")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = build(asked.kind, folder)
        # Without random addresses, which ThreadSanitizer cannot place its shadow among.
        fixed = ["setarch", "-R"] if asked.kind == "thread" else []
        ended = subprocess.run(
            [
                *fixed,
                *(python, "-u", RUN_TESTS, *QUIETLY),
                *(f"--deselect={test}" for test in NOT_RUN[asked.kind]),
                *(asked.arguments or DEFAULT_TESTS),
            ],
            cwd=ROOT,
            env=environment(asked.kind, folder),
        )
        found = list(findings(folder))
    for report in found:
        print(report, file=sys.stderr)
    if found or ended.returncode:
        raise SystemExit(f"{len(found)} findings; pytest ended with status {ended.returncode}")


if __name__ == "__main__":
    main()
