"""Where llguidance is, the library that knows which tokens a grammar allows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

from mtpbatch.exceptions import InvalidParameterError

VERSION: Final = "1.9.1"
"""The one whose C interface ``csrc/llguidance.h`` declares."""


def require_llguidance(parameter: str) -> Path:
    """Its package's folder. ``parameter`` is what needs it.

    Raises :class:`InvalidParameterError` if it is not installed, or in another version.
    """
    spec = importlib.util.find_spec("llguidance")
    version = importlib.metadata.version("llguidance") if spec else None
    if spec is None or spec.origin is None or version != VERSION:
        found = f"llguidance {version}" if version else "none"
        raise InvalidParameterError(
            parameter,
            f"needs llguidance {VERSION}, and {found} is installed: "
            "pip install 'mtpbatch[structured]'",
        )
    return Path(spec.origin).parent
