"""One request's state while the scheduler has it."""

from __future__ import annotations

from mtpbatch.exceptions import DecodeError, InternalError
from mtpbatch.speculation import DraftWish, Habit, at_least
from mtpbatch.text import TextAssembler
from mtpbatch.types import (
    NO_RESULT,
    Completion,
    Delta,
    EntryResult,
    FinishReason,
    PlanEntry,
    SamplingParams,
    Timings,
    TokenLogprobs,
    Usage,
)


class Sequence:
    """A request on its way: tokens, text, counts and times.

    There is no prefill or decode phase. A sequence has tokens, the prompt's and the generated
    ones, and ``n_computed`` of them have been through the model; every step lets the computed
    ones chase the rest. A long prompt is a long chase; a generating sequence trails by exactly
    one token, the one sampled last. What is fed before it generates is its prompt; after a pause
    in which its state was given up, all tokens known by then. Of these, ``n_planned`` tokens have
    been handed out: plans are ahead of results.

    Text is assembled as tokens come if somebody may need it before the end: who follows the
    request, or a stop text. Otherwise it is at the end, which is much cheaper.

    Mutable state, all of it: ``seq_id``, ``n_planned``, ``save_points``, ``token_ids``, the log
    probabilities ``_logprobs`` and ``_prompt_logprobs``, the text assembler and its pieces, what is
    fed (``_feed``), ``state_token_ids``, its drafting ``habit``, the counters ``n_computed``,
    ``cached_tokens``, ``_n_accepting`` and ``drafted``, the times ``admitted``, ``first_token`` and
    ``ended``, and ``finish_reason``. It changes only in :meth:`admit`, :meth:`take_chunk`,
    :meth:`absorb`, :meth:`pause`, :meth:`start_again`, :meth:`resume` and :meth:`end`, and only the
    scheduler that holds the sequence calls these; its speculator updates the ``habit``. Times are
    seconds of the caller's clock; everything else is fixed when the sequence is made.
    """

    __slots__ = (
        "_assembler",
        "_feed",
        "_logprobs",
        "_n_accepting",
        "_pieces",
        "_prompt_logprobs",
        "_reads_along",
        "admitted",
        "bad_words",
        "cached_tokens",
        "drafted",
        "ended",
        "finish_reason",
        "first_token",
        "followed",
        "grammar",
        "habit",
        "max_tokens",
        "n_computed",
        "n_planned",
        "params",
        "prompt",
        "request_id",
        "save_points",
        "seed",
        "seq_id",
        "shares_prompt",
        "state_token_ids",
        "submitted",
        "ticket",
        "token_ids",
        "wish",
    )

    def __init__(
        self,
        request_id: str,
        ticket: int,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        seed: int,
        max_tokens: int,
        bad_words: tuple[tuple[int, ...], ...] = (),
        wish: DraftWish,
        n_draft_max: int,
        followed: bool,
        assembler: TextAssembler,
        submitted: float,
        shares_prompt: bool = False,
        grammar: object = None,
    ) -> None:
        """``shares_prompt``: requests of the same prompt come with it."""
        self.request_id = request_id
        self.ticket = ticket
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.max_tokens = max_tokens
        self.bad_words = bad_words
        self.wish = wish
        self.followed = followed
        self.submitted = submitted
        self.shares_prompt = shares_prompt
        self.grammar = grammar
        self._reads_along = followed or bool(params.stop)

        self.seq_id: int | None = None
        self.n_planned = 0
        self.n_computed = 0  # have been through the model: of generated tokens all but the last
        self.save_points: tuple[int, ...] = ()  # lengths at which its prefill is cut
        self.cached_tokens = 0  # of the prompt, from a snapshot
        self.token_ids: list[int] = []
        self.state_token_ids: tuple[int, ...] = ()  # what the executor holds of it at its end
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprobs] | None = (
            None if params.prompt_logprobs is None else []
        )
        self._feed = prompt
        self._assembler = assembler
        self._pieces: list[str] = []
        self.habit = Habit.guess(n_draft_max)
        self._n_accepting = [0] * (n_draft_max + 1)  # steps by how many drafts they accepted
        self.drafted = 0
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
    def n_feed(self) -> int:
        """Tokens that are fed before it generates: its prompt, or all that it had at a pause."""
        return len(self._feed)

    @property
    def n_tokens_most(self) -> int:
        """Tokens that it can have in the end."""
        return len(self.prompt) + self.max_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens known so far: the prompt's and the generated ones."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_tokens - len(self.token_ids)

    @property
    def prompt_planned(self) -> bool:
        """Whether plans have handed out all that is fed, so that it generates from then on."""
        return self.n_planned == len(self._feed)

    @property
    def scores_prompt(self) -> bool:
        """Whether what is fed tells it the log probabilities of its prompt, row by row."""
        # What is fed again after a pause has told them before.
        return self._prompt_logprobs is not None and len(self._feed) == len(self.prompt)

    @property
    def steps(self) -> int:
        """Decodes that produced tokens of it."""
        return sum(self._n_accepting)

    @property
    def accepted(self) -> int:
        """Drafted tokens that were accepted."""
        return sum(self.accepted_by_depth)

    @property
    def accepted_by_depth(self) -> tuple[int, ...]:
        """How often the draft at depth 1, 2, … was accepted."""
        return at_least(self._n_accepting)

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    def take_chunk(self, budget: int) -> tuple[int, ...]:
        """Plan the next part of what is fed: at most ``budget`` tokens, not past a save point."""
        end = min([self.n_planned + budget, *(p for p in self.save_points if p > self.n_planned)])
        chunk = self._feed[self.n_planned : end]
        self.n_planned += len(chunk)
        return chunk

    def scored_by(self, chunk: tuple[int, ...]) -> tuple[int, ...]:
        """What of its prompt a chunk tells the probabilities of, if it was the last one taken."""
        if not self.scores_prompt:
            return ()
        return self.prompt[self.n_planned - len(chunk) + 1 : self.n_planned + 1]

    def admit(
        self,
        seq_id: int,
        habit: Habit,
        now: float,
        *,
        cached_tokens: int = 0,
        save_points: tuple[int, ...] = (),
    ) -> None:
        """A sequence id was taken for it; so many tokens of its prompt come from a snapshot.

        It begins with others' drafting habit.
        """
        self.seq_id = seq_id
        self.habit = habit
        self.n_planned = self.n_computed = self.cached_tokens = cached_tokens
        self.save_points = save_points
        if self.admitted is None:
            self.admitted = now

    def pause(self) -> None:
        """It gives up its sequence id; results of earlier steps may still come."""
        self.seq_id = None

    def start_again(self) -> None:
        """It gives up its sequence id, and what was computed, before it has generated."""
        if self.token_ids:
            raise InternalError(f"{self!r} has generated")
        self.seq_id = None
        self.n_planned = self.n_computed = self.cached_tokens = 0
        self.save_points = ()
        if self._prompt_logprobs:
            self._prompt_logprobs.clear()

    def resume(self, seq_id: int, *, from_snapshot: bool) -> None:
        """Another sequence id was taken for it; without a snapshot, all is fed again."""
        self.seq_id = seq_id
        if not from_snapshot:
            self._feed = (*self.prompt, *self.token_ids)
            self.n_planned = self.n_computed = 0
            self.save_points = ()

    def absorb(
        self, entry: PlanEntry, result: EntryResult, now: float, *, repeated: bool
    ) -> Delta | None:
        """Take in what a step gave: a delta, without its text if nobody needs it before the end.

        ``None`` if it gave no tokens: more of the prompt is to come, or the sequence is being
        cancelled. ``repeated``: the entry's prompt tokens were fed by an earlier step. Raises
        :class:`DecodeError` for a result that the entry cannot have.
        """
        kept, accepted, reason = result.token_ids, result.n_accepted, result.finish_reason
        room = self.max_tokens - len(self.token_ids)
        chunk, n_scored = ((), 0) if repeated else (entry.tokens, len(entry.scored))
        n_logprobs = 0 if self._logprobs is None else len(kept)
        if not (_fits(entry, result, room, n_scored, n_logprobs) and self._assembler.knows(kept)):
            raise DecodeError(f"{self!r} was given {result} for {entry}")
        if chunk and (kept or not entry.sample):
            self.n_computed += len(chunk)
        if self._prompt_logprobs is not None:
            self._prompt_logprobs += result.prompt_logprobs
        if not kept:
            return None

        text = ""
        if self._reads_along or reason is not None:
            unread = kept if self._reads_along else (*self.token_ids, *kept)
            # A stop token ends the answer and is no part of its text.
            text, n_taken = self._assembler.feed(unread[:-1] if reason == "stop" else unread)
            if self._assembler.stopped:
                kept, reason = kept[:n_taken], "stop"
                accepted = min(accepted, n_taken)
        if not chunk:  # else it was prompt, of which nothing is drafted
            most = entry.n_draft
            self.habit.note(most if most < room else room - 1, result.n_drafted, accepted)
        logprobs = None
        if self._logprobs is not None:
            logprobs = result.logprobs[: len(kept)]
            self._logprobs += logprobs
        self.token_ids += kept
        # All but the last, and the last one of before, which there is not after what was fed.
        self.n_computed += len(kept) - bool(chunk)
        self._n_accepting[accepted] += 1
        self.drafted += result.n_drafted
        if self.first_token is None:
            self.first_token = now
        if reason is not None:
            # A last token that was drafted has been through the model; a sampled one has not.
            given = (*self.prompt, *self.token_ids, *result.token_ids[len(kept) :])
            drafted_end = len(result.token_ids) == result.n_accepted
            self.state_token_ids = given if drafted_end else given[:-1]
            text += self._finish(reason, now)
        if text:
            self._pieces.append(text)
        return Delta(text, kept, accepted, reason, logprobs)

    def end(self, reason: FinishReason, now: float) -> Delta:
        """End it from outside; the delta holds the text that was still held back."""
        text = "" if self._reads_along else self._assembler.feed(self.token_ids)[0]
        text += self._finish(reason, now)
        if text:
            self._pieces.append(text)
        return Delta(text, (), 0, reason, None if self._logprobs is None else ())

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
            accepted_by_depth=self.accepted_by_depth,
            steps=self.steps,
            usage=Usage(len(self.prompt), len(self.token_ids), self.cached_tokens),
            timings=self._timings(self.ended),
            logprobs=_frozen(self._logprobs),
            prompt_logprobs=_frozen(self._prompt_logprobs),
            metadata=self.params.metadata.copy(),
        )

    def _finish(self, reason: FinishReason, now: float) -> str:
        self.finish_reason = reason
        self.ended = now
        return self._assembler.flush()

    def _timings(self, ended: float) -> Timings:
        admitted, first = self.admitted, self.first_token
        return Timings(
            queued=(ended if admitted is None else admitted) - self.submitted,
            prefill=0.0 if admitted is None or first is None else first - admitted,
            first_token=0.0 if first is None else first - self.submitted,
            decode=0.0 if first is None else ended - first,
            total=ended - self.submitted,
        )


def _frozen(logprobs: list[TokenLogprobs] | None) -> tuple[TokenLogprobs, ...] | None:
    return None if logprobs is None else tuple(logprobs)


def _fits(entry: PlanEntry, result: EntryResult, room: int, n_scored: int, n_logprobs: int) -> bool:
    """Whether it is a result that the entry can have, with room for so many tokens."""
    n_tokens, n_accepted = len(result.token_ids), result.n_accepted
    if len(result.logprobs) != n_logprobs:
        return False
    if not n_tokens and result == NO_RESULT:
        return True  # it took no part, or has more of its prompt to come
    if len(result.prompt_logprobs) != n_scored:
        return False
    if not entry.sample:
        return result == EntryResult((), 0, 0, None, prompt_logprobs=result.prompt_logprobs)
    if not n_tokens or not 0 <= n_accepted <= result.n_drafted <= entry.n_draft:
        return False
    if result.finish_reason is None:
        return n_accepted + 1 == n_tokens < room
    return n_accepted <= n_tokens <= min(n_accepted + 1, room)
