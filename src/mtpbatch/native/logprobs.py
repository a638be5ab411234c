"""From logits to log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.native._library import call, ffi, lib
from mtpbatch.types import MAX_LOGPROBS, TokenLogprobs


def from_native(native: Any) -> TokenLogprobs:
    """What a ``mtpbatch_token_logprobs`` says."""
    n = native.n_top
    top = zip(ffi.unpack(native.top, n), ffi.unpack(native.top_logprobs, n), strict=True)
    return TokenLogprobs(native.token, native.logprob, native.rank, tuple(top) if n else ())


def token_logprobs(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int], n_top: int = 0
) -> list[TokenLogprobs]:
    """How probable each row's token is, as an engine tells it, for loops of one's own.

    ::

        import numpy as np

        logits = np.log(np.array([[0.5, 0.3, 0.2]], dtype=np.float32))
        [told] = token_logprobs(logits, [1], n_top=1)
        assert told.rank == 2 and told.top[0][0] == 0

    Args:
        logits: a float32 array of [rows, vocabulary]. One that is not a number counts as minus
            infinity.
        token_ids: one for each row.
        n_top: how many of the most probable tokens to name beside it, 0 to 20.

    Raises:
        InvalidParameterError: ``logits`` is of another type or shape, has not one row for each
            token, or a value is out of range.
    """
    wanted = "must be a float32 array of [rows, vocabulary]"
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 2:
        raise InvalidParameterError("logits", f"{wanted}, got {type(logits).__name__}")
    n_rows, n_vocab = logits.shape
    if len(token_ids) != n_rows or not all(0 <= token < n_vocab for token in token_ids):
        raise InvalidParameterError(
            "token_ids",
            f"must hold {n_rows} token ids, one for each row, from 0 to {n_vocab - 1}; "
            f"got {list(token_ids)}",
        )
    if not 0 <= n_top <= MAX_LOGPROBS:
        raise InvalidParameterError("n_top", f"must be from 0 to {MAX_LOGPROBS}, got {n_top}")
    logits = np.ascontiguousarray(logits)
    data = ffi.cast("float *", logits.ctypes.data)
    found = ffi.new("mtpbatch_token_logprobs[]", n_rows)
    call(lib.mtpbatch_score, data, n_rows, n_vocab, list(token_ids), n_top, found)
    return [from_native(found[row]) for row in range(n_rows)]
