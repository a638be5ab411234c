"""Whatever llama.cpp does wrong, only those end whom it concerns, and the next answers are right.

The native part as it is released, in a process of its own: a library that is preloaded stands
between it and llama.cpp, and fails on command. ``under_faults.py`` says what is failed, and what
has to hold.
"""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", ["tiny", "glm"], ids=["recurrent", "attention"])
def test_faults_below_end_those_whom_they_concern(
    request: pytest.FixtureRequest, faults_path: str, scenario: str, kind: str
) -> None:
    model: Model = request.getfixturevalue(kind)
    tests = HERE.parent
    environment = os.environ | {
        "LD_PRELOAD": faults_path,
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
