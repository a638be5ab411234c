"""Model files that are damaged or lie: they are refused, and end no process but their own."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections import Counter
from pathlib import Path

import anyio
import pytest

import fuzz_gguf
import mtpbatch
import random_adapter
import random_model
from mtpbatch.exceptions import InvalidParameterError, ModelLoadError
from patience import until


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_gguf.tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def aborting_path(tiny_path: Path) -> Path:
    """Has experts and uses none, over which llama.cpp ends the process."""
    path = tiny_path.with_name("aborting.gguf")
    random_model.write_random_glm4moe(path, vocab=300)
    data = bytearray(path.read_bytes())
    name = b"glm4moe.expert_used_count"
    at = data.index(name) + len(name) + 4  # behind its type
    assert data[at : at + 4] == bytes([1, 0, 0, 0])
    data[at] = 0
    path.write_bytes(data)
    return path


@pytest.mark.anyio
async def test_a_sound_file_passes(tiny_path: Path) -> None:
    await mtpbatch.probe_model(tiny_path)


@pytest.mark.anyio
async def test_a_file_that_ends_the_process_is_refused_with_its_last_words(
    aborting_path: Path,
) -> None:
    with pytest.raises(ModelLoadError, match=r"aborting\.gguf: .* SIGABRT.*GGML_ASSERT"):
        await mtpbatch.probe_model(aborting_path)


@pytest.mark.anyio
async def test_what_loading_says_of_a_file_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent\.gguf: no such file"):
        await mtpbatch.probe_model(tmp_path / "absent.gguf")


@pytest.mark.anyio
async def test_the_other_files_are_tried_out_as_well(tiny_path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    random_adapter.write_random_adapter(adapter, tiny_path)
    await mtpbatch.probe_model(tiny_path, lora={str(adapter): 0.5})
    adapter.write_bytes(adapter.read_bytes()[:200])
    with pytest.raises(ModelLoadError, match=r"adapter\.gguf"):
        await mtpbatch.probe_model(tiny_path, lora={str(adapter): 0.5})
    with pytest.raises(ModelLoadError, match=r"draft\.gguf: no such file"):
        await mtpbatch.probe_model(tiny_path, draft_model=tmp_path / "draft.gguf")


@pytest.mark.anyio
async def test_memory_is_bounded(tiny_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: "):
        await mtpbatch.probe_model(tiny_path, memory=64 << 20)


@pytest.mark.anyio
async def test_time_is_bounded_and_the_process_ends(tiny_path: Path) -> None:
    before = _children()
    with pytest.raises(ModelLoadError, match=r"takes more than 0.001 s"):
        await mtpbatch.probe_model(tiny_path, timeout=0.001)
    await until(lambda: _children() <= before)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_start_that_is_given_up_leaves_nothing_open(tiny_path: Path, backend: str) -> None:
    async def give_up() -> None:
        with pytest.raises(ModelLoadError, match=r"takes more than 0.001 s"):
            await mtpbatch.probe_model(tiny_path, timeout=0.001)

    for _ in range(10):
        anyio.run(give_up, backend=backend)
    gc.collect()  # what is open or not waited for warns


@pytest.mark.anyio
async def test_who_gives_up_ends_the_process(tiny_path: Path) -> None:
    before = _children()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await mtpbatch.probe_model(tiny_path)
    await until(lambda: _children() <= before)


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "value"), [("executable", None), ("frozen", True)])
async def test_an_app_that_is_its_own_interpreter_is_not_started_again(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf: .* no Python interpreter"):
        await mtpbatch.probe_model(tiny_path)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"memory": 0}, "memory"),
        ({"lora": {"adapter.gguf": float("inf")}}, "lora"),
    ],
)
async def test_wrong_arguments(tiny_path: Path, arguments: dict[str, object], name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"^{name}: ") as caught:
        await mtpbatch.probe_model(tiny_path, **arguments)  # type: ignore[arg-type]
    assert caught.value.parameter == name


@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_damage_at_any_place_ends_no_other_process(
    model: str, tiny_path: Path, tmp_path: Path
) -> None:
    """A sample of what `tools/fuzz_gguf.py` does at 500 places. What llama.cpp would abort on in
    these two models is refused before, so that none ends its own process either."""
    path = random_model.DEMO_MODEL if model == "demo" else tiny_path
    damages = fuzz_gguf.places(path, 30, seed=3)
    results = list(fuzz_gguf.fuzz(path, damages, tmp_path))
    assert [result.damage for result in results] == damages
    outcomes = Counter(result.outcome for result in results)
    assert not outcomes["late"]
    assert not outcomes["died"]
    assert outcomes["works"], "bits of weights and texts do no harm"
    assert outcomes["error"], "files that are cut off are refused"
    for result in results:
        if result.damage.bit is None:
            assert result.outcome == "error"


def _children() -> set[str]:
    """Processes that this one has started and that live, or nobody has waited for."""
    if sys.platform != "linux":
        return set()
    tasks = Path("/proc/self/task")
    children: set[str] = set()
    for task in os.listdir(tasks):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children |= set((tasks / task / "children").read_text().split())
    return children
