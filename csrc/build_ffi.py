"""Write the C source of the ``mtpbatch.native._ffi`` module: run by CMake, needs only cffi.

usage: python build_ffi.py mtpbatch.h OUTPUT.c
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI


def declarations(header: str) -> str:
    """The slice of the header that cffi reads, between its two marks."""
    _, _, rest = header.partition("/* cffi: begin */")
    text, mark, _ = rest.partition("/* cffi: end */")
    if not mark:
        raise SystemExit("mtpbatch.h: the cffi marks are missing")
    return text


def main(header: Path, output: Path) -> None:
    ffi = FFI()
    ffi.cdef(declarations(header.read_text()))
    # Implemented in Python: forwards a loading progress to the callable behind `user`.
    ffi.cdef('extern "Python" bool mtpbatch_report_progress(float fraction, void * user);')
    ffi.set_source("mtpbatch.native._ffi", '#include "mtpbatch.h"')
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
