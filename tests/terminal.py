"""Programs as somebody sees them who runs them on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping, Sequence


def screen_of(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """All that a program writes to a pseudo-terminal, which it has to leave in good order."""
    primary, secondary = pty.openpty()
    with subprocess.Popen(
        command, stdin=secondary, stdout=secondary, stderr=secondary, env=environment
    ) as process:
        os.close(secondary)
        chunks = []
        while True:
            try:
                chunk = os.read(primary, 65536)
            except OSError:  # on Linux: the other end was closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        os.close(primary)
        assert process.wait(timeout=120) == 0
    return b"".join(chunks).decode()
