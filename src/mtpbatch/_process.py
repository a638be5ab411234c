"""Where a process begins and ends: forks, in which threads and native state do not exist; exit;
and what other processes are started with."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Protocol
from weakref import WeakSet

from mtpbatch.exceptions import WrongProcessError


class HomeProcess:
    """The process in which this object was made."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def here(self) -> bool:
        """Whether that is the process now running."""
        return os.getpid() == self._pid

    def check(self, what: str) -> None:
        """Raise :class:`WrongProcessError` in any other process."""
        if not self.here:
            raise WrongProcessError(
                f"this {what} belongs to process {self._pid}, and this is its forked child "
                f'{os.getpid()}; open one here, or start workers with the "spawn" method'
            )


def interpreter() -> str | None:
    """The Python that runs programs of this package; ``None``: there is none.

    What a frozen app has there is the app, which would start itself again and again.
    """
    return None if getattr(sys, "frozen", False) else sys.executable or None


def same_imports() -> dict[str, str]:
    """An environment in which another process imports what this one does."""
    # What is no text there is passed over by imports, too.
    path = [entry for entry in sys.path if isinstance(entry, str) and entry]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class _Closable(Protocol):
    def close(self) -> None: ...


_left_open: WeakSet[_Closable] = WeakSet()


def close_at_exit(resource: _Closable) -> None:
    """Have it closed before the interpreter takes itself apart, if it still exists then.

    That happens after every engine has been stopped, as exit handlers are called in reverse order:
    the one below was registered when this module was imported, before there was any engine. The
    native layer comes too late for that, since engines import it on their threads.
    """
    _left_open.add(resource)


def no_longer_open(resource: _Closable) -> None:
    """It is being closed, and not to be closed at exit any more."""
    _left_open.discard(resource)


@atexit.register
def _close_what_is_left() -> None:
    for resource in list(_left_open):
        resource.close()
