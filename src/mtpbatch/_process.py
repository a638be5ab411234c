"""Noticing a fork: threads and native state exist only in the process that made them."""

from __future__ import annotations

import os

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
