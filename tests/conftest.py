"""What tests of all kinds share: the models they run on."""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import random_model
from tinymtp import gguf_file

# Tests share the CPUs with others. OpenMP's threads spin while they wait for one that does not run,
# unless this is set before llama.cpp is loaded: three of these processes on two CPUs are seven
# times slower then.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How long an example takes says how busy the machine is. Where CI is set, Hypothesis would play the
# same examples each time.
settings.register_profile("no deadline", deadline=None, derandomize=False)
settings.load_profile("no deadline")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every test marked ``anyio`` runs on all three event loops."""
    return request.param


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The model that comes in the package (Q8_0)."""
    return Path(str(importlib.resources.files("mtpbatch") / "models" / "demo.gguf"))


@pytest.fixture(scope="session")
def demo_f32_path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with f32 weights: for tests that assert equality."""
    path = tmp_path_factory.mktemp("models") / "demo-f32.gguf"
    gguf_file.to_f32(demo_path, path)
    return path


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random attention-only model without MTP heads."""
    path = tmp_path_factory.mktemp("models") / "dense.gguf"
    random_model.write_random_dense(path)
    return path


@pytest.fixture(scope="session")
def faults_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is to be preloaded by a process whose native part is to fail: ``faults.cpp``.

    Built with the compiler that the native part needs as well.
    """
    path = tmp_path_factory.mktemp("faults") / "libfaults.so"
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    found = importlib.util.find_spec("llama_cpp")  # wherever that is installed
    assert found is not None
    assert found.origin is not None
    include = Path(found.origin).parents[1] / "include"
    source = str(Path(__file__).parent / "native" / "faults.cpp")
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    subprocess.run(
        [compiler, *flags, f"-isystem{include}", source, "-o", str(path), "-ldl"], check=True
    )
    # Before others that are preloaded, such as a sanitizer, whose `new` would be found first.
    return f"{path} {os.environ.get('LD_PRELOAD', '')}".strip()
