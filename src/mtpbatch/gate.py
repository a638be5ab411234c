"""Whether an engine takes calls: it may drain, be closed or dead, or belong to another process."""

from __future__ import annotations

import threading

from mtpbatch._process import HomeProcess
from mtpbatch.exceptions import EngineClosedError, EngineDeadError, EngineError


class Gate:
    """What every call on an engine passes.

    ``draining``, ``closing`` and ``failure`` change only under ``lock``, which is held for moments,
    and never change back. Who lets something in that is to end with the engine checks under the
    lock as well, so that nothing comes in after the end.
    """

    def __init__(self) -> None:
        self.home = HomeProcess()
        self.lock = threading.RLock()
        self.draining = False
        self.closing = False
        self.failure: BaseException | None = None

    def drain(self) -> bool:
        """Let no new requests in; whether this is the first time."""
        with self.lock:
            first, self.draining = not self.draining, True
        return first

    def close(self, failure: BaseException | None = None) -> None:
        """Let nobody in any more: the engine is being closed, or has died of a failure."""
        with self.lock:
            self.closing = True
            if failure is not None:
                self.failure = failure

    def check_alive(self) -> None:
        """Raise if the engine has died, or is the parent's of this process."""
        self.home.check("engine")
        if self.failure is not None:
            raise self.end_error()

    def check_open(self) -> None:
        """Raise if the engine serves nobody any more."""
        self.check_alive()
        if self.closing:
            raise self.end_error()

    def check_accepting(self) -> None:
        """Raise if the engine takes no new requests."""
        self.check_open()
        if self.draining:
            raise EngineClosedError(
                "the engine is draining: it takes no new requests; send them to another one"
            )

    def end_error(self) -> EngineError:
        """What to tell those whom the engine's end has left without an answer."""
        if self.failure is None:
            return EngineClosedError("the engine is closed; open another one")
        error = EngineDeadError(f"the engine died: {self.failure!r}; open another one")
        error.__cause__ = self.failure
        return error
