"""pytest, as tools/sanitize.py runs it. The arguments are pytest's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

_Popen = subprocess.Popen


class _AmongOurs(_Popen[Any]):
    """The sanitizer stays with Python. Compilers do not bear it, and grammars are tried out in
    2 GiB of address space, where it needs terabytes. None of the code that it is for runs there."""

    def __init__(self, args: Any, **options: Any) -> None:
        program, *rest = map(str, args)
        if program != sys.executable or any(arg.endswith("trial_process.py") for arg in rest):
            environment = options.get("env") or os.environ
            options["env"] = {k: v for k, v in environment.items() if k != "LD_PRELOAD"}
        super().__init__(args, **options)


if __name__ == "__main__":
    subprocess.Popen = _AmongOurs  # type: ignore[misc, assignment]
    sys.exit(pytest.main(sys.argv[1:]))
