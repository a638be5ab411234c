"""The compiled module. What it declares stands in csrc/mtpbatch.h; here everything is Any."""

from typing import Any

ffi: Any
lib: Any
