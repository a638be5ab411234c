"""From logits to tokens."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mtpbatch.exceptions import InvalidParameterError, NativeError
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.native.model import Model
from mtpbatch.types import EngineConfig, SamplingParams, has_dry, parse

INT32_MAX = 2**31 - 1

_TAKEN = frozenset(
    {
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability"),
        *("xtc_threshold", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        *("dry_sequence_breakers", "logit_bias", "bad_words", "seed"),
    }
)


class Dry(Handle):
    """What DRY needs to know of a model. Requests that ask for the same share it."""

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: tuple[str, ...],
    ) -> None:
        texts = [ffi.new("char[]", text.encode()) for text in breakers]
        out = ffi.new("mtpbatch_dry **")
        call(
            lib.mtpbatch_dry_create,
            model._native,
            multiplier,
            base,
            allowed_length,
            n_ctx if last_n < 0 else min(last_n, n_ctx),
            len(texts),
            ffi.new("char *[]", texts),
            out,
        )
        super().__init__(out[0], lib.mtpbatch_dry_free)


class DryMaker:
    """Makes what requests ask for, and keeps the last ones: each takes a look at all tokens."""

    def __init__(self, model: Model, n_ctx: int) -> None:
        self._make = lru_cache(maxsize=8)(partial(Dry, model, n_ctx))
        self.forget = self._make.cache_clear

    def __call__(self, params: SamplingParams) -> Dry | None:
        """``None``: DRY is off. Any thread may call."""
        if not has_dry(params):
            return None
        return self._make(
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            params.dry_penalty_last_n,
            params.dry_sequence_breakers,
        )


def bad_word_tokens(model: Model, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of texts that are not to appear, each as it is and after a space."""
    spellings = dict.fromkeys(text for word in words for text in (word, f" {word.lstrip()}"))
    tokens = (tuple(model.tokenize(text, add_special=False)) for text in spellings)
    return tuple(dict.fromkeys(tokens))


def sampling(
    params: SamplingParams,
    seed: int,
    *,
    bad_words: Sequence[Sequence[int]] = (),
    withheld: Sequence[int] = (),
    history: Sequence[int] = (),
    dry: Dry | None = None,
) -> tuple[list[Any], list[Any]]:
    """What fills a ``mtpbatch_sampling``, and what must stay referenced while it is used."""
    references: list[Any] = [dry]

    def tokens(ids: Sequence[int]) -> list[Any]:
        if not ids:
            return [0, ffi.NULL]
        references.append(ffi.new("int32_t[]", ids))
        return [len(ids), references[-1]]

    bias = ffi.new("mtpbatch_bias[]", [list(item) for item in params.logit_bias.items()])
    banned = ffi.new("mtpbatch_tokens[]", [tokens(word) for word in bad_words])
    references += [bias, banned]
    values = [
        len(bias),
        bias,
        len(banned),
        banned,
        min(params.min_tokens, INT32_MAX),
        tokens(withheld),
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        dry._native if dry else ffi.NULL,
        tokens(history),
        min(params.top_k, INT32_MAX),
        params.typical_p,
        params.top_p,
        params.min_p,
        params.xtc_probability,
        params.xtc_threshold,
        params.temperature,
        seed,
    ]
    return values, references


class Sampler(Handle):
    """Picks tokens as an engine does for one request, for loops of one's own.

    What it picks is what llama.cpp's samplers logit_bias, penalties, dry, top_k, typical, top_p,
    min_p, xtc, temp and dist, chained in this order, pick from the whole vocabulary; a logit that
    is not a number counts as minus infinity. Any thread may call; calls wait for each other.

    ::

        import numpy as np

        logits = np.array([[0.0, 9.0, 1.0]], dtype=np.float32)
        with Sampler(temperature=0.8, top_p=0.5, seed=7) as sampler:
            assert sampler.sample(logits) == [1]

    Args:
        model: whose vocabulary it is. Only ``bad_words`` and DRY need it.
        prompt: tokens before the answer. Only ``repetition_penalty`` and DRY look at them.
        n_threads: threads that look through the rows of one call.
        params: the fields of :class:`~mtpbatch.SamplingParams`, but for those that say when a
            request begins or ends. Without a ``seed`` it has a fresh one.

    Raises:
        InvalidParameterError: a value is out of range, or needs the ``model``.
    """

    _closed_error = NativeError

    def __init__(
        self,
        model: Model | None = None,
        *,
        prompt: Sequence[int] = (),
        n_threads: int = 1,
        **params: Any,
    ) -> None:
        parsed = parse(SamplingParams, params)
        parse(EngineConfig, {"n_threads": n_threads})
        for name in params:
            if name not in _TAKEN:
                raise InvalidParameterError(name, "is for requests; a sampler only picks tokens")
        prompt = tuple(prompt)
        if not all(0 <= token <= INT32_MAX for token in prompt):
            raise InvalidParameterError("prompt", "must hold token ids, which fit 31 bits")
        bad_words: tuple[tuple[int, ...], ...] = ()
        dry = None
        if model is not None:
            bad_words = bad_word_tokens(model, parsed.bad_words)
            dry = DryMaker(model, model.n_ctx_train)(parsed)
        elif parsed.bad_words or has_dry(parsed):
            name = "bad_words" if parsed.bad_words else "dry_multiplier"
            raise InvalidParameterError(name, "needs the model, for its vocabulary")
        fresh = secrets.randbits(32) if parsed.seed is None else parsed.seed
        values, references = sampling(parsed, fresh, bad_words=bad_words, history=prompt, dry=dry)
        native = ffi.new("mtpbatch_sampling *", values)
        out = ffi.new("mtpbatch_sampler **")
        call(lib.mtpbatch_sampler_create, native, n_threads, out)
        del references
        super().__init__(out[0], lib.mtpbatch_sampler_free)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Sampler{': closed' if self.closed else ''}>"

    def close(self) -> None:
        with self._lock if self._home.here else nullcontext():
            super().close()

    def sample(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """One token for each row of ``logits``, a float32 array of [rows, vocabulary].

        They are the next tokens of the answer, one after the other: each row takes random numbers
        of its own, and penalties see the tokens before it.

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
