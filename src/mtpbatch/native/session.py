"""Drafting with a model's Multi-Token-Prediction head."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TextIO

from msgspec import Struct

from mtpbatch.exceptions import (
    MtpAcceptError,
    MtpBadSequenceError,
    MtpDraftError,
    MtpInvalidConfigError,
    MtpProcessError,
    MtpSessionError,
)
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.native.context import Batch, Context


class MtpSessionConfig(Struct, frozen=True):
    """How a session drafts.

    ::

        with (
            Model("model.gguf") as model,
            Context(model, n_ctx=512, n_rs_seq=3) as target,
            Context.mtp(target) as draft,
        ):
            config = MtpSessionConfig(n_seq=1, n_draft_max=3, p_min=0.5)
            with MtpSession.with_config(target, draft, config) as session:
                assert session.p_min == 0.5
    """

    n_seq: int
    """Sequences, as many as the contexts have."""
    n_draft_max: int
    """Most tokens drafted at once, 1 to 32."""
    n_min: int = 0
    """Drafts shorter than this are dropped."""
    p_min: float = 0.0
    """A draft ends before a token to which the head gives less probability (of all tokens)."""


class DraftRequest(Struct, frozen=True):
    """One sequence's part in :meth:`MtpSession.draft_many`.

    ::

        with (
            Model("model.gguf") as model,
            Context(model, n_ctx=512, n_seq=2, n_rs_seq=3) as target,
            Context.mtp(target) as draft,
            MtpSession(target, draft, n_seq=2, n_draft_max=3) as session,
        ):
            prompt = model.tokenize("In the beginning")
            batch = Batch()
            ends = [batch.add_sequence(prompt, position=0, seq_id=i)[-1] for i in range(2)]
            target.decode(batch)
            session.process(batch)
            last = [int(target.logits(row).argmax()) for row in ends]
            drafts = session.draft_many(
                [
                    DraftRequest(0, n_past=len(prompt), id_last=last[0]),
                    DraftRequest(1, n_past=len(prompt), id_last=last[1], n_draft=1),
                ]
            )
            assert [len(draft) for draft in drafts] == [3, 1]
    """

    seq_id: int
    """The sequence, from 0 on."""
    n_past: int
    """Tokens of the sequence that the target has decoded and kept."""
    id_last: int
    """The token sampled last, not yet decoded."""
    n_draft: int | None = None
    """Most tokens to draft; None: n_draft_max."""


class MtpSessionStatistics(Struct, frozen=True):
    """Counts and seconds since the session was made.

    ::

        with (
            Model("model.gguf") as model,
            Context(model, n_ctx=512, n_rs_seq=3) as target,
            Context.mtp(target) as draft,
            MtpSession(target, draft, n_seq=1, n_draft_max=3) as session,
        ):
            counts = session.statistics()
            assert counts.drafts == 0 and counts.drafted_by_depth == (0, 0, 0)
    """

    drafts: int
    """Drafts that were not empty."""
    drafted: int
    """Tokens in them."""
    accepted: int
    """Of those, how many the target agreed with."""
    decodes: int
    """Decodes of the draft context."""
    rows: int
    """Rows in those decodes."""
    draft_time: float
    """Seconds in :meth:`MtpSession.draft_many`."""
    process_time: float
    """Seconds in :meth:`MtpSession.process`."""
    accept_time: float
    """Seconds in :meth:`MtpSession.accept`."""
    drafted_by_depth: tuple[int, ...]
    """Drafted tokens by their place in the draft: as many entries as n_draft_max."""
    accepted_by_depth: tuple[int, ...]
    """The same of accepted ones."""


class MtpSession(Handle):
    """Drafts for all sequences of a target context with a model's MTP heads.

    The loop of one who drives it, greedy and for one sequence::

        with (
            Model("model.gguf") as model,
            Context(model, n_ctx=512, n_rs_seq=3) as target,
            Context.mtp(target) as draft,
            MtpSession(target, draft, n_seq=1, n_draft_max=3) as session,
        ):
            batch = Batch()
            prompt = model.tokenize("In the beginning")
            rows = batch.add_sequence(prompt, position=0, seq_id=0)
            target.decode(batch)
            session.process(batch)
            n_past, last = len(prompt), int(target.logits(rows[-1]).argmax())
            answer = [last]
            while len(answer) < 20:
                drafts = session.draft(0, n_past, last)
                batch.clear()
                rows = batch.add_sequence([last, *drafts], n_past, seq_id=0, outputs="all")
                target.decode(batch)
                session.process(batch)
                said = [int(target.logits(row).argmax()) for row in rows]
                right = [draft == token for draft, token in zip(drafts, said)]
                n_accepted = [*right, False].index(False)
                if drafts:
                    session.accept(0, n_accepted)
                n_past, last = n_past + 1 + n_accepted, said[n_accepted]
                target.truncate(0, n_past)
                answer += said[: n_accepted + 1]
            print(model.detokenize(answer))

    On a model with recurrent layers, verify drafts of different lengths in decodes of their own:
    see :meth:`Context.truncate`.

    What the session needs stays alive with it: contexts that are closed earlier are freed when
    the session is. Any thread may call; calls wait for each other. Decoding a sequence's position
    0 anew starts a new generation on it.

    Args:
        target: a default context; on a model with recurrent layers with n_rs_seq >= n_draft_max.
        draft: ``Context.mtp(target)``, or that of an assistant.
        n_seq: sequences, as many as the contexts have.
        n_draft_max: most tokens drafted at once, 1 to 32; at most as many as the model has heads
            if they are chained.

    Raises:
        MtpInvalidConfigError: a value is out of range.
        MtpIncompatibleContextsError: the contexts do not fit together or do not fit the config;
            or the model has sliding-window attention and the target is not kv_unified=False.
    """

    _closed_error = MtpSessionError

    def __init__(self, target: Context, draft: Context, n_seq: int, n_draft_max: int) -> None:
        self._create(target, draft, MtpSessionConfig(n_seq, n_draft_max))

    @classmethod
    def with_config(cls, target: Context, draft: Context, config: MtpSessionConfig) -> MtpSession:
        """A session with every parameter chosen; raises as the constructor does."""
        session = cls.__new__(cls)
        session._create(target, draft, config)
        return session

    def _create(self, target: Context, draft: Context, config: MtpSessionConfig) -> None:
        self._lock = target._lock
        out = ffi.new("mtpbatch_session **")
        values = [config.n_seq, config.n_draft_max, config.n_min, config.p_min]
        try:
            native = ffi.new("mtpbatch_session_config *", values)
        except OverflowError as error:
            raise MtpInvalidConfigError(f"a value is out of range: {error}") from None
        contexts = target._native, draft._native
        with self._lock:
            call(lib.mtpbatch_session_create, *contexts, native, out)
        super().__init__(out[0], lib.mtpbatch_session_free)
        self._config = config

    def __repr__(self) -> str:
        if self.closed:
            return "<MtpSession: closed>"
        c, s = self._config, self.statistics()
        return (
            f"<MtpSession: n_seq={c.n_seq} n_draft_max={c.n_draft_max} n_min={c.n_min} "
            f"p_min={c.p_min:g}, {s.accepted} of {s.drafted} drafted tokens accepted>"
        )

    def close(self) -> None:
        with self._lock if self._home.here else nullcontext():
            super().close()

    @property
    def config(self) -> MtpSessionConfig:
        """As given at construction."""
        return self._config

    @property
    def n_seq(self) -> int:
        """Sequences."""
        return self._config.n_seq

    @property
    def n_draft_max(self) -> int:
        """Most tokens drafted at once."""
        return self._config.n_draft_max

    @property
    def n_min(self) -> int:
        """Drafts shorter than this are dropped."""
        return self._config.n_min

    @property
    def p_min(self) -> float:
        """The least probability, by the head, of a token that is drafted."""
        return self._config.p_min

    @property
    def need_embd(self) -> bool:
        """Whether the target must output post-norm embeddings: False for MTP."""
        return False

    @property
    def need_embd_pre_norm(self) -> bool:
        """Whether hidden rows are read from the target: True; the session sees to it itself."""
        return True

    def begin(self, seq_id: int, prompt: Sequence[int]) -> None:
        """Optional: check that the prompt just decoded was processed completely.

        Raises:
            MtpBadSequenceError: the session has taken in another number of tokens.
        """
        native = self._native
        with self._lock:
            call(
                lib.mtpbatch_session_begin,
                native,
                seq_id,
                len(prompt),
                invalid=MtpBadSequenceError,
            )

    def process(self, batch: Batch) -> None:
        """Take in a batch that the target has just decoded. Call it after every decode.

        Raises:
            MtpProcessError: it is not that batch, or does not continue what the session has seen.
        """
        native = self._native
        rows, columns = batch.native()
        with self._lock:
            call(lib.mtpbatch_session_process, native, rows, invalid=MtpProcessError)
        del columns

    def draft(self, seq_id: int, n_past: int, id_last: int) -> list[int]:
        """Draft up to n_draft_max tokens for one sequence; see :class:`DraftRequest`."""
        return self.draft_many([DraftRequest(seq_id, n_past, id_last)])[0]

    def draft_many(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Draft for several sequences, one decode per depth for all of them.

        Each stops at its own n_draft, at the end of its context and under p_min, at no cost to it
        from the others' depth. The result is parallel to ``requests``; drafts can be empty.

        Raises:
            MtpBadSequenceError: no such sequence, or it has not taken in n_past tokens.
            MtpDraftError: an earlier draft waits for accept, or a value is out of range.
            DecodeError: the draft decode failed; the sequences can draft again.
        """
        native = self._native
        n = len(requests)
        drafts = ffi.new("int32_t[]", n * self.n_draft_max)
        lengths = ffi.new("int32_t[]", n)
        with self._lock:
            call(
                lib.mtpbatch_session_draft,
                native,
                n,
                [request.seq_id for request in requests],
                [request.n_past for request in requests],
                [request.id_last for request in requests],
                [
                    self.n_draft_max if request.n_draft is None else request.n_draft
                    for request in requests
                ],
                drafts,
                lengths,
                invalid=MtpDraftError,
            )
        starts = range(0, n * self.n_draft_max, self.n_draft_max)
        return [
            [drafts[start + k] for k in range(length)]
            for start, length in zip(starts, lengths, strict=True)
        ]

    def accept(self, seq_id: int, n_accepted: int) -> None:
        """Settle a non-empty draft: the target agreed with its first ``n_accepted`` tokens.

        Raises:
            MtpAcceptError: nothing was drafted, the draft was not processed, or fewer were.
        """
        native = self._native
        with self._lock:
            call(
                lib.mtpbatch_session_accept,
                native,
                seq_id,
                n_accepted,
                invalid=MtpAcceptError,
            )

    def save(self, seq_id: int) -> bytes:
        """All that the session and its contexts hold of a sequence, for :meth:`restore`.

        The sequence goes on undisturbed. What it holds grows with its length: per token a row of
        KV cells of every layer, besides the recurrent state; and per token that the MTP heads have
        not taken in yet a hidden row. Nothing is decoded.

        Raises:
            MtpStateError: a draft waits for accept, the target's last decode was not processed,
                or the target was not truncated to what was accepted.
            MtpBadSequenceError: no such sequence.
        """
        native = self._native
        size = ffi.new("size_t *")
        with self._lock:
            save = partial(
                call, lib.mtpbatch_session_save, native, seq_id, invalid=MtpBadSequenceError
            )
            save(ffi.NULL, 0, size)
            state = ffi.new("uint8_t[]", size[0])
            save(state, size[0], size)
        return bytes(ffi.buffer(state))

    def restore(self, seq_id: int, state: bytes) -> None:
        """Replace a sequence by a saved one, which then goes on where it was saved.

        The state may come from another sequence, another session or another process, of the same
        model (the same metadata, and the same weights as far as some bytes of each tensor show)
        and version, with the same kv_type and kv_unified, and the same n_seq unless
        kv_unified. It is checked against damage, not against forgery: restore only what you
        trust. On models with recurrent layers or a sliding window the target cannot be truncated
        into what was restored.

        Raises:
            MtpStateError: the bytes are no saved sequence, damaged, or of another model or other
                settings; or longer than n_ctx or than there are cells for; nothing was changed. Or
                llama.cpp could not take them; then the sequence is empty.
            MtpBadSequenceError: no such sequence.
        """
        native = self._native
        data = ffi.from_buffer("uint8_t[]", state)
        with self._lock:
            call(
                lib.mtpbatch_session_restore,
                native,
                seq_id,
                data,
                len(data),
                invalid=MtpBadSequenceError,
            )

    def fork(self, source: int, target_seq_id: int) -> None:
        """Replace the sequence ``target_seq_id`` by a copy of ``source``.

        Both then go on as one that was never copied. With a unified cache and attention alone
        they share their cells, which takes no time; otherwise it costs what save and restore do.

        Raises:
            MtpStateError: as :meth:`save`; or both are the same sequence.
            MtpBadSequenceError: no such sequence.
        """
        native = self._native
        with self._lock:
            call(
                lib.mtpbatch_session_fork,
                native,
                source,
                target_seq_id,
                invalid=MtpBadSequenceError,
            )

    def statistics(self) -> MtpSessionStatistics:
        """Counts and times so far."""
        native = self._native
        s = ffi.new("mtpbatch_session_statistics *")
        with self._lock:
            lib.mtpbatch_session_get_statistics(native, s)
        n = self.n_draft_max
        return MtpSessionStatistics(
            drafts=s.n_drafts,
            drafted=s.n_drafted,
            accepted=s.n_accepted,
            decodes=s.n_decodes,
            rows=s.n_rows,
            draft_time=s.draft_us / 1e6,
            process_time=s.process_us / 1e6,
            accept_time=s.accept_us / 1e6,
            drafted_by_depth=tuple(s.drafted_by_depth[k] for k in range(n)),
            accepted_by_depth=tuple(s.accepted_by_depth[k] for k in range(n)),
        )

    def print_stats(self, file: TextIO | None = None) -> None:
        """Print :meth:`statistics` for a human to read, to ``file`` or stdout."""
        s = self.statistics()
        share = f"{s.accepted / s.drafted:.1%}" if s.drafted else "none yet"
        by_depth = ", ".join(
            f"{a}/{d}" for a, d in zip(s.accepted_by_depth, s.drafted_by_depth, strict=True)
        )
        print(
            f"MTP: {s.drafts} drafts, {s.drafted} tokens drafted, {s.accepted} accepted ({share})\n"
            f"     accepted/drafted by depth: {by_depth}\n"
            f"     {s.decodes} draft decodes of {s.rows} rows; seconds: draft {s.draft_time:.3f}, "
            f"process {s.process_time:.3f}, accept {s.accept_time:.3f}",
            file=file or sys.stdout,
        )
