"""Model files that nobody vouches for, tried out in a process of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import anyio
import msgspec
from anyio.abc import ByteReceiveStream

from mtpbatch._process import interpreter, same_imports
from mtpbatch.exceptions import InternalError, InvalidParameterError, ModelLoadError
from mtpbatch.probing.messages import Found, Probe
from mtpbatch.types import EngineConfig, parse

__all__ = ["command", "environment", "how_it_ended", "probe_model"]

_MORE_MEMORY: Final = 4 << 30  # than twice the files: for Python, llama.cpp and what a step needs


async def probe_model(
    model: str | os.PathLike[str],
    *,
    draft_model: str | os.PathLike[str] | None = None,
    lora: Mapping[str, float] | None = None,
    timeout: float = 300.0,  # noqa: ASYNC109 (what it raises names the file)
    memory: int | None = None,
) -> None:
    """Find out whether a model file that is not trusted can be loaded and used.

    ::

        await mtpbatch.probe_model("uploaded.gguf")
        async with mtpbatch.Engine.open("uploaded.gguf") as engine: ...

    llama.cpp ends the process over some files that contradict themselves. Here that is another
    process: it loads the file and generates a few tokens with it, on the CPU. Between the two calls
    nobody should be able to write to the file.

    Args:
        model: the GGUF file; of a split model the first part.
        draft_model: that of an assistant, as in :class:`~mtpbatch.EngineConfig`.
        lora: those of adapters, as in :class:`~mtpbatch.EngineConfig`.
        timeout: seconds that it may take.
        memory: bytes of address space that it may take. None: twice the size of the files, and
            4 GiB.

    Raises:
        ModelLoadError: the file cannot be used; it says why, or how the process ended.
        InvalidParameterError: an argument is wrong.

    This is for files that do harm by mistake. One that is made to take over the process that loads
    it is not kept from anything but the app's memory.
    """
    if not timeout > 0:
        raise InvalidParameterError("timeout", f"must be more than 0 seconds, got {timeout}")
    if memory is not None and memory < 1:
        raise InvalidParameterError("memory", f"must be at least 1 byte, or None; got {memory}")
    lora = {os.fspath(adapter): scale for adapter, scale in (lora or {}).items()}
    draft_model = None if draft_model is None else os.fspath(draft_model)
    parse(EngineConfig, {"draft_model": draft_model, "lora": lora})
    probe = Probe(os.fspath(model), draft_model, lora)
    python = interpreter()
    if python is None:
        raise ModelLoadError(
            f"{probe.model}: cannot be tried out in this program, as there is no Python "
            f"interpreter to do it with: sys.executable is {sys.executable!r}; do it in another one"
        )
    if memory is None:
        files = map(Path, filter(None, [probe.model, probe.draft_model, *probe.lora]))
        memory = 2 * sum(map(_size, files)) + _MORE_MEMORY
    with anyio.move_on_after(timeout):
        status, out, words = await _run(command(python, memory), msgspec.json.encode(probe) + b"\n")
        try:
            found = msgspec.json.decode(out, type=Found)
        except msgspec.DecodeError:  # nothing, as a rule
            how = how_it_ended(status, words.decode("utf-8", "replace"))
            raise ModelLoadError(f"{probe.model}: {how}") from None
        if found.error is not None:
            raise ModelLoadError(found.error)
        return
    raise ModelLoadError(f"{probe.model}: takes more than {timeout:g} s to load and try out")


async def _run(arguments: list[str], text: bytes) -> tuple[int, bytes, bytes]:
    """Run a program that reads a text: its status, and what it wrote as output and errors.

    As ``anyio.run_process``, but its start cannot be cancelled: on asyncio that leaves pipes open,
    and a process of which nobody takes in that it has ended.
    """
    with anyio.CancelScope(shield=True):
        process = await anyio.open_process(arguments, env=environment())
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise InternalError("a process was started without pipes")
    out, errors = bytearray(), bytearray()

    async def read(stream: ByteReceiveStream, into: bytearray) -> None:
        async for part in stream:
            into += part

    async with process, anyio.create_task_group() as group:
        group.start_soon(read, process.stdout, out)
        group.start_soon(read, process.stderr, errors)
        with contextlib.suppress(anyio.BrokenResourceError):  # it has ended already
            await process.stdin.send(text)
        await process.stdin.aclose()
    return await process.wait(), bytes(out), bytes(errors)


def command(python: str, memory: int) -> list[str]:
    """The program that tries files out, one for each line of its input, in that much memory."""
    return [python, "-P", "-m", "mtpbatch.probing", str(memory)]


def environment() -> dict[str, str]:
    """Its environment: it finds what this process finds, and leaves no trace of its stack."""
    return {**same_imports(), "GGML_NO_BACKTRACE": "1"}


def how_it_ended(status: int, stderr: str) -> str:
    """What became of the program, and what it had to say."""
    try:
        how = f"by {signal.Signals(-status).name}"
    except ValueError:
        how = f"with status {status}"
    text = f"the process that tried it out ended {how}"
    said = [line for line in stderr.splitlines() if line.strip()]
    return f"{text}: {said[-1][:300]}" if said else text


def _size(path: Path) -> int:
    """Bytes of a model file, with its other parts if it is split."""
    split = re.fullmatch(r"(.+)-\d{5}(-of-\d{5}\.gguf)", path.name)
    parts: Iterable[Path] = [path]
    if split is not None:
        parts = (p for p in path.parent.iterdir() if p.name.startswith(split[1]))
    return sum(part.stat().st_size for part in parts if part.is_file())
