"""Contexts and the batches they decode."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mtpbatch.exceptions import ContextError
from mtpbatch.machine import available_cpus
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.native.devices import Memory
from mtpbatch.native.model import Model
from mtpbatch.types import KvType

# enum ggml_type of ggml.h
_GGML_TYPES: dict[KvType, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "bf16": 30,
}


class Batch:
    """Rows of one decode: tokens of any number of sequences.

    Rows of one sequence stand together and continue its positions.

    ::

        batch = Batch()
        rows = batch.add_sequence([40, 50, 60], position=0, seq_id=0)
        row = batch.add(70, position=0, seq_id=1, output=True)
        assert rows == range(3) and row == 3
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self.positions = array("i")
        self.seq_ids = array("i")
        self.outputs = array("B")

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        sequences = len(set(self.seq_ids))
        return f"<Batch: {len(self)} rows of {sequences} sequence(s), {sum(self.outputs)} outputs>"

    def add(self, token: int, position: int, seq_id: int, *, output: bool = False) -> int:
        """Append a row and return its index; ``output``: its logits are wanted."""
        try:
            token, position, seq_id = array("i", (token, position, seq_id))
        except OverflowError as error:
            raise ContextError(f"a row of {(token, position, seq_id)}: {error}") from None
        self.tokens.append(token)
        self.positions.append(position)
        self.seq_ids.append(seq_id)
        self.outputs.append(bool(output))
        return len(self) - 1

    def add_sequence(
        self,
        tokens: Sequence[int],
        position: int,
        seq_id: int,
        *,
        outputs: Literal["none", "last", "all"] = "last",
    ) -> range:
        """Append rows for tokens at ``position`` and after; return the rows' indices."""
        start = len(self)
        for i, token in enumerate(tokens):
            wanted = outputs == "all" or (outputs == "last" and i == len(tokens) - 1)
            self.add(token, position + i, seq_id, output=wanted)
        return range(start, len(self))

    def clear(self) -> None:
        """Take all rows out, to fill it anew."""
        for column in (self.tokens, self.positions, self.seq_ids, self.outputs):
            del column[:]

    def native(self) -> tuple[Any, list[Any]]:
        """The C struct, and what must stay referenced while it is used."""
        sizes = {len(self), len(self.positions), len(self.seq_ids), len(self.outputs)}
        if len(sizes) != 1:
            raise ContextError(f"the columns of a batch differ in length: {sorted(sizes)}")
        columns = [
            ffi.from_buffer("int32_t[]", self.tokens),
            ffi.from_buffer("int32_t[]", self.positions),
            ffi.from_buffer("int32_t[]", self.seq_ids),
            ffi.from_buffer("bool[]", self.outputs),
        ]
        return ffi.new("mtpbatch_batch *", [len(self), *columns]), columns


class Context(Handle):
    """KV cells for ``n_seq`` sequences of a model, and the decoding that fills them.

    ::

        with Model("model.gguf") as model, Context(model, n_ctx=512) as context:
            batch = Batch()
            rows = batch.add_sequence(model.tokenize("In the beginning"), position=0, seq_id=0)
            context.decode(batch)
            next_token = int(context.logits(rows[-1]).argmax())
            print(model.detokenize([next_token]))

    Args:
        model: stays loaded for as long as the context lives.
        n_ctx: tokens per sequence.
        n_cells: tokens that all sequences together can hold, a fork's counted again; None: n_ctx
            times n_seq. Fewer, but at least n_ctx, needs kv_unified.
        n_seq: sequences, 1 to 256.
        n_batch: most tokens in one decode; None: 2048.
        n_ubatch: most tokens in one forward pass; None: 512, at most n_batch.
        n_rs_seq: recurrent states kept per sequence, so that as many tokens can be taken back;
            drafting on a model with recurrent layers needs n_draft_max. Without effect on others.
        n_outputs_max: most rows with logits in one decode; None: n_batch.
        n_threads: None: the CPUs available to this process.
        kv_type: element type of the cells.
        kv_unified: one pool of cells for all sequences instead of an equal share for each.
        embeddings: every row is an output and gives its embedding; n_outputs_max counts for
            nothing, and neither heads nor an executor can use the context. But on qwen35 and
            qwen35moe models, llama.cpp computes the logits all the same and keeps them for a
            decode: n_batch times n_vocab floats.

    Raises:
        ContextError: a value is out of range, or llama.cpp could not make the context.

    Calls from several threads wait for each other; so do those of everything built on it.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 4096,
        n_seq: int = 1,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_rs_seq: int = 0,
        n_outputs_max: int | None = None,
        n_threads: int | None = None,
        kv_type: KvType = "f16",
        kv_unified: bool = True,
        n_cells: int | None = None,
        embeddings: bool = False,
    ) -> None:
        if n_cells is not None and n_cells < 1:
            raise ContextError(f"n_cells must be at least n_ctx, got {n_cells}")
        if kv_type not in get_args(KvType):
            known = ", ".join(get_args(KvType))
            raise ContextError(f"kv_type must be one of {known}, got {kv_type!r}")
        n_batch = n_batch if n_batch is not None else 2048
        values = {
            "n_ctx": n_ctx,
            "n_seq": n_seq,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch if n_ubatch is not None else min(512, n_batch),
            "n_rs_seq": n_rs_seq,
            "n_outputs_max": n_outputs_max if n_outputs_max is not None else n_batch,
            "n_threads": n_threads if n_threads is not None else available_cpus(),
            "kv_type": _GGML_TYPES[kv_type],
            "kv_unified": kv_unified,
            "n_cells": n_cells or 0,
            "embeddings": embeddings,
        }
        try:
            params = ffi.new("mtpbatch_context_params *", values)
        except OverflowError as error:
            raise ContextError(f"a value is out of range: {error}") from None
        self._lock = threading.RLock()
        self._n_rows = 0  # of the last batch
        self._create(model, params, ffi.NULL)

    @classmethod
    def mtp(cls, target: Context, model: Model | None = None) -> Context:
        """A context that drafts for ``target``, with its sizes.

        Args:
            target: a default context. For an assistant it must not have decoded anything yet.
            model: an assistant, which drafts for another model and reads that one's memory; None:
                the target's own MTP heads draft.

        Raises:
            ContextError: the model has no MTP heads, the assistant was made for another model, or
                ``target`` is an MTP context itself.
            MtpInitError: the model has several heads, and llama.cpp cannot chain them.
        """
        context = cls.__new__(cls)
        context._lock = target._lock
        context._n_rows = 0
        native = target._native
        with target._lock:
            context._create(model or target.model, ffi.NULL, native)
        return context

    def _create(self, model: Model, params: Any, target: Any) -> None:
        out = ffi.new("mtpbatch_context **")
        call(lib.mtpbatch_context_create, model._native, params, target, out)
        super().__init__(out[0], lib.mtpbatch_context_free)
        self.model = model
        real = ffi.new("mtpbatch_context_params *")
        lib.mtpbatch_context_get_params(self._native, real)
        self.n_ctx: int = real.n_ctx
        self.n_seq: int = real.n_seq
        self.n_batch: int = real.n_batch
        self.n_ubatch: int = real.n_ubatch
        self.n_rs_seq: int = real.n_rs_seq
        """As granted: 0 on models whose state cannot be taken back, or that keep none."""
        self.n_threads: int = real.n_threads
        self.n_cells: int = real.n_cells
        self.is_mtp: bool = lib.mtpbatch_context_is_mtp(self._native)

    def __repr__(self) -> str:
        kind = "MTP" if self.is_mtp else "default"
        state = "closed" if self.closed else f"{self.n_seq} x {self.n_ctx} tokens"
        return f"<Context ({kind}) of {self.model.path.name}: {state}>"

    def close(self) -> None:
        with self._lock if self._home.here else nullcontext():
            super().close()

    def memory_on(self, device: int = 0) -> Memory:
        """What it takes on a device, an index of :func:`mtpbatch.native.devices`."""
        memory = ffi.new("mtpbatch_memory *")
        native = self._native
        with self._lock:
            lib.mtpbatch_context_get_memory(native, device, memory)
        return Memory(
            memory.weights, memory.states, memory.compute, memory.logits, memory.hidden_rows
        )

    def decode(self, batch: Batch) -> None:
        """Run the model over the rows of a batch.

        Raises:
            ContextError: a row breaks a rule (unknown token or sequence, a position that does not
                continue its sequence, too many rows or outputs); nothing was changed.
            DecodeError: no KV cells were free (nothing was changed), or llama.cpp failed.
        """
        context = self._native
        rows, columns = batch.native()
        with self._lock:
            call(lib.mtpbatch_context_decode, context, rows)
            self._n_rows = len(batch)
        del columns

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Logits of a row of the last batch that asked for them: a copy, shape [n_vocab]."""
        native = self._native
        with self._lock:
            known = 0 <= row < self.n_batch
            values = lib.mtpbatch_context_logits(native, row) if known else ffi.NULL
            if values == ffi.NULL:
                raise ContextError(f"row {row} of the last batch has no logits")
            size = self.model.n_vocab * 4
            return np.frombuffer(ffi.buffer(values, size), dtype=np.float32).copy()

    def embeddings(self) -> npt.NDArray[np.float32]:
        """The last hidden rows of the last batch, in its order: a copy, shape [rows, n_embd].

        Raises:
            ContextError: the context was not made for embeddings, or has decoded nothing.
        """
        native = self._native
        with self._lock:
            values = lib.mtpbatch_context_embeddings(native)
            if values == ffi.NULL:
                raise ContextError("there are no embeddings: make the context for them, and decode")
            size = self._n_rows * self.model.n_embd * 4
            rows = np.frombuffer(ffi.buffer(values, size), dtype=np.float32).copy()
        return rows.reshape(-1, self.model.n_embd)

    def length(self, seq_id: int) -> int:
        """Positions that a sequence has decoded.

        Raises:
            ContextError: there is no such sequence.
        """
        native = self._native
        if not 0 <= seq_id < self.n_seq:
            raise ContextError(f"no such sequence: {seq_id}")
        with self._lock:
            length: int = lib.mtpbatch_context_length(native, seq_id)
        return length

    def truncate(self, seq_id: int, length: int) -> None:
        """Take back a sequence's positions from ``length`` on; 0 frees all its cells.

        Raises:
            ContextError: there is no such sequence, or the model's recurrent state is not kept
                for that position: only the last decode can be taken back, once, by at most
                n_rs_seq tokens and not as a whole; and only if it was one forward pass: of a
                single sequence, or with equally many rows of each sequence, at most n_ubatch in
                all, and consecutive sequence ids unless kv_unified. Or the sequence was restored
                on a model with sliding-window attention, and ``length`` is before its end.
        """
        native = self._native
        with self._lock:
            call(lib.mtpbatch_context_truncate, native, seq_id, length)
