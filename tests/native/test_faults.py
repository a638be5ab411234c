"""Whatever llama.cpp does wrong, only those end whom it concerns, and the next answers are right.

The native part as it is released, in a process of its own: a library that is preloaded stands
between it and llama.cpp, and fails on command. ``under_faults.py`` says what is failed, and what
has to hold.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtpbatch.native import Model

HERE = Path(__file__).parent
SCENARIOS = ("decode", "seq_rm", "states", "large", "small", "hang")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the way to preload is that of Linux"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the compiler that the native part needs as well."""
    path = tmp_path_factory.mktemp("faults") / "libfaults.so"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    found = importlib.util.find_spec("llama_cpp")  # wherever that is installed
    assert found is not None
    assert found.origin is not None
    include = Path(found.origin).parents[1] / "include"
    source = str(HERE / "faults.cpp")
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run(
        [compiler, *flags, f"-isystem{include}", source, "-o", str(path), "-ldl"], check=True
    )
    return path


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", ["tiny", "glm"], ids=["recurrent", "attention"])
def test_faults_below_end_those_whom_they_concern(
    request: pytest.FixtureRequest, library: Path, scenario: str, kind: str
) -> None:
    model: Model = request.getfixturevalue(kind)
    tests = HERE.parent
    # Before others that are preloaded, such as a sanitizer, whose `new` would be found first.
    preloaded = [str(library), os.environ.get("LD_PRELOAD", "")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded).strip(),
        "PYTHONPATH": str(tests),
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "under_faults.py"), scenario, str(model.path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all held\n")
