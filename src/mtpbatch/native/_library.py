"""The border to the compiled part: loads it, and turns its status codes into exceptions."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from mtpbatch._llama_cpp import require_llama_cpp
from mtpbatch._process import HomeProcess
from mtpbatch.exceptions import (
    ContextError,
    DecodeError,
    InternalError,
    LibraryMismatchError,
    ModelLoadError,
    MtpAcceptError,
    MtpBadSequenceError,
    MtpBatchError,
    MtpDraftError,
    MtpIncompatibleContextsError,
    MtpInitError,
    MtpInvalidConfigError,
    MtpProcessError,
    MtpStateError,
    NativeError,
)


def _preload(directory: Path) -> None:
    """Load libllama by path, so that the compiled module finds it wherever site-packages is.

    llama_cpp loads the same file: whichever comes first, the process holds one libllama.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = directory / f"libllama.{suffix}"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMismatchError(f"llama-cpp-python's {path} cannot be loaded: {error}") from None


_preload(require_llama_cpp())

try:
    from mtpbatch.native._ffi import ffi, lib
except ImportError as error:  # names of C++ differ with its standard library
    raise LibraryMismatchError(
        f"mtpbatch's compiled part does not fit the llama-cpp-python installed here: {error}; "
        "if other compilers built that, let them build mtpbatch too: "
        "pip install --force-reinstall --no-deps --no-binary mtpbatch mtpbatch"
    ) from None

__all__ = ["Handle", "call", "ffi", "lib"]

_ERRORS: dict[int, type[MtpBatchError]] = {
    lib.MTPBATCH_OUT_OF_MEMORY: NativeError,
    lib.MTPBATCH_LOAD_FAILED: ModelLoadError,
    lib.MTPBATCH_LOAD_CANCELLED: ModelLoadError,
    lib.MTPBATCH_CONTEXT_FAILED: ContextError,
    lib.MTPBATCH_NO_KV_SLOT: DecodeError,
    lib.MTPBATCH_DECODE_FAILED: DecodeError,
    lib.MTPBATCH_SESSION_INIT: MtpInitError,
    lib.MTPBATCH_SESSION_CONFIG: MtpInvalidConfigError,
    lib.MTPBATCH_SESSION_CONTEXTS: MtpIncompatibleContextsError,
    lib.MTPBATCH_SESSION_SEQUENCE: MtpBadSequenceError,
    lib.MTPBATCH_SESSION_PROCESS: MtpProcessError,
    lib.MTPBATCH_SESSION_DRAFT: MtpDraftError,
    lib.MTPBATCH_SESSION_ACCEPT: MtpAcceptError,
    lib.MTPBATCH_SESSION_STATE: MtpStateError,
    lib.MTPBATCH_INTERNAL: InternalError,
}


def call(
    function: Callable[..., int],
    *arguments: Any,
    invalid: Callable[[str], MtpBatchError] = ContextError,
) -> None:
    """Call a function that ends in an error parameter; raise what its status stands for.

    ``invalid`` makes the error for arguments that break a rule of the interface.
    """
    error = ffi.new("mtpbatch_error *")
    try:
        status = function(*arguments, error)
    except OverflowError as overflow:
        raise invalid(str(overflow)) from None
    if status != lib.MTPBATCH_OK:
        raise error_of(status, error.message, invalid)


def error_of(
    status: int, message: Any, invalid: Callable[[str], MtpBatchError] = ContextError
) -> MtpBatchError:
    """The exception a status other than MTPBATCH_OK stands for; ``message`` is a C string."""
    return _ERRORS.get(status, invalid)(ffi.string(message).decode("utf-8", "replace"))


def _free_at_home(home: HomeProcess, free: Callable[[Any], None], pointer: Any) -> None:
    if home.here:
        free(pointer)


class Handle:
    """Owns one native handle: freed by ``close()``, at the end of a ``with`` block on it, or with
    its last reference.

    A call in another thread keeps the native object alive until it returns. In a forked child,
    where llama.cpp's threads do not exist, every use raises :class:`WrongProcessError`, and
    nothing is freed.
    """

    _closed_error: ClassVar[type[MtpBatchError]] = ContextError

    def __init__(self, pointer: Any, free: Callable[[Any], None]) -> None:
        self._home = HomeProcess()
        self._owned: Any = ffi.gc(pointer, partial(_free_at_home, self._home, free))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _native(self) -> Any:
        if self._owned is None:
            raise self._closed_error(f"this {type(self).__name__} is closed")
        self._home.check(type(self).__name__)
        return self._owned

    @property
    def closed(self) -> bool:
        return self._owned is None

    def close(self) -> None:
        """Free the native object, unless something built on it still needs it. Idempotent."""
        self._owned = None
