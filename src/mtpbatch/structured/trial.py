"""Grammars are tried in a process of their own, which may be lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from mtpbatch._process import interpreter
from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.structured.library import require_llguidance
from mtpbatch.types import GrammarSource

_PROGRAM: Final = Path(__file__).with_name("trial_process.py")


class Trial:
    """Starts the process when the first grammar comes, and another one when it was lost.

    A grammar may take ``cpu_seconds`` of a CPU, and ``memory`` bytes of address space with Python
    and the library. Any thread may call; calls wait for each other.
    """

    def __init__(self, *, cpu_seconds: int = 3, memory: int = 2 << 30) -> None:
        self._cpu_seconds = cpu_seconds
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compile(self, source: GrammarSource) -> str:
        """The grammar in llguidance's own JSON, once it has been compiled and tried out.

        Raises :class:`InvalidParameterError` with llguidance's words, or if that takes too much.
        """
        with self._lock:
            answer = self._ask(source)
        if answer is None:
            raise InvalidParameterError(
                source.parameter,
                f"takes more than {self._cpu_seconds} s or {self._memory >> 20} MiB to compile, or "
                f"is nested too deeply; make it smaller",
            )
        if "error" in answer:
            raise InvalidParameterError(source.parameter, f"cannot be done: {answer['error']}")
        return answer["grammar"]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, source: GrammarSource) -> dict[str, str] | None:
        """What the process says; ``None`` if it is lost over that.

        One that was lost before is not the grammar's fault, and is replaced.
        """
        process = self._process
        if process is None or not _tell(process, source):
            self._end()
            process = self._start(source)
            _tell(process, source)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            self._end()
            return None
        answer: dict[str, str] = json.loads(line)
        return answer

    def _start(self, source: GrammarSource) -> subprocess.Popen[str]:
        path = require_llguidance(source.parameter).parent
        python = interpreter()
        if python is None:
            raise InvalidParameterError(
                source.parameter,
                f"cannot be used in this program, as there is no Python interpreter to try it out "
                f"with: sys.executable is {sys.executable!r}; leave it out",
            )
        limits = [str(self._cpu_seconds), str(self._memory)]
        # In a group of its own, as what the terminal tells the app's group is for the app.
        self._process = subprocess.Popen(
            [python, str(_PROGRAM), str(path), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            process_group=0,
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # Closes its pipes, and waits. There may be something in one that nobody has read.
            with suppress(BrokenPipeError), process:
                pass


def _tell(process: subprocess.Popen[str], source: GrammarSource) -> bool:
    """Hand a grammar over; ``False``: nobody is there any more to read it."""
    assert process.stdin is not None
    if process.poll() is not None:  # to write to it would end an app with a SIGPIPE of its own
        return False
    try:
        print(json.dumps([source.parameter, source.text]), file=process.stdin, flush=True)
    except BrokenPipeError:  # it has died since
        return False
    return True
