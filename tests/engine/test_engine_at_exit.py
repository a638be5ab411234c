"""A program that ends with an engine open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, atexit, sys, threading
import mtpbatch

engines, ready = [], threading.Event()

async def app(path, busy):
    async with mtpbatch.Engine.open(path, n_seq=1, n_ctx=4096, n_threads=1) as engine:
        if busy:
            await anext(engine.submit("In the", max_tokens=4000, ignore_eos=True))
        engines.append(engine)
        ready.set()
        await asyncio.Event().wait()

# After the engine's own handler, which is registered later. Of a dead engine it would raise.
atexit.register(lambda: print(engines[0].stats().running, "running"))
path, state = sys.argv[1:]
threading.Thread(target=asyncio.run, args=(app(path, state == "busy"),), daemon=True).start()
ready.wait()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_interpreter_ends_with_an_engine_open(demo_path: Path, state: str) -> None:
    """Its loop runs in a daemon thread, which is never asked to leave the engine's block."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(demo_path), state],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 running\n", "")
