"""From logits to tokens."""

from __future__ import annotations

import secrets
import threading
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt

from mtpbatch.exceptions import InvalidParameterError, NativeError
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.types import EngineConfig, SamplingParams, parse

INT32_MAX = 2**31 - 1


def sampling(params: SamplingParams, seed: int) -> list[float | int]:
    """What fills a ``mtpbatch_sampling``."""
    top_k = min(params.top_k, INT32_MAX)
    return [params.temperature, top_k, params.top_p, params.min_p, seed]


class Sampler(Handle):
    """Picks tokens as an engine does for one request, for loops of one's own.

    What it picks is what llama.cpp's samplers top_k, top_p, min_p, temp and dist, chained in this
    order, pick from the whole vocabulary; a logit that is not a number counts as minus infinity.
    Any thread may call; calls wait for each other.

    Args:
        temperature: 0 takes the most probable token; 1 samples the model's own distribution.
        top_k: sample among the k most probable tokens. 0: all.
        top_p: sample among the fewest tokens whose probabilities reach this sum. 1: all.
        min_p: drop tokens less probable than this share of the best one's probability. 0: none.
        seed: same seed, same logits: same tokens. None: a fresh one.
        n_threads: threads that look through the rows of one call.

    Raises:
        InvalidParameterError: a value is out of range.
    """

    _closed_error = NativeError

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        n_threads: int = 1,
    ) -> None:
        values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        params = parse(SamplingParams, {**values, "seed": seed})
        parse(EngineConfig, {"n_threads": n_threads})
        fresh = secrets.randbits(32) if params.seed is None else params.seed
        native = ffi.new("mtpbatch_sampling *", sampling(params, fresh))
        out = ffi.new("mtpbatch_sampler **")
        call(lib.mtpbatch_sampler_create, native, n_threads, out)
        super().__init__(out[0], lib.mtpbatch_sampler_free)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Sampler{': closed' if self.closed else ''}>"

    def close(self) -> None:
        with self._lock if self._home.here else nullcontext():
            super().close()

    def sample(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """One token for each row of ``logits``, a float32 array of [rows, vocabulary].

        Rows take one random number each, in order.

        Raises:
            InvalidParameterError: ``logits`` is of another type or shape, or has no columns.
        """
        native = self._native
        wanted = "must be a float32 array of [rows, vocabulary]"
        if not isinstance(logits, np.ndarray):
            raise InvalidParameterError("logits", f"{wanted}, got {type(logits).__name__}")
        if logits.dtype != np.float32 or logits.ndim != 2 or not logits.shape[1]:
            raise InvalidParameterError(
                "logits", f"{wanted}, got {logits.dtype} of {list(logits.shape)}"
            )
        logits = np.ascontiguousarray(logits)
        tokens = ffi.new("int32_t[]", len(logits))
        data = ffi.cast("float *", logits.ctypes.data)
        with self._lock:
            call(lib.mtpbatch_sampler_sample, native, data, *logits.shape, tokens)
        return list(ffi.unpack(tokens, len(logits))) if len(logits) else []
