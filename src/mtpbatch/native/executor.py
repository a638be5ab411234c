"""Runs plans, on a native thread of its own."""

from __future__ import annotations

import math
import threading
from typing import Any, Final, Literal

import msgspec

from mtpbatch._process import close_at_exit, no_longer_open
from mtpbatch.exceptions import InternalError, NativeError
from mtpbatch.native._library import Handle, call, error_of, ffi, lib
from mtpbatch.native.context import Context
from mtpbatch.native.logprobs import from_native
from mtpbatch.native.sampler import INT32_MAX, DryMaker, sampling
from mtpbatch.native.session import MtpSession
from mtpbatch.types import (
    N_CONFIDENCES,
    NO_RESULT,
    EntryResult,
    Plan,
    SamplingParams,
    StepResult,
    TokenLogprobs,
)

_LONGEST_WAIT: Final = 3600.0  # seconds: a clock that is asked for more can overflow

# By mtpbatch_finish.
_FINISH: tuple[Literal["stop", "length"] | None, ...] = (None, "stop", "length")


class Executor(Handle):
    """Carries out plans on a target context, with drafts if it has a session.

    Steps run on a native thread, one after the other. It remembers each sequence's position, last
    token and sampler, so that a plan only says what is new and the next step needs no Python.
    From here on the contexts and the session belong to it: their own calls are refused.

    ::

        from mtpbatch.types import Admission, Plan, PlanEntry, SamplingParams

        with Model("model.gguf") as model, Context(model, n_ctx=512) as target:
            prompt = tuple(model.tokenize("In the beginning"))
            admission = Admission(0, SamplingParams(), seed=0, stop_token_ids=(), max_tokens=8)
            entry = PlanEntry(seq_id=0, tokens=prompt, sample=True, n_draft=0)
            plan = Plan(release=(), admit=(admission,), entries=(entry,), run_ahead=1)
            answer = []
            with Executor(target) as executor:
                while len(answer) < 8:
                    for result in executor.exchange(plan, wait=True):
                        answer += result.entries[0].token_ids
                    plan = None  # the one before stands, and is repeated
            print(model.detokenize(answer))
    """

    def __init__(self, target: Context, session: MtpSession | None = None) -> None:
        out = ffi.new("mtpbatch_executor **")
        natives = target._native, session._native if session else ffi.NULL
        with target._lock:
            call(lib.mtpbatch_executor_create, *natives, out)
        super().__init__(out[0], lib.mtpbatch_executor_free)
        self._dry_for = DryMaker(target.model, target.n_ctx)
        self._lock = threading.Lock()  # for what an exchange gives, which the next one overwrites
        self._n_steps = ffi.new("int32_t *")
        self._steps = ffi.new("mtpbatch_step **")
        self._error = ffi.new("mtpbatch_error *")
        close_at_exit(self)  # steps must not run on while the process takes itself apart

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        """Hand over a plan, and get the results of the steps that have ended since the last call.

        With ``wait``, waits until there are some, :meth:`wake` is called, or ``timeout`` seconds
        have passed. The steps that the last call gave count as taken in: see
        :attr:`Plan.run_ahead`. One native call, without the GIL.

        Raises:
            InternalError: the plan breaks a rule, and was not taken; or a step went wrong in a
                way that nothing can be said about the sequences.
            ContextError: it is closed.
        """
        executor = self._native
        try:
            native, references = _native_plan(plan, self._dry_for) if plan else (ffi.NULL, [])
        except OverflowError as error:
            raise InternalError(f"plan: {error}") from None
        wait_us = 0
        if wait:
            wait_us = -1 if timeout is None else math.ceil(min(timeout, _LONGEST_WAIT) * 1e6)
        n_steps, steps, failure = self._n_steps, self._steps, self._error
        with self._lock:
            status = lib.mtpbatch_executor_exchange(
                executor, native, wait_us, n_steps, steps, failure
            )
            del references
            if status != lib.MTPBATCH_OK:
                raise error_of(status, failure.message, InternalError)
            return [_result(steps[0][i]) for i in range(n_steps[0])]

    def prepare(self, params: SamplingParams) -> None:
        """Make now what takes long to make for a request that samples so. From any thread."""
        self._dry_for(params)

    def wake(self) -> None:
        """End the wait of the exchange under way, or of the next one. From any thread."""
        executor = self._owned
        if executor is not None and self._home.here:
            lib.mtpbatch_executor_wake(executor)

    def cancel(self, ticket: int) -> None:
        """Wake, and have the request of that :attr:`Admission.ticket` take part in no further step.

        From any thread; needs no exchange. The request must still be released. It may also be one
        that the next exchange hands over.
        """
        executor = self._owned
        if executor is not None and self._home.here:
            lib.mtpbatch_executor_cancel(executor, ticket)

    def close(self) -> None:
        """End the wait of an exchange, wait for the step under way, and free the contexts."""
        executor = self._owned
        no_longer_open(self)  # whatever becomes of it: nobody is to wait for the same step at exit
        if executor is not None and self._home.here:
            # Not left to freeing it: the last reference may be gone in another thread's call.
            lib.mtpbatch_executor_stop(executor)
        self._dry_for.forget()
        super().close()


def _result(step: Any) -> StepResult:
    failure: NativeError | None = None
    if step.status != lib.MTPBATCH_OK:
        error = error_of(step.status, step.message)
        if not isinstance(error, NativeError):
            raise error
        failure = error
    t = step.trials
    words = tuple(ffi.unpack(step.words, step.n_words)) if step.n_words else ()
    outcomes = _outcomes(words, step.n_entries)
    return StepResult(
        step.plan,
        _with_logprobs(outcomes, step) if step.n_scored else outcomes,
        step.n_target_tokens,
        step.n_target_decodes,
        step.n_draft_tokens,
        step.n_draft_decodes,
        step.gap_us / 1e6,
        step.draft_us / 1e6,
        step.target_us / 1e6,
        step.sample_us / 1e6,
        error=failure,
        trials=tuple((t[3 * i], t[3 * i + 1], t[3 * i + 2]) for i in range(step.n_trials)),
        saved=tuple((step.saved[i].snapshot, step.saved[i].n_bytes) for i in range(step.n_saved)),
        save_time=step.save_us / 1e6,
        lost=tuple(step.lost[i] for i in range(step.n_lost)),
        stuck=tuple(
            (one.seq_id, ffi.string(one.message).decode("utf-8", "replace"))
            for one in ffi.unpack(step.stuck, step.n_stuck)
        )
        if step.n_stuck
        else (),
    )


def _outcomes(words: tuple[int, ...], n: int) -> tuple[EntryResult, ...]:
    """What each of ``n`` entries was given: four columns of numbers, then everybody's tokens."""
    outcomes = []
    end = 4 * n
    columns = words[:n], words[n : 2 * n], words[2 * n : 3 * n], words[3 * n : end]
    for n_tokens, n_accepted, n_drafted, finish in zip(*columns, strict=True):
        if n_tokens:
            begin, end = end, end + n_tokens
            outcomes.append(EntryResult(words[begin:end], n_drafted, n_accepted, _FINISH[finish]))
        else:
            outcomes.append(NO_RESULT)
    return tuple(outcomes)


def _with_logprobs(outcomes: tuple[EntryResult, ...], step: Any) -> tuple[EntryResult, ...]:
    """The same with what the step tells of those that asked for log probabilities."""
    told: dict[int, tuple[list[TokenLogprobs], list[TokenLogprobs]]] = {}
    for i in range(step.n_scored):
        scored = step.scored[i]
        told.setdefault(scored.entry, ([], []))[scored.prompt].append(from_native(scored.logprobs))
    completed = list(outcomes)
    for entry, (generated, prompt) in told.items():
        completed[entry] = msgspec.structs.replace(
            outcomes[entry], logprobs=tuple(generated), prompt_logprobs=tuple(prompt)
        )
    return tuple(completed)


def _n_logprobs(asked: int | None) -> int:
    return -1 if asked is None else asked


def _native_plan(plan: Plan, dry_for: DryMaker) -> tuple[Any, list[Any]]:
    """The C struct, and what must stay referenced while it is used."""
    references: list[Any] = []
    admissions = []
    for a in plan.admit:
        stop = ffi.new("int32_t[]", a.stop_token_ids)
        p = a.params
        texts = [ffi.from_buffer(text.encode()) for text in p.stop]
        stop_texts = ffi.new("mtpbatch_text[]", [[len(text), text] for text in texts])
        how, used = sampling(
            p,
            a.seed,
            bad_words=a.bad_words,
            withheld=a.stop_token_ids if p.min_tokens else (),
            history=a.history,
            dry=dry_for(p),
        )
        references += [stop, texts, stop_texts, used]
        admissions.append(
            [
                a.seq_id,
                how,
                min(a.max_tokens, INT32_MAX),
                len(a.stop_token_ids),
                stop,
                len(texts),
                stop_texts,
                a.drafts,
                a.ticket,
                a.snapshot,
                a.n_reused,
                _n_logprobs(p.logprobs),
                _n_logprobs(p.prompt_logprobs),
                a.grammar._native if a.grammar is not None else ffi.NULL,
            ]
        )
    entries = []
    null = ffi.NULL
    for e in plan.entries:
        tokens = scored = null
        if e.tokens:
            tokens, scored = ffi.new("int32_t[]", e.tokens), ffi.new("int32_t[]", e.scored)
            references += [tokens, scored]
        entries.append(
            [
                e.seq_id,
                len(e.tokens),
                tokens,
                e.sample,
                e.n_draft,
                e.selective,
                e.expected,
                len(e.scored),
                scored,
            ]
        )
    arrays = {
        "release": ffi.new("int32_t[]", plan.release),
        "admit": ffi.new("mtpbatch_admission[]", admissions),
        "entries": ffi.new("mtpbatch_entry[]", entries),
        "save": ffi.new("mtpbatch_save[]", [[s.seq_id, s.snapshot] for s in plan.save]),
        "park": ffi.new("mtpbatch_park[]", [[p.seq_id, p.snapshot] for p in plan.park]),
        "drop": ffi.new("int64_t[]", plan.drop),
        "forget": ffi.new("int64_t[]", plan.forget),
        "resume": ffi.new(
            "mtpbatch_resume[]", [[r.seq_id, r.ticket, r.snapshot] for r in plan.resume]
        ),
    }
    references.append(arrays)
    sizes = {f"n_{name}": len(array) for name, array in arrays.items()}
    terms = ffi.NULL
    if (t := plan.terms) is not None:
        if not len(t.greedy) == len(t.sampled) == N_CONFIDENCES:
            raise InternalError(f"plan: terms need {N_CONFIDENCES} classes of either kind")
        prices = [t.target_row, t.target_pass, t.draft_row, t.draft_decode]
        terms = ffi.new("mtpbatch_terms *", [*prices, [*t.greedy, *t.sampled]])
        references.append(terms)
    rest = {
        "number": plan.number,
        "terms": terms,
        "run_ahead": plan.run_ahead,
        "followed": plan.followed,
        "keep_prompts": plan.keep_prompts,
    }
    return ffi.new("mtpbatch_plan *", arrays | sizes | rest), references
