"""Runs plans: one native call per step."""

from __future__ import annotations

from typing import Any, Literal

from mtpbatch.exceptions import InternalError
from mtpbatch.native._library import Handle, call, ffi, lib
from mtpbatch.native.context import Context
from mtpbatch.native.session import MtpSession
from mtpbatch.types import EntryResult, Plan, StepResult

_INT32_MAX = 2**31 - 1

_FINISH: dict[int, Literal["stop", "length"] | None] = {
    lib.MTPBATCH_GOES_ON: None,
    lib.MTPBATCH_STOP_TOKEN: "stop",
    lib.MTPBATCH_TOKEN_LIMIT: "length",
}


class Executor(Handle):
    """Carries out plans on a target context, with drafts if it has a session.

    It remembers each sequence's position, last token and sampler, so that a plan only says what
    is new. Once a context has an executor, leave its sequences to it.
    """

    def __init__(self, target: Context, session: MtpSession | None = None) -> None:
        out = ffi.new("mtpbatch_executor **")
        self._lock = target._lock
        natives = target._native, session._native if session else ffi.NULL
        with self._lock:
            call(lib.mtpbatch_executor_create, *natives, out)
        super().__init__(out[0], lib.mtpbatch_executor_free)
        self._outcomes = ffi.new("mtpbatch_outcome[]", target.n_seq)
        self._report = ffi.new("mtpbatch_step_report *")

    def execute(self, plan: Plan) -> StepResult:
        """Carry out one step in one native call, without the GIL.

        Raises:
            DecodeError: the sequences of ``plan.entries`` have lost their state and must be
                released; the plan's releases and admissions stand.
            InternalError: the plan breaks a rule; nothing was changed.
        """
        executor = self._native
        try:
            native, references = _native_plan(plan)
        except OverflowError as error:
            raise InternalError(f"plan: {error}") from None
        outcomes, report = self._outcomes, self._report
        with self._lock:
            call(
                lib.mtpbatch_executor_step,
                executor,
                native,
                outcomes,
                report,
                invalid=InternalError,
            )
            del references
            return StepResult(
                entries=tuple(
                    EntryResult(
                        token_ids=tuple(ffi.unpack(o.tokens, o.n_tokens)) if o.n_tokens else (),
                        n_drafted=o.n_drafted,
                        n_accepted=o.n_accepted,
                        finish_reason=_FINISH[o.finish],
                    )
                    for o in (outcomes[i] for i in range(len(plan.entries)))
                ),
                n_target_tokens=report.n_target_tokens,
                n_draft_decodes=report.n_draft_decodes,
                draft_time=report.draft_us / 1e6,
                target_time=report.target_us / 1e6,
                sample_time=report.sample_us / 1e6,
            )


def _native_plan(plan: Plan) -> tuple[Any, list[Any]]:
    """The C struct, and what must stay referenced while it is used."""
    references: list[Any] = []
    admissions = []
    for a in plan.admit:
        stop = ffi.new("int32_t[]", a.stop_token_ids)
        references.append(stop)
        p = a.params
        admissions.append(
            [
                a.seq_id,
                p.temperature,
                min(p.top_k, _INT32_MAX),
                p.top_p,
                p.min_p,
                a.seed,
                min(a.max_tokens, _INT32_MAX),
                len(a.stop_token_ids),
                stop,
            ]
        )
    entries = []
    for e in plan.entries:
        tokens = ffi.new("int32_t[]", e.tokens) if e.tokens else ffi.NULL
        references.append(tokens)
        entries.append([e.seq_id, len(e.tokens), tokens, e.sample, e.n_draft])
    references += [
        ffi.new("int32_t[]", plan.release),
        ffi.new("mtpbatch_admission[]", admissions),
        ffi.new("mtpbatch_entry[]", entries),
    ]
    release, admit, entry = references[-3:]
    native = ffi.new(
        "mtpbatch_plan *",
        [len(plan.release), release, len(admissions), admit, len(entries), entry],
    )
    return native, references
