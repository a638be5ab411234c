"""What a plan says of memory, against what llama.cpp says once the memory is taken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import random_model
from mtpbatch.exceptions import ContextError, InvalidParameterError
from mtpbatch.native import Batch, Context, Executor, Model, MtpSession
from mtpbatch.native.footprint import Footprint, footprint
from mtpbatch.types import EngineConfig

PLENTY = 1 << 40
MIB = 1 << 20
WRITERS: dict[str, Callable[[Path], None]] = {
    "qwen35": random_model.write_random,
    "step35": random_model.write_random_step35,
    "glm4moe": random_model.write_random_glm4moe,
    "gemma4": lambda path: random_model.write_random_gemma4(path, path.with_name("assistant.gguf")),
    "llama": random_model.write_random_dense,
}


@pytest.fixture(scope="module", params=["demo", *WRITERS])
def files(
    request: pytest.FixtureRequest, demo_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EngineConfig]:
    """A model of each kind, and what an engine needs to draft with it."""
    if request.param == "demo":
        return demo_path, EngineConfig()
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    WRITERS[request.param](path)
    assistant = str(path.with_name("assistant.gguf")) if request.param == "gemma4" else None
    return path, EngineConfig(draft_model=assistant)


# Opens a model as an engine does, with llama.cpp's own log on stderr.
OPEN = """
import ctypes, sys
import llama_cpp, msgspec

@llama_cpp.llama_log_callback
def log(level, text, user_data):
    sys.stderr.write(text.decode("utf-8", "replace"))

llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
from mtpbatch.native import NativeBackend
from mtpbatch.types import EngineConfig

config = msgspec.json.decode(sys.argv[2], type=EngineConfig)
NativeBackend(sys.argv[1], config).close()
"""


def logged(path: Path, config: EngineConfig) -> dict[str, float]:
    """MiB that llama.cpp says it has allocated, by its words for what."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path), msgspec.json.encode(config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    sizes: dict[str, float] = {}
    for what, size in re.findall(r"(model|KV|RS|compute) buffer size = +([\d.]+) MiB", done.stderr):
        sizes[what] = sizes.get(what, 0) + float(size)
    return sizes


def planned(plan: Footprint, words: str) -> float:
    """MiB of the parts whose names begin so."""
    return sum(sum(part.n_bytes) for part in plan.parts if part.name.startswith(words)) / MIB


def test_a_plan_is_what_llama_cpp_logs_of_the_real_thing(files: tuple[Path, EngineConfig]) -> None:
    """To 0.02 MiB for each of at most three buffers, as the log has two digits."""
    path, config = files
    config = msgspec.structs.replace(config, n_seq=5, n_ctx=1500)
    plan = footprint(path, config, available=PLENTY)
    sizes = logged(path, config)
    assert planned(plan, "weights") == pytest.approx(sizes["model"], abs=0.06)
    assert planned(plan, "KV cells") == pytest.approx(sizes["KV"], abs=0.06)
    assert planned(plan, "recurrent states") == pytest.approx(sizes.get("RS", 0), abs=0.06)
    assert planned(plan, "compute") == pytest.approx(sizes["compute"], abs=0.06)


@pytest.mark.parametrize(("n_seq", "n_ctx"), [(3, 8000), (64, 1024)])
def test_what_fits_is_what_a_plan_of_that_says(
    files: tuple[Path, EngineConfig], n_seq: int, n_ctx: int
) -> None:
    """To 5 %: found from eight sequences, not by trying each number of them."""
    path, config = files
    config = msgspec.structs.replace(config, snapshot_memory=0)
    growth = footprint(path, config, available=PLENTY).growth[0]
    this = msgspec.structs.replace(config, n_seq=n_seq, n_ctx=n_ctx)
    total = footprint(path, this, available=PLENTY).total(0)
    some = total // 20
    assert growth.most_sequences(n_ctx, total + some) >= n_seq
    assert growth.longest_context(n_seq, total + some, 1 << 20) >= n_ctx
    per_sequence = growth.per_sequence + n_ctx * growth.per_cell
    assert growth.most_sequences(n_ctx, total - some) <= n_seq + max(0, some // per_sequence)
    assert growth.most_sequences(n_ctx, 0) == 0
    assert growth.longest_context(n_seq, 0, 1 << 20) == 0


def test_memory_in_use_is_at_most_what_was_planned(demo_path: Path) -> None:
    """Resident memory of a process whose engine has been given all it can do at once."""
    config = EngineConfig(n_seq=16, n_ctx=2048, kv_type="f32", snapshot_memory=0)
    program = """
import sys
from pathlib import Path

import anyio, msgspec, mtpbatch
from mtpbatch.types import EngineConfig

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

async def main():
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    async with mtpbatch.Engine.open(n_seq=1, n_ctx=64) as engine:
        await engine.generate("a", max_tokens=8, ignore_eos=True)
    before = resident()
    async with mtpbatch.Engine.open(**msgspec.structs.asdict(config)) as engine:
        prompts = [[65 + (i * n) % 50 for i in range(1900)] for n in range(1, 17)]
        await engine.generate_many(prompts, max_tokens=100, ignore_eos=True)
    print(resident() - before)

anyio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, msgspec.json.encode(config)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    plan = footprint(demo_path, config, available=PLENTY)
    cells = planned(plan, "KV cells") + planned(plan, "recurrent")
    taken = int(done.stdout) / MIB
    assert cells < taken < plan.total(0) / MIB + 32  # Python's own, for 30,000 tokens


def test_recurrent_states_that_need_more_than_there_is_are_not_tried(tiny_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"n_seq: recurrent states of 256 .* lower it"):
        footprint(tiny_path, EngineConfig(n_seq=256), available=1 << 20)


def test_cells_whose_lists_need_more_than_there_is_are_not_tried(demo_path: Path) -> None:
    many = EngineConfig(n_seq=8, n_ctx=4096)
    with pytest.raises(InvalidParameterError, match=r"n_ctx: .* lists of 32768 cells .* lower"):
        footprint(demo_path, many, available=4 * MIB - 1)
    few = msgspec.structs.replace(many, n_cells=4096)
    assert footprint(demo_path, few, available=4 * MIB - 1).config.n_cells == 4096


def test_few_cells_and_a_small_batch_are_planned_as_they_are(demo_path: Path) -> None:
    config = EngineConfig(n_seq=1, n_ctx=512, n_batch=4, n_ubatch=5)
    with pytest.raises(InvalidParameterError, match="n_ubatch"):
        footprint(demo_path, config, available=PLENTY)
    config = EngineConfig(n_seq=1, n_ctx=512, n_batch=6)
    assert footprint(demo_path, config, available=PLENTY).config.n_batch == 6
    full = footprint(demo_path, EngineConfig(n_seq=8, n_ctx=1024), available=PLENTY)
    half = footprint(demo_path, EngineConfig(n_seq=8, n_ctx=1024, n_cells=4096), available=PLENTY)
    assert planned(half, "KV cells") == pytest.approx(planned(full, "KV cells") / 2)
    assert planned(half, "recurrent") == pytest.approx(planned(full, "recurrent"))
    assert half.growth == full.growth


def test_a_model_without_weights_refuses_to_run(tiny_path: Path) -> None:
    """llama.cpp would read where nothing is."""
    with Model(tiny_path, weights=False) as model, Context(model, n_ctx=64, n_rs_seq=2) as target:
        assert len(model.tokenize("In the beginning")) > 1
        batch = Batch()
        batch.add(65, 0, 0, output=True)
        with pytest.raises(ContextError, match="without weights"):
            target.decode(batch)
        with pytest.raises(Exception, match="without weights"):
            MtpSession(target, Context.mtp(target), 1, 2)
        with pytest.raises(Exception, match="without weights"):
            Executor(target, None)
