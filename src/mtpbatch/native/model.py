"""A model file in memory: its vocabulary and what can be known of it without a context."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtpbatch._slices import encoded, slices
from mtpbatch.exceptions import InvalidParameterError, ModelLoadError
from mtpbatch.native._library import Handle, call, ffi, lib

_new = ffi.new_allocator(should_clear_after_alloc=False)  # what is filled anyway


def _unpacked(numbers: Any, n: int) -> list[int]:
    """The first of an array's numbers."""
    unpacked: list[int] = []
    for part in slices(n):
        unpacked += ffi.unpack(numbers + part.start, part.stop - part.start)
    return unpacked


class _Progress:
    """Carries an exception of the caller's callback across the C++ loader."""

    def __init__(self, report: Callable[[float], bool | None]) -> None:
        self.report = report
        self.error: BaseException | None = None


@ffi.def_extern()  # type: ignore[untyped-decorator]
def mtpbatch_report_progress(fraction: float, user: Any) -> bool:
    progress: _Progress = ffi.from_handle(user)
    try:
        return progress.report(fraction) is not False
    except BaseException as error:
        progress.error = error
        return False


def _check_file(path: Path) -> None:
    """What the loader would only call "failed to load", in words."""
    if "\0" in str(path):
        raise ModelLoadError(f"{str(path)!r}: no path holds a NUL character; take it out")
    if not path.exists():
        raise ModelLoadError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ModelLoadError(f"{path}: not a file; give the path of a GGUF file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise ModelLoadError(
            f"{path}: not a GGUF file (it starts with {magic!r}); convert the model, or fetch "
            f"the file again"
        )


class Model(Handle):
    """A GGUF model, with its MTP heads if it has any.

    ::

        with Model("model.gguf") as model:
            tokens = model.tokenize("In the beginning")
            assert model.detokenize(tokens) == "In the beginning"

    Args:
        path: the file; of a split model the first part.
        n_gpu_layers: layers kept on a GPU, -1 for all; without effect in a CPU build.
        lora: adapter files (GGUF), and by how much each is added to the weights: 1 as it was
            trained. They hold for every context of the model and all of its sequences.
        weights: without them only what describes the model is read, however large it is: its
            contexts say what memory they would take, but take none and do not decode.
        progress: called now and then with the fraction loaded (0 to 1). Loading stops when it
            returns False or raises.

    Raises:
        ModelLoadError: there is no such file, llama.cpp cannot load it, or an adapter was made for
            another model.

    Safe to use from several threads at once. Load files from sources you trust: of a file that
    contradicts itself only the gravest contradictions are noticed, others can end the process, as
    :func:`~mtpbatch.probe_model` finds out in another one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = -1,
        lora: Mapping[str, float] | None = None,
        weights: bool = True,
        progress: Callable[[float], bool | None] | None = None,
    ) -> None:
        self.path = Path(path)
        _check_file(self.path)
        lib.mtpbatch_capture_logs("llama_cpp" in sys.modules)
        out = ffi.new("mtpbatch_model **")
        state = _Progress(progress) if progress else None
        handle = ffi.new_handle(state) if state else ffi.NULL
        try:
            call(
                lib.mtpbatch_model_load,
                os.fsencode(self.path),
                n_gpu_layers,
                weights,
                lib.mtpbatch_report_progress if state else ffi.NULL,
                handle,
                out,
            )
        except ModelLoadError as error:
            if state and state.error:
                raise state.error from None
            raise ModelLoadError(f"{self.path}: {error}") from None
        super().__init__(out[0], lib.mtpbatch_model_free)
        for adapter, scale in (lora or {}).items():
            self._add_adapter(Path(adapter), scale)

        facts = ffi.new("mtpbatch_model_facts *")
        lib.mtpbatch_model_get_facts(self._native, facts)
        self.n_vocab: int = facts.n_vocab
        """Tokens in the vocabulary."""
        self.n_embd: int = facts.n_embd
        """Width of a hidden row."""
        self.n_layer: int = facts.n_layer
        """Layers, as llama.cpp counts them."""
        self.n_mtp_heads: int = facts.n_mtp_heads
        """Trained MTP heads; 0: the model cannot draft."""
        self.n_ctx_train: int = facts.n_ctx_train
        """Longest context the model was trained for, in tokens."""
        self.n_swa: int = facts.n_swa
        """Tokens in the sliding window of some layers' attention; 0: there is none."""
        self.hybrid: bool = facts.hybrid
        """Some layers keep recurrent state, others attend."""
        self.recurrent: bool = facts.recurrent
        """All layers keep recurrent state."""
        self.n_params: int = facts.n_params
        self.n_bytes: int = facts.n_bytes
        """Size of the weights."""
        self.bos: int | None = None if facts.bos < 0 else facts.bos
        """Beginning-of-sequence token."""
        self.eos: int | None = None if facts.eos < 0 else facts.eos
        """End-of-sequence token."""
        self.eot: int | None = None if facts.eot < 0 else facts.eot
        """End-of-turn token."""
        self.add_bos: bool = facts.add_bos
        """Whether :meth:`tokenize` puts the beginning-of-sequence token first."""

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.description
        return f"<Model {self.path.name}: {state}, {self.n_mtp_heads} MTP head(s)>"

    def _add_adapter(self, path: Path, scale: float) -> None:
        _check_file(path)
        try:
            call(
                lib.mtpbatch_model_add_adapter,
                self._native,
                os.fsencode(path),
                scale,
                invalid=partial(InvalidParameterError, "lora"),
            )
        except ModelLoadError as error:
            raise ModelLoadError(f"{path}: {error}") from None

    @property
    def keeps_recurrent_state(self) -> bool:
        """Whether a sequence's past cannot simply be cut at any position."""
        return self.hybrid or self.recurrent

    @cached_property
    def architecture(self) -> str:
        """The model file's name for it, such as ``qwen35``."""
        return self.metadata("general.architecture") or ""

    @cached_property
    def description(self) -> str:
        """llama.cpp's short description: architecture, size, file type."""
        return self._text(lib.mtpbatch_model_describe) or ""

    @cached_property
    def label(self) -> str:
        """File, architecture and size in a few words: ``demo.gguf (qwen35, 2.8M)``."""
        for unit, letter in ((10**9, "B"), (10**6, "M")):
            if self.n_params >= unit:
                return f"{self.path.name} ({self.architecture}, {self.n_params / unit:.1f}{letter})"
        return f"{self.path.name} ({self.architecture}, {self.n_params / 10**3:.0f}K)"

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja text of the model's chat template, if the file carries one."""
        native = self._native  # which owns the text
        text = lib.mtpbatch_model_chat_template(native)
        return None if text == ffi.NULL else ffi.string(text).decode("utf-8", "replace")

    @cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end a generation (end of sequence, of turn, …)."""
        native = self._native
        return frozenset(t for t in range(self.n_vocab) if lib.mtpbatch_model_is_eog(native, t))

    @cached_property
    def vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of each token, by id; of control tokens none."""
        return tuple(self.token_bytes(token) for token in range(self.n_vocab))

    def is_control(self, token: int) -> bool:
        """Whether a token is markup, such as ``<|im_end|>``, rather than text."""
        return bool(lib.mtpbatch_model_is_control(self._native, token))

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token only if ``special``."""
        native = self._native
        size = 64
        while True:
            buffer = ffi.new("char[]", size)
            n = lib.mtpbatch_model_token_bytes(native, token, special, buffer, size)
            if n >= 0:
                return bytes(ffi.buffer(buffer, n))
            size = -n

    def metadata(self, key: str) -> str | None:
        """A scalar value of the model file, as text; None if there is no such key."""
        return self._text(lib.mtpbatch_model_metadata, key.encode())

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        check: Callable[[], None] | None = None,
    ) -> list[int]:
        """Token ids of a text.

        ``add_special`` adds the tokens the model wants around a text; ``parse_special`` reads
        markup such as ``<|im_end|>`` as the control token it names. ``check`` is called before each
        piece that a text with much markup is done in, and may raise.
        """
        data = encoded("text", text)
        cuts = self._cuts(data, parse_special)
        if not cuts:
            return self._tokenize(data, add_special, parse_special)
        around = self._tokenize(b"", add_special, parse_special)
        n_before = int(self.add_bos)
        token_ids = around[:n_before]
        for start, stop in pairwise((0, *cuts, len(data))):
            if check is not None:
                check()
            token_ids += self._tokenize(data[start:stop], False, parse_special)
        return token_ids + around[n_before:]

    def _cuts(self, data: bytes, parse_special: bool) -> list[int]:
        """Between which bytes a text is cut; the tokens of the pieces are those of the whole."""
        cuts = _new("int32_t[]", len(data) // 64 + 1)
        n = ffi.new("int32_t *")
        call(lib.mtpbatch_model_cuts, self._native, data, len(data), parse_special, cuts, n)
        return _unpacked(cuts, n[0])

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        size = len(data) + 2  # a byte-level token has at least one byte; two special ones
        n = ffi.new("int32_t *")
        while True:
            tokens = _new("int32_t[]", size)
            call(
                lib.mtpbatch_model_tokenize,
                self._native,
                data,
                len(data),
                add_special,
                parse_special,
                tokens,
                size,
                n,
                invalid=partial(InvalidParameterError, "text"),
            )
            if n[0] <= size:
                return _unpacked(tokens, n[0])
            size = n[0]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        n_tokens = len(tokens)
        ids = _new("int32_t[]", n_tokens)
        try:
            for part in slices(n_tokens):
                ids[part] = tokens[part]
        except OverflowError as error:
            raise InvalidParameterError("tokens", str(error)) from None
        size = 8 * n_tokens + 8
        n = ffi.new("int32_t *")
        while True:
            text = _new("char[]", size)
            call(
                lib.mtpbatch_model_detokenize,
                self._native,
                ids,
                n_tokens,
                special,
                text,
                size,
                n,
                invalid=partial(InvalidParameterError, "tokens"),
            )
            if n[0] <= size:
                data = ffi.buffer(text, n[0])
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                pieces = [decoder.decode(data[part]) for part in slices(n[0])]
                return "".join(pieces) + decoder.decode(b"", final=True)
            size = n[0]

    def _text(self, read: Callable[..., int], *key: bytes) -> str | None:
        size = 256
        while True:
            buffer = ffi.new("char[]", size)
            n = read(self._native, *key, buffer, size)
            if n < 0:
                return None
            if n < size:
                return bytes(ffi.buffer(buffer, n)).decode("utf-8", "replace")
            size = n + 1
