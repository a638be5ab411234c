"""The process that runs a model, as the app sees it: started, watched, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import Final

from mtpbatch._process import interpreter, same_imports
from mtpbatch.exceptions import InvalidParameterError, NativeDiedError
from mtpbatch.isolated.channel import Channel, Notes

CLOSING_TIME: Final = 5.0  # seconds that it has to end by itself
# For texts: an engine's threads for short ones, long ones, grammars and embeddings ask for some.
_N_TEXTS: Final = 4


class ModelProcess:
    """A process with its channels.

    A thread waits for its end, so that there is never a zombie. It then cuts the channels: their
    other ends might be open in a process that the app has forked just when this one started.
    Another thread kills it when it should have ended. Both are there from the start, as none can be
    started when the interpreter ends.
    """

    def __init__(self, folder: str | None) -> None:
        """Start it in that folder.

        Raises :class:`OSError` or :class:`RuntimeError` if the system does not allow it; then
        nothing is left of it.
        """
        with ExitStack() as undo:
            ours, theirs = [], []
            with ExitStack() as passed:
                for _ in range(4 + _N_TEXTS):
                    our, their = socket.socketpair()
                    undo.callback(our.close)
                    passed.callback(their.close)
                    ours.append(our)
                    theirs.append(their.fileno())
                self._process = _start(theirs, folder)
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            steps, notes, grammars, embeddings, *texts = ours
            self.notes = Notes(notes)
            self.steps = Channel(steps)
            self.texts = [Channel(end) for end in texts]
            self.grammars = Channel(grammars)
            self.embeddings = Channel(embeddings)
            self._channels = (self.steps, self.grammars, self.embeddings, *self.texts)
            self._ending = threading.Event()  # it should end soon, or has
            self._over = threading.Event()
            self._threads = [
                threading.Thread(target=work, name=f"mtpbatch-process-{self.pid}", daemon=True)
                for work in (self._watch, self._hurry)
            ]
            for thread in self._threads:
                thread.start()
            undo.pop_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def death(self, why: str = "") -> NativeDiedError:
        """Why a channel hung up. A process that lives on without is of no use, and is killed.

        ``why``: what it is killed for, if it is not that. A process that a driver holds may not end
        even so: nobody waits for it any more.
        """
        killed = not self._over.is_set()
        self.kill()
        if not self._over.wait(CLOSING_TIME):
            for channel in self._channels:
                channel.cut()
        returncode = self._process.returncode
        if returncode is None:
            returncode = -signal.SIGKILL
        return NativeDiedError(returncode, why=why if killed else "")

    def kill(self) -> None:
        """Have it end at once."""
        self._process.kill()

    def end_in_time(self) -> None:
        """Kill it when it has had its time to end. From any thread."""
        self._ending.set()

    def close(self) -> None:
        """End it, and wait for that. Nobody begins to use it any more."""
        self._ending.set()
        self.notes.hang_up()
        for channel in self._channels:
            channel.hang_up()
        if self._over.wait(2 * CLOSING_TIME):  # else nothing can end it, nor its threads
            for thread in self._threads:
                thread.join()
        for channel in self._channels:
            channel.close()

    def _watch(self) -> None:
        self._process.wait()
        self._over.set()
        self._ending.set()
        for channel in self._channels:
            channel.cut()

    def _hurry(self) -> None:
        self._ending.wait()
        if not self._over.wait(CLOSING_TIME):
            self.kill()


def _start(fds: list[int], folder: str | None) -> subprocess.Popen[bytes]:
    """Start the program; these descriptors are its ends of the channels."""
    python = interpreter()
    if python is None:
        raise InvalidParameterError(
            "isolation",
            f'cannot be "process" in this program, as there is no Python interpreter to run the '
            f'other one: sys.executable is {sys.executable!r}; leave it at "none"',
        )
    # In a group of its own, as what the terminal tells the app's group is for the app.
    return subprocess.Popen(
        [python, "-P", "-m", "mtpbatch.isolated", str(os.getpid()), *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if _has_stderr() else subprocess.DEVNULL,
        cwd=folder,
        # ggml would have a debugger look at what aborts, where one is installed, and wait for that.
        env={**same_imports(), "GGML_NO_BACKTRACE": "1"},
        process_group=0,
    )


def _has_stderr() -> bool:
    """Whether there is one to inherit: daemons close it, and other files get its number then."""
    try:
        return os.get_inheritable(2)
    except OSError:
        return False
