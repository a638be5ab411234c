"""Embeddings of texts, many in each decode."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mtpbatch.exceptions import ContextError
from mtpbatch.native.context import Batch, Context
from mtpbatch.native.model import Model
from mtpbatch.types import KvType

Pooling: TypeAlias = Literal["mean", "first", "last"]

_MAX_SEQUENCES: Final = 32  # in one decode; more of them are so short that it hardly matters
_MAX_RECURRENT: Final = 8  # where each has a state, of megabytes
_LOGITS_BYTES: Final = 256 << 20  # llama.cpp keeps those of a decode's rows, wanted or not

# What a model file names, by llama.cpp's numbers, and what is done where it names nothing.
_POOLING: Final[dict[str, Pooling]] = {"0": "mean", "1": "mean", "2": "first", "3": "last"}
_RANK: Final = "4"


class Embedder:
    """Makes embeddings of texts: of each, the model's last hidden rows made one row.

    Which way, the model file says: the mean of all rows, the first or the last one; where it does
    not say, the mean. A decode takes rows of many texts, and of a long one as many as find room.
    With recurrent layers it is a pass for each length of text, on qwen35 and qwen35moe, and for
    each text on others. One thread at a time.

    ::

        with Model("model.gguf") as model:
            embedder = Embedder(model, n_ctx=512)
            ticket = embedder.add(model.tokenize("In the beginning"))
            embeddings = {}
            while not embedder.idle:
                embeddings.update(embedder.step())
            embedder.close()
            assert embeddings[ticket].shape == (model.n_embd,)

    Args:
        model: stays loaded for as long as the embedder lives.
        n_ctx: most tokens of one text.
        n_ubatch: most tokens in one decode; fewer where their logits would take over 256 MiB.
        n_threads: None: the CPUs available to this process.
        kv_type: element type of the cells.

    Raises:
        ContextError: the model makes no embeddings, or llama.cpp could not make the context.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        kv_type: KvType = "f16",
    ) -> None:
        self.pooling: Pooling = _pooling(model)
        n_batch = max(1, min(n_ubatch, _LOGITS_BYTES // (4 * model.n_vocab)))
        n_seq = min(_MAX_RECURRENT if model.keeps_recurrent_state else _MAX_SEQUENCES, n_batch)
        self._context = Context(
            model,
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=n_threads,
            kv_type=kv_type,
            # At most one text is held from one decode to the next.
            n_cells=min(n_ctx + n_batch, n_ctx * n_seq),
            embeddings=True,
        )
        self.n_ctx = n_ctx
        self.n_embd = model.n_embd
        self._tickets = itertools.count()
        # Those that are not done, by their numbers; the first may have begun.
        self._texts: OrderedDict[int, _Text] = OrderedDict()

    @property
    def idle(self) -> bool:
        """Whether all texts are done."""
        return not self._texts

    def add(self, tokens: Sequence[int]) -> int:
        """Have a text embedded in the next steps; return a number for it.

        Raises:
            ContextError: it has no tokens, or more than n_ctx.
        """
        if not 1 <= len(tokens) <= self.n_ctx:
            raise ContextError(f"a text has 1 to n_ctx={self.n_ctx} tokens, got {len(tokens)}")
        ticket = next(self._tickets)
        self._texts[ticket] = _Text(tokens)
        return ticket

    def drop(self, ticket: int) -> None:
        """Forget a text that is not done."""
        text = self._texts.pop(ticket, None)
        if text is not None and text.n_done:
            self._context.truncate(text.seq_id, 0)

    def step(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        """One decode; the texts that are done with it, by their numbers, each with n_embd floats.

        Raises:
            DecodeError: llama.cpp failed. Close the embedder: what has become of the texts is
                not known.
        """
        batch = Batch()
        chunks: list[tuple[int, _Text, range]] = []
        begun = next(iter(self._texts.values())).seq_id if self._texts else -1
        free = (seq_id for seq_id in range(self._context.n_seq) if seq_id != begun)
        for ticket, text in self._texts.items():
            room = self._context.n_batch - len(batch)
            if room == 0 or len(chunks) == self._context.n_seq:
                break
            if not text.n_done:
                text.seq_id = next(free)
            chunk = text.tokens[text.n_done : text.n_done + room]
            rows = batch.add_sequence(chunk, text.n_done, text.seq_id, outputs="all")
            chunks.append((ticket, text, rows))
        if not chunks:
            return []
        self._context.decode(batch)
        embeddings = self._context.embeddings()
        done = []
        for ticket, text, rows in chunks:
            text.take_in(embeddings[rows.start : rows.stop], self.pooling)
            if text.n_done == len(text.tokens):
                self._context.truncate(text.seq_id, 0)
                del self._texts[ticket]
                done.append((ticket, text.pooled.astype(np.float32)))
        return done

    def close(self) -> None:
        """Free the context. Idempotent."""
        self._context.close()


class _Text:
    """Tokens on their way through the model."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.n_done = 0
        self.seq_id = -1  # once it has begun
        self.pooled: npt.NDArray[np.float64]

    def take_in(self, rows: npt.NDArray[np.float32], pooling: Pooling) -> None:
        if pooling == "mean":
            share = rows.sum(0, dtype=np.float64) / len(self.tokens)
            self.pooled = share + self.pooled if self.n_done else share
        elif pooling == "last":
            self.pooled = rows[-1].astype(np.float64)
        elif not self.n_done:
            self.pooled = rows[0].astype(np.float64)
        self.n_done += len(rows)


def _pooling(model: Model) -> Pooling:
    named = model.metadata(f"{model.architecture}.pooling_type") or "0"
    if named == _RANK:
        raise ContextError(f"{model.path.name} is a reranker: it scores texts and embeds none")
    if model.metadata(f"{model.architecture}.attention.causal") == "false":
        raise ContextError(
            f"{model.path.name} lets tokens see those after them, which whole texts in one pass "
            f"would need; only models that generate are supported"
        )
    pooling = _POOLING.get(named)
    if pooling is None:
        raise ContextError(f"{model.path.name} names a pooling type that is not known: {named}")
    return pooling
