"""Driving a scheduler and the scripted model by hand, step by step."""

from __future__ import annotations

import itertools
from typing import Any

from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import DraftWish
from mtpbatch.testing import ScriptedBackend
from mtpbatch.text import TextAssembler
from mtpbatch.types import Completion, FinishReason, Plan, SamplingParams

TICKETS = itertools.count(1)


def make_sequence(
    backend: ScriptedBackend,
    request_id: str,
    prompt: list[int],
    *,
    depth: int | None = None,
    followed: bool = True,
    shares_prompt: bool = False,
    grammar: object = None,
    **params: Any,
) -> Sequence:
    parsed = SamplingParams(**params)
    facts = backend.facts
    return Sequence(
        request_id,
        next(TICKETS),
        tuple(prompt),
        parsed,
        seed=7,
        max_tokens=min(parsed.max_tokens, facts.n_ctx - len(prompt)),
        wish=DraftWish(facts.n_draft_max if depth is None else depth, adaptive=depth is None),
        n_draft_max=facts.n_draft_max,
        followed=followed,
        assembler=TextAssembler(backend.token_bytes, parsed.stop),
        submitted=backend.clock(),
        shares_prompt=shares_prompt,
        grammar=grammar,
    )


def hand_over(scheduler: Scheduler, backend: ScriptedBackend) -> Plan:
    plan = scheduler.schedule(backend.clock())
    assert plan is not None
    assert backend.exchange(plan, wait=False) == []
    return plan


def step(scheduler: Scheduler, backend: ScriptedBackend) -> list[Event]:
    """What the next result does, if there is one."""
    backend.wake()
    return [
        event
        for result in backend.exchange(None, wait=True)
        for event in scheduler.update(result, backend.clock())
    ]


def run_step(scheduler: Scheduler, backend: ScriptedBackend) -> list[Event]:
    """As the engine does it: plans while there are any to make, then a step."""
    while plan := scheduler.schedule(backend.clock()):
        assert backend.exchange(plan, wait=False) == []
    return step(scheduler, backend)


def run_to_end(scheduler: Scheduler, backend: ScriptedBackend) -> list[Event]:
    events: list[Event] = []
    while scheduler.stats.running or scheduler.stats.waiting:
        events += run_step(scheduler, backend)
        scheduler.check_integrity()
        assert backend._n_shown, f"nothing goes on: {scheduler!r}"
    while (
        (plan := scheduler.schedule(backend.clock()))
        or backend.active
        or backend._plans
        or backend._results
    ):
        assert backend.exchange(plan, wait=False) == []  # what was under way, and what it left
        assert step(scheduler, backend) == []
    return events


def moves(plan: Plan) -> dict[int, int]:
    """Whom a plan parks and resumes at once: by the id it had, the one that it takes."""
    taken = {resume.snapshot: resume.seq_id for resume in plan.resume if resume.snapshot}
    return {p.seq_id: taken[p.snapshot] for p in plan.park if p.snapshot in taken}


def completions(events: list[Event]) -> dict[str, Completion]:
    return {event.request_id: event.completion for event in events if event.completion}


def undrafted(backend: ScriptedBackend, sequence: Sequence) -> tuple[list[int], str, FinishReason]:
    """What the script gives token by token: the slow truth."""
    params = sequence.params
    stop_ids = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_ids |= backend.facts.eog_token_ids
    token_ids: list[int] = []
    text = ""
    for token_id in backend.answer(sequence.prompt, sequence.max_tokens):
        token_ids.append(token_id)
        if token_id in stop_ids:
            return token_ids, text, "stop"
        text = backend.detokenize(token_ids)
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in params.stop if stop in text]
        if found:
            end, minus_length = min(found)  # the first that is complete; of several the longest
            return token_ids, text[: end + minus_length], "stop"
    return token_ids, text, "length"
