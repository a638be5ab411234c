"""A model on its way: where its file is, and the task that waits while a thread loads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path

from mtpbatch._loops import EventLoop
from mtpbatch.exceptions import InvalidParameterError


def model_path(model: str | os.PathLike[str] | None) -> AbstractContextManager[Path]:
    """The file of a model while the context lasts; ``None`` is the demo model in the package."""
    if model is None:
        return resources.as_file(resources.files("mtpbatch") / "models" / "demo.gguf")
    try:
        return nullcontext(Path(os.fsdecode(model)))
    except TypeError:
        kind = type(model).__name__
        raise InvalidParameterError(
            "model", f"must be the path of a GGUF file, or None for the demo model; got {kind}"
        ) from None


class Loading:
    """The task that waits for a model, and the thread that loads it.

    Made on the task's loop, on which ``progress`` is called with the loaded share. ``failure`` is
    what it raised, if it did: loading stops, and who waits raises it.
    """

    def __init__(self, progress: Callable[[float], object] | None) -> None:
        self._loop = EventLoop.current()
        self._progress = progress
        self._given_up = False
        self.failure: BaseException | None = None

    def give_up(self) -> None:
        """Stop loading at the next report."""
        self._given_up = True

    def report(self, share: float) -> bool:
        """Called by the thread with the loaded share; whether to go on."""
        if self._progress is not None and not self._loop.post(self._show, share):
            self._given_up = True
        return not self._given_up

    def _show(self, share: float) -> None:
        """Called on the loop, where nothing may escape: it is raised by whoever waits."""
        if self._progress is None or self._given_up:
            return
        try:
            self._progress(share)
        except BaseException as error:
            self.failure = error
            self._given_up = True
