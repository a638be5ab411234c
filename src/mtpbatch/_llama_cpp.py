"""The llama-cpp-python that mtpbatch uses, if it is the one it was compiled against.

libllama's ABI changes between versions, so any other is refused before anything of it is loaded.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from mtpbatch._built_with import LLAMA_CPP_PYTHON
from mtpbatch.exceptions import LibraryMismatchError


def require_llama_cpp() -> Path:
    """The directory of its libraries.

    Raises:
        LibraryMismatchError: another version is installed, or none; it says what to do.
    """
    mend = f'run: pip install "llama-cpp-python=={LLAMA_CPP_PYTHON}"'
    try:
        distribution = importlib.metadata.distribution("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise LibraryMismatchError(
            f"mtpbatch was compiled against llama-cpp-python {LLAMA_CPP_PYTHON}, "
            f"but none is installed; {mend}"
        ) from None
    if distribution.version != LLAMA_CPP_PYTHON:
        raise LibraryMismatchError(
            f"mtpbatch was compiled against llama-cpp-python {LLAMA_CPP_PYTHON}, "
            f"but {distribution.version} is installed; {mend}"
        )
    return Path(str(distribution.locate_file("llama_cpp/lib")))
