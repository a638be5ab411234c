"""One request's state while the scheduler has it."""

from __future__ import annotations

from mtpbatch.exceptions import InternalError
from mtpbatch.text import TextAssembler
from mtpbatch.types import (
    Completion,
    Delta,
    EntryResult,
    FinishReason,
    PlanEntry,
    SamplingParams,
    Timings,
    Usage,
)


class Sequence:
    """A request on its way: tokens, text, counts and times.

    There is no prefill or decode phase. A sequence has tokens, the prompt's and the generated
    ones, and ``n_computed`` of them have been through the model; every step lets the computed
    ones chase the rest. A long prompt is a long chase; a generating sequence trails by exactly
    one token, the one sampled last.

    Mutable state, all of it: ``seq_id``, ``n_computed``, ``token_ids``, the text assembler and
    its pieces, the counters ``drafted``, ``accepted``, ``accepted_by_depth`` and ``steps``, the
    times ``admitted``, ``first_token`` and ``ended``, and ``finish_reason``. It changes only in
    :meth:`admit`, :meth:`absorb` and :meth:`end`, and only the scheduler that holds the sequence
    calls these, in this order: once, once per step, once. Times are seconds of the caller's
    clock; everything else is fixed when the sequence is made.
    """

    __slots__ = (
        "_assembler",
        "_pieces",
        "accepted",
        "accepted_by_depth",
        "admitted",
        "draft_limit",
        "drafted",
        "ended",
        "finish_reason",
        "first_token",
        "max_tokens",
        "n_computed",
        "params",
        "prompt",
        "request_id",
        "seed",
        "seq_id",
        "steps",
        "submitted",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        seed: int,
        max_tokens: int,
        draft_limit: int,
        n_draft_max: int,
        assembler: TextAssembler,
        submitted: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.max_tokens = max_tokens
        self.draft_limit = draft_limit
        self.submitted = submitted

        self.seq_id: int | None = None
        self.n_computed = 0
        self.token_ids: list[int] = []
        self._assembler = assembler
        self._pieces: list[str] = []
        self.drafted = 0
        self.accepted = 0
        self.accepted_by_depth = [0] * n_draft_max
        self.steps = 0
        self.admitted: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self.finish_reason: FinishReason | None = None

    def __repr__(self) -> str:
        place = "waiting" if self.seq_id is None else f"seq {self.seq_id}"
        return (
            f"<Sequence {self.request_id}: {self.finish_reason or place}, "
            f"{self.n_computed} of {len(self.prompt)}+{len(self.token_ids)} tokens computed>"
        )

    @property
    def n_tokens(self) -> int:
        """Tokens known so far: the prompt's and the generated ones."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - len(self.token_ids)

    @property
    def generating(self) -> bool:
        """Whether its prompt has been computed, so that a step goes on from a sampled token."""
        return self.n_computed >= len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    def chunk(self, budget: int) -> tuple[int, ...]:
        """The next part of its prompt, at most ``budget`` tokens."""
        return self.prompt[self.n_computed : self.n_computed + budget]

    def admit(self, seq_id: int, now: float) -> None:
        """A sequence id was taken for it."""
        self.seq_id = seq_id
        self.admitted = now

    def absorb(self, entry: PlanEntry, result: EntryResult, now: float) -> Delta | None:
        """Take in what a step gave; the delta, if the step generated.

        Raises :class:`InternalError` for a result that the entry cannot have.
        """
        self._check(entry, result)
        self.n_computed += len(entry.tokens)
        if not entry.sample:
            return None

        # A stop token ends the answer and is no part of its text.
        visible = result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids
        text, n_taken = self._assembler.feed(visible)
        kept, reason = result.token_ids, result.finish_reason
        if self._assembler.stopped:
            kept, reason = kept[:n_taken], "stop"
        accepted = min(result.n_accepted, len(kept))

        self.token_ids.extend(kept)
        self.n_computed = self.n_tokens - 1
        self.steps += 1
        self.drafted += result.n_drafted
        self.accepted += accepted
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1
        if self.first_token is None:
            self.first_token = now
        if reason is not None:
            text += self._finish(reason, now)
        if text:
            self._pieces.append(text)
        return Delta(text, kept, accepted, reason)

    def end(self, reason: FinishReason, now: float) -> Delta:
        """End it from outside; the delta holds the text that was still held back."""
        text = self._finish(reason, now)
        if text:
            self._pieces.append(text)
        return Delta(text, (), 0, reason)

    def completion(self) -> Completion:
        """What came of the request. Only once it has finished."""
        if self.finish_reason is None or self.ended is None:
            raise InternalError(f"{self!r} has not ended")
        return Completion(
            request_id=self.request_id,
            text="".join(self._pieces),
            token_ids=tuple(self.token_ids),
            prompt_token_ids=self.prompt,
            finish_reason=self.finish_reason,
            drafted=self.drafted,
            accepted=self.accepted,
            accepted_by_depth=tuple(self.accepted_by_depth),
            steps=self.steps,
            usage=Usage(len(self.prompt), len(self.token_ids)),
            timings=self._timings(self.ended),
        )

    def _finish(self, reason: FinishReason, now: float) -> str:
        self.finish_reason = reason
        self.ended = now
        return self._assembler.flush()

    def _timings(self, ended: float) -> Timings:
        admitted, first = self.admitted, self.first_token
        return Timings(
            queued=0.0 if admitted is None else admitted - self.submitted,
            prefill=0.0 if admitted is None or first is None else first - admitted,
            first_token=0.0 if first is None else first - self.submitted,
            decode=0.0 if first is None else ended - first,
            total=ended - self.submitted,
        )

    def _check(self, entry: PlanEntry, result: EntryResult) -> None:
        n_tokens, n_accepted = len(result.token_ids), result.n_accepted
        if entry.sample:
            ended = result.finish_reason is not None
            right = (
                0 <= n_accepted <= result.n_drafted <= entry.n_draft
                and 1 <= n_tokens <= self.remaining
                and (n_tokens == n_accepted + 1 or (ended and n_tokens == n_accepted))
                and (ended or n_tokens < self.remaining)
            )
        else:
            right = result == _NOTHING
        if not right:
            raise InternalError(f"{self!r} was given {result} for {entry}")


_NOTHING = EntryResult(token_ids=(), n_drafted=0, n_accepted=0, finish_reason=None)
