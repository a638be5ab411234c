"""Executor: right token for token, whatever the plans; wrong plans change nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest

import loops
import random_model
from mtpbatch.exceptions import ContextError, InternalError, MtpDraftError, MtpProcessError
from mtpbatch.native import Batch, Context, Executor, Model, MtpSession
from mtpbatch.native._library import lib
from mtpbatch.types import NO_RESULT, Admission, Plan, PlanEntry, SamplingParams, StepResult

DEPTH = 3
PROMPT = (40, 50, 60, 70, 80)


def make_target(model: Model, **params: Any) -> Context:
    given: dict[str, Any] = {
        "n_seq": 4,
        "n_ctx": 96,
        "n_rs_seq": DEPTH,
        "kv_type": "f32",
        "n_threads": 1,
    }
    return Context(model, **(given | params))


def make(model: Model, **params: Any) -> tuple[Context, Executor]:
    target = make_target(model, **params)
    session = MtpSession(target, Context.mtp(target), target.n_seq, DEPTH)
    return target, Executor(target, session)


def admit(
    seq_id: int,
    max_tokens: int = 32,
    stop: tuple[int, ...] = (),
    stop_texts: tuple[str, ...] = (),
    **params: Any,
) -> Admission:
    sampling = SamplingParams(stop=stop_texts, **params)
    return Admission(seq_id, sampling, sampling.seed or 0, stop, max_tokens)


def prefill(seq_id: int, tokens: Sequence[int] = PROMPT, *, sample: bool = True) -> PlanEntry:
    return PlanEntry(seq_id, tuple(tokens), sample, 0)


def step(seq_id: int, n_draft: int = 0) -> PlanEntry:
    return PlanEntry(seq_id, (), True, n_draft)


def undrafted(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    with make_target(model, n_seq=1, n_ctx=1024, n_batch=1024) as context:
        return loops.greedy(context, 0, prompt, count)


def generate(executor: Executor, seq_id: int, count: int, n_draft: int) -> list[int]:
    """Release the sequence, start PROMPT on it and generate."""
    plan = Plan((), (admit(seq_id, count),), (prefill(seq_id),))
    tokens: list[int] = []
    while True:
        [result] = loops.execute(executor, plan).entries
        tokens += result.token_ids
        if result.finish_reason:
            loops.execute(executor, Plan((seq_id,), (), ()))
            return tokens
        plan = Plan((), (), (step(seq_id, n_draft),))


# --------------------------------------------------------------------------------- wrong plans

WRONG = {
    "release of an idle sequence": Plan((1,), (), ()),
    "release twice": Plan((0, 0), (), ()),
    "release of an unknown sequence": Plan((4,), (), ()),
    "release of a negative sequence": Plan((-1,), (), ()),
    "admission of an active sequence": Plan((), (admit(0),), ()),
    "admission twice": Plan((), (admit(1), admit(1)), ()),
    "admission of an unknown sequence": Plan((), (admit(4),), ()),
    "admission of a negative sequence": Plan((), (admit(-1),), ()),
    "admission without an entry": Plan((), (admit(1),), (step(0),)),
    "admission for no token": Plan((), (admit(1, 0),), ()),
    "entry of an idle sequence": Plan((), (), (prefill(1),)),
    "entry of a released sequence": Plan((0,), (), (step(0),)),
    "entry of an unknown sequence": Plan((), (), (step(4),)),
    "entry twice": Plan((), (), (step(0), step(0))),
    "more prompt after sampling": Plan((), (), (prefill(0, [5]),)),
    "decode without sampling": Plan((), (), (PlanEntry(0, (), False, 0),)),
    "no prompt": Plan((), (admit(1),), (step(1),)),
    "more prompt and answer than the context holds": Plan((), (admit(1),), (prefill(1, [5] * 66),)),
    "draft of a request that never drafts": Plan(
        (),
        (Admission(1, SamplingParams(), 0, (), 9, drafts=False),),
        (PlanEntry(1, PROMPT, True, 1),),
    ),
    "negative run_ahead": Plan((), (), (step(0),), run_ahead=-1),
    "more outputs than n_outputs_max when repeated": Plan(
        (), (admit(2),), (step(0, 2), step(3, 2), PlanEntry(2, PROMPT, True, 2)), run_ahead=1
    ),
    "draft deeper than the session": Plan((), (), (step(0, DEPTH + 1),)),
    "negative draft": Plan((), (), (step(0, -1),)),
    "token not in the vocabulary": Plan((), (admit(1),), (prefill(1, [5, 300]),)),
    "negative token": Plan((), (admit(1),), (prefill(1, [-1]),)),
    "number that fits no integer": Plan((), (admit(1),), (prefill(1, [2**40]),)),
    "prompt longer than the context": Plan((), (admit(1),), (prefill(1, [5] * 97),)),
    "more rows than n_batch": Plan(
        (), (admit(1), admit(2)), (prefill(1, [5] * 60), prefill(2, [5] * 41))
    ),
    "more outputs than n_outputs_max": Plan(
        (), (admit(2),), (step(0, DEPTH), step(3, DEPTH), prefill(2))
    ),
    "tokens scored that nobody asked for": Plan(
        (), (admit(1, logprobs=0),), (PlanEntry(1, PROMPT, True, 0, scored=(5,)),)
    ),
    "more tokens scored than there are rows": Plan(
        (), (admit(1, prompt_logprobs=0),), (PlanEntry(1, PROMPT, False, 0, scored=(5,) * 6),)
    ),
    "a sampled row scored": Plan(
        (), (admit(1, prompt_logprobs=0),), (PlanEntry(1, PROMPT, True, 0, scored=(5,) * 5),)
    ),
    "token scored that is not in the vocabulary": Plan(
        (), (admit(1, prompt_logprobs=0),), (PlanEntry(1, PROMPT, True, 0, scored=(300,)),)
    ),
    "more rows scored than n_outputs_max": Plan(
        (), (admit(1, prompt_logprobs=0),), (PlanEntry(1, (5,) * 9, False, 0, scored=(5,) * 9),)
    ),
    "more probable tokens than there is place for": Plan(
        (), (admit(1, logprobs=21),), (prefill(1),)
    ),
    "less than no probable tokens": Plan((), (admit(1, prompt_logprobs=-2),), (prefill(1),)),
    "a right entry before a wrong one": Plan((3,), (admit(1),), (prefill(1), step(0, 9))),
}


@pytest.mark.parametrize("plan", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_plan_changes_nothing(tiny: Model, plan: Plan) -> None:
    def run(wrong: Plan | None) -> tuple[StepResult, ...]:
        target, executor = make(tiny, n_batch=100, n_outputs_max=8)
        results = [
            loops.execute(executor, Plan((), (admit(0), admit(3)), (prefill(0), prefill(3, [99])))),
            loops.execute(executor, Plan((), (), (step(0, 2), step(3, 3)))),
        ]
        if wrong:
            lengths = [target.length(s) for s in range(4)]
            with pytest.raises(InternalError):
                loops.execute(executor, wrong)
            assert lengths == [target.length(s) for s in range(4)]
        # Sequences 1 and 2 are still free, 0 and 3 go on.
        results.append(
            loops.execute(
                executor, Plan((), (admit(1), admit(2)), (prefill(1), prefill(2, [5, 6])))
            )
        )
        results.append(loops.execute(executor, Plan((), (), (step(0, 3), step(3, 3)))))
        return tuple(
            (result.entries, result.n_target_tokens, result.n_draft_decodes)  # type: ignore[misc]
            for result in results
        )

    assert run(plan) == run(None)


def test_a_wait_ends_when_its_time_is_over(tiny: Model) -> None:
    """On the clock of the machine: the wait is a native one."""
    _, executor = make(tiny)
    with executor:
        begin = time.monotonic()
        assert executor.exchange(None, wait=True, timeout=0.03) == []
        assert time.monotonic() - begin >= 0.03
        assert executor.exchange(None, wait=True, timeout=0.0) == []
        executor.wake()
        assert executor.exchange(None, wait=True, timeout=1e300) == [], "woken, not overflown"
        plan = Plan((), (admit(0),), (prefill(0),), number=1)
        [result] = executor.exchange(plan, wait=True, timeout=3600.0)
        assert len(result.entries[0].token_ids) == 1, "a result ends it sooner"


def test_a_finished_sequence_does_not_go_on(tiny: Model) -> None:
    _, executor = make(tiny)
    [result] = loops.execute(executor, Plan((), (admit(0, 1),), (prefill(0),))).entries
    assert result.finish_reason == "length"
    assert loops.execute(executor, Plan((), (), (step(0),))).entries == (NO_RESULT,)
    loops.execute(executor, Plan((0,), (), ()))


def test_a_context_is_used_to_its_end(tiny: Model) -> None:
    target, executor = make(tiny, n_ctx=8)
    loops.execute(executor, Plan((), (admit(0, 4),), (prefill(0),)))
    with pytest.raises(InternalError, match="outgrow"):
        loops.execute(executor, Plan((), (admit(1, 5),), (prefill(1),)))
    plan = Plan((), (), (step(0, 3),))
    while not loops.execute(executor, plan).entries[0].finish_reason:
        pass
    assert target.length(0) in (7, 8), "the last token needs no place, unless it was drafted"


def test_an_empty_plan_does_nothing(tiny: Model) -> None:
    _, executor = make(tiny)
    assert loops.execute(executor, Plan((), (), ())).entries == ()


def test_without_a_session_nothing_can_be_drafted(tiny: Model) -> None:
    executor = Executor(make_target(tiny))
    loops.execute(executor, Plan((), (admit(0),), (prefill(0),)))
    with pytest.raises(InternalError, match="cannot draft"):
        loops.execute(executor, Plan((), (), (step(0, 1),)))
    assert generate(executor, 1, 20, 0) == undrafted(tiny, PROMPT, 20)


def test_the_session_must_draft_for_the_target(tiny: Model) -> None:
    target, other = make_target(tiny), make_target(tiny)
    session = MtpSession(other, Context.mtp(other), 4, DEPTH)
    with pytest.raises(ContextError, match="another context"):
        Executor(target, session)
    with pytest.raises(ContextError):
        Executor(Context.mtp(target))


def test_a_context_that_is_driven_is_left_alone(tiny: Model) -> None:
    target = make_target(tiny)
    session = MtpSession(target, Context.mtp(target), 4, DEPTH)
    executor = Executor(target, session)
    batch = Batch()
    batch.add_sequence(PROMPT, 0, 0)
    uses: list[Callable[[], object]] = [
        lambda: target.decode(batch),
        lambda: target.truncate(0, 0),
        lambda: session.process(batch),
        lambda: session.draft(0, 5, 60),
        lambda: session.accept(0, 0),
        lambda: session.save(0),
        lambda: session.restore(0, b""),
        lambda: session.fork(0, 1),
        lambda: Executor(target, session),
    ]
    for use in uses:
        with pytest.raises(ContextError, match="an executor drives this context"):
            use()
    executor.close()
    target.decode(batch)


def test_what_a_context_had_decoded_before_is_cleared(tiny: Model) -> None:
    target = make_target(tiny)
    loops.feed(target, 0, [99] * 60)
    executor = Executor(target)
    assert generate(executor, 0, 20, 0) == undrafted(tiny, PROMPT, 20)


def test_closed_parts_stay_for_as_long_as_the_executor_runs(tiny_path: Path) -> None:
    model = Model(tiny_path)
    expected = undrafted(model, PROMPT, 20)
    target = make_target(model)
    draft = Context.mtp(target)
    session = MtpSession(target, draft, 4, DEPTH)
    executor = Executor(target, session)
    for part in (model, session, draft, target):
        part.close()
    assert generate(executor, 0, 20, DEPTH) == expected
    executor.close()
    executor.close()
    with pytest.raises(ContextError, match="Executor is closed"):
        loops.execute(executor, Plan((), (), ()))


@pytest.mark.parametrize("with_session", [True, False])
def test_a_session_goes_on_after_an_executor(tiny: Model, with_session: bool) -> None:
    """Though its last steps, of a request that never drafts, kept no hidden rows."""

    def made() -> tuple[Context, MtpSession]:
        target = make_target(tiny)
        return target, MtpSession(target, Context.mtp(target), 4, DEPTH)

    def goes_on(target: Context, session: MtpSession) -> loops.Stream:
        return loops.drafted(target, session, {1: PROMPT}, 24, lambda *_: DEPTH)[1]

    target, session = made()
    executor = Executor(target, session if with_session else None)
    undrafting = msgspec.structs.replace(admit(0), drafts=False)
    loops.execute(executor, Plan((), (undrafting,), (prefill(0),)))
    executor.close()
    batch = Batch()
    batch.add_sequence(PROMPT, 0, 0)
    with pytest.raises(MtpProcessError, match="processed already" if with_session else "not kept"):
        session.process(batch)
    assert goes_on(target, session) == goes_on(*made())


# ---------------------------------------------------------------------------------- ends of text


def one_request(
    model: Model, n_draft: int, max_tokens: int, stop: tuple[int, ...]
) -> tuple[list[int], str | None, list[tuple[int, int, int]]]:
    """Tokens, finish reason, and (tokens, drafted, accepted) of each step."""
    _, executor = make(model)
    plan = Plan((), (admit(0, max_tokens, stop),), (prefill(0),))
    tokens: list[int] = []
    steps: list[tuple[int, int, int]] = []
    while True:
        [result] = loops.execute(executor, plan).entries
        tokens += result.token_ids
        steps.append((len(result.token_ids), result.n_drafted, result.n_accepted))
        if result.finish_reason:
            return tokens, result.finish_reason, steps
        plan = Plan((), (), (step(0, n_draft),))


@pytest.mark.parametrize("n_draft", [0, 1, DEPTH])
def test_limits_and_stop_tokens_end_at_the_same_token_whatever_is_drafted(
    tiny: Model, n_draft: int
) -> None:
    text = undrafted(tiny, PROMPT, 24)
    inside = 0
    for count in range(1, 24):
        tokens, reason, steps = one_request(tiny, n_draft, count, ())
        assert (tokens, reason) == (text[:count], "length")
        for produced, drafted, accepted in steps:
            assert accepted <= drafted <= n_draft
            assert produced in (accepted, accepted + 1)
    for stop in set(text):
        tokens, reason, steps = one_request(tiny, n_draft, 60, (299, stop))
        assert (tokens, reason) == (text[: text.index(stop) + 1], "stop")
        inside += steps[-1][1] > 0 and steps[-1][2] == steps[-1][0]
    if n_draft == DEPTH:
        assert inside > 0  # some ended with an accepted draft


# ------------------------------------------------------------------------------ long churn


@dataclasses.dataclass(slots=True)
class Request:
    prompt: list[int]
    max_tokens: int
    stop: tuple[int, ...]
    expected: list[int]
    reason: str
    fed: int = 0
    tokens: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def texts(tiny: Model) -> list[tuple[list[int], list[int]]]:
    """Prompts from 1 to 40 tokens, and their undrafted continuations."""
    draw = random.Random(5)
    prompts = [[draw.randrange(10, 200) for _ in range(n)] for n in (1, 2, 3, 7, 12, 19, 40)]
    return [(prompt, undrafted(tiny, prompt, 24)) for prompt in prompts]


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("seed", range(4))
def test_random_plans_give_what_undrafted_decoding_gives(
    tiny: Model, texts: list[tuple[list[int], list[int]]], seed: int, kv_unified: bool
) -> None:
    """Requests come and go, in chunks, idle steps, changing depths, and on reused sequences.

    Every step mixes drafts of different lengths, so that llama.cpp needs several passes, which
    must not cost a sequence the recurrent states that its rejected drafts are taken back to.
    """
    draw = random.Random(seed)
    n_seq = 5
    _, executor = make(tiny, n_seq=n_seq, n_ctx=128, n_batch=60, n_ubatch=24, kv_unified=kv_unified)
    active: dict[int, Request] = {}
    done: list[int] = []
    finished = accepted = 0
    for _ in range(150):
        release, done = tuple(done), []
        for s in [s for s in active if draw.random() < 0.03]:  # aborted
            release += (s,)
            del active[s]
        admissions = []
        new = {s for s in range(n_seq) if s not in active and draw.random() < 0.5}
        for s in new:
            active[s] = new_request(draw, texts)
        entries = []
        room = 60
        for s in draw.sample(sorted(active), len(active)):
            request = active[s]
            left = request.prompt[request.fed :]
            if draw.random() < 0.2 or room < 4:
                if s in new:
                    del active[s]  # an admission comes with an entry
                continue  # idle for a step
            if s in new:
                admissions.append(admit(s, request.max_tokens, request.stop))
            if left:
                chunk = left[: draw.randint(1, min(room, 20))]
                entries.append(prefill(s, chunk, sample=len(chunk) == len(left)))
                request.fed += len(chunk)
                room -= len(chunk)
            else:
                entries.append(step(s, draw.randint(0, DEPTH)))
                room -= 1 + entries[-1].n_draft
        keep = draw.random() < 0.5
        plan = Plan(release, tuple(admissions), tuple(entries), keep_prompts=keep)
        results = loops.execute(executor, plan).entries
        for entry, result in zip(entries, results, strict=True):
            request = active[entry.seq_id]
            request.tokens += result.token_ids
            assert request.tokens == request.expected[: len(request.tokens)]
            assert bool(result.token_ids) == entry.sample
            accepted += result.n_accepted
            if result.finish_reason:
                assert (request.tokens, result.finish_reason) == (request.expected, request.reason)
                finished += 1
                done.append(entry.seq_id)
                del active[entry.seq_id]
    assert finished > 20
    assert accepted > 20


def new_request(draw: random.Random, texts: list[tuple[list[int], list[int]]]) -> Request:
    prompt, text = draw.choice(texts)
    expected, reason = text[: draw.randint(1, len(text))], "length"
    stop: tuple[int, ...] = ()
    if draw.random() < 0.3:
        stop = (draw.choice(text),)
        expected, reason = text[: text.index(stop[0]) + 1], "stop"
    limit = len(expected) if reason == "length" else 60
    return Request(prompt, limit, stop, expected, reason)


def test_a_sequence_is_released_and_taken_anew_in_one_plan(tiny: Model) -> None:
    _, executor = make(tiny)
    expected = undrafted(tiny, PROMPT, 30)
    loops.execute(
        executor, Plan((), (admit(0), admit(1)), (prefill(0, [99] * 30), prefill(1, [98])))
    )
    tokens: list[int] = []
    for _ in range(3):
        loops.execute(executor, Plan((), (), (step(0, DEPTH), step(1, DEPTH))))
        plan = Plan((0,), (admit(0, 30),), (prefill(0), step(1, 1)))
        tokens = []
        for _ in range(4):
            tokens += loops.execute(executor, plan).entries[0].token_ids
            plan = Plan((), (), (step(0, DEPTH),))
        assert tokens == expected[: len(tokens)]


def test_an_id_drafts_or_never_does_from_one_request_to_the_next(tiny: Model) -> None:
    _, executor = make(tiny)
    expected = {s: undrafted(tiny, [50 + s], 24) for s in range(2)}
    for turn in range(4):
        drafting = {0: turn % 2 == 0, 1: turn % 2 == 1}
        admissions = tuple(
            msgspec.structs.replace(admit(s, 24), drafts=drafts) for s, drafts in drafting.items()
        )
        plan = Plan((), admissions, tuple(prefill(s, [50 + s]) for s in drafting))
        tokens: dict[int, list[int]] = {0: [], 1: []}
        accepted = 0
        while min(map(len, tokens.values())) < 24:
            for s, result in enumerate(loops.execute(executor, plan).entries):
                tokens[s] += result.token_ids
                accepted += result.n_accepted
            plan = Plan((), (), tuple(step(s, DEPTH * drafts) for s, drafts in drafting.items()))
        assert tokens == expected
        assert accepted > 0
        loops.execute(executor, Plan((0, 1), (), ()))


def long_prompt(
    path: Path, *, width: int, ff: int, drafts: bool = True, keep: bool = True
) -> tuple[MtpSession, StepResult]:
    """What a prompt of 300 tokens costs, of a request that may draft or never does, if its hidden
    rows are kept or not."""
    if not path.exists():
        shape: dict[str, Any] = {"layers": 1, "mtp_heads": 1, "heads": 1, "vocab": 300}
        random_model.write_random_step35(path, width=width, ff=ff, **shape)
    target = make_target(Model(path), n_seq=64, n_ctx=320, n_batch=320, kv_unified=False)
    session = MtpSession(target, Context.mtp(target), target.n_seq, DEPTH)
    admission = msgspec.structs.replace(admit(0, 2), drafts=drafts)
    with Executor(target, session) as executor:
        plan = Plan((), (admission,), (prefill(0, [50] * 300),), keep_prompts=keep)
        return session, loops.execute(executor, plan)


def test_nothing_is_decoded_nor_kept_for_who_never_drafts(tmp_path: Path) -> None:
    """Of hidden rows so wide, only 256 of each of 64 sequences may wait."""
    wide = partial(long_prompt, tmp_path / "wide.gguf", width=1024, ff=64)
    session, result = wide(drafts=True)
    assert result.n_draft_tokens == 300, "the buffer was full"
    assert session.draft(0, 300, 60)
    session, result = wide(drafts=False)
    assert result.n_draft_tokens == 0
    with pytest.raises(MtpDraftError, match="nothing was kept"):
        session.draft(0, 300, 60)


def test_hidden_rows_are_computed_only_for_who_may_draft_and_is_to_keep_them(
    tmp_path: Path,
) -> None:
    """Without them the end of the last layer is computed for one row of the prompt, not for all.

    That is nearly all there is to compute here, so that it makes a difference of many times; the
    best of some tries must show the half.
    """
    thick = partial(long_prompt, tmp_path / "thick.gguf", width=64, ff=8192)
    variants: dict[str, dict[str, bool]] = {
        "kept": {},
        "never drafts": {"drafts": False},
        "left out": {"keep": False},
    }
    times = {
        name: min(thick(**variant)[1].target_time for _ in range(5))
        for name, variant in variants.items()
    }
    assert times["never drafts"] < times["kept"] / 2
    assert times["left out"] < times["kept"] / 2


def test_a_draft_has_its_hidden_rows_kept_though_a_prompt_beside_it_does_not(
    tmp_path: Path,
) -> None:
    """Without recurrent state one decode takes both. No draft after it is the worse for that."""
    random_model.write_random_step35(tmp_path / "step35.gguf", vocab=300, mix=0.3)
    accepted = {True: 0, False: 0}
    with Model(tmp_path / "step35.gguf") as model:
        for keep in accepted:
            target, executor = make(model, n_rs_seq=0, n_ctx=128, kv_unified=False)
            with executor:
                loops.execute(executor, Plan((), (admit(0, 90),), (prefill(0),)))
                while target.length(0) < 80:
                    entries = (step(0, DEPTH), prefill(1, [9] * 9))
                    plan = Plan((), (admit(1),), entries, keep_prompts=keep)
                    accepted[keep] += loops.execute(executor, plan).entries[0].n_accepted
                    loops.execute(executor, Plan((1,), (), ()))
    assert accepted[True] == accepted[False] > 10


# ---------------------------------------------------------------------------------- sampling


def sampled(
    model: Model, n_draft: int, neighbours: int = 0, seq_id: int = 0, **params: Any
) -> list[int]:
    """30 tokens of PROMPT, sampled beside other requests."""
    _, executor = make(model)
    others = [s for s in range(4) if s != seq_id][:neighbours]
    admissions = (
        admit(seq_id, 30, **params),
        *(admit(s, 60, temperature=2.0, seed=s) for s in others),
    )
    plan = Plan((), admissions, (prefill(seq_id), *(prefill(s, [30 + s]) for s in others)))
    tokens: list[int] = []
    while True:
        result = loops.execute(executor, plan).entries[0]
        tokens += result.token_ids
        if result.finish_reason:
            return tokens
        plan = Plan((), (), (step(seq_id, n_draft), *(step(s, 1) for s in others)))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.1},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_tokens_in_any_company(
    tiny: Model, params: dict[str, Any]
) -> None:
    alone = sampled(tiny, 0, seed=7, **params)
    for n_draft, neighbours, seq_id in itertools.product((0, 1, DEPTH), (0, 2), (0, 3)):
        assert sampled(tiny, n_draft, neighbours, seq_id, seed=7, **params) == alone
    assert sampled(tiny, 0, seed=8, **params) != alone


def test_every_seed_is_reproducible(tiny: Model) -> None:
    """Also the one that means "random" to llama.cpp."""
    first = sampled(tiny, 0, temperature=1.5, seed=2**32 - 1)
    assert first == sampled(tiny, 0, temperature=1.5, seed=2**32 - 1)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "top_p": 0.5},
        {"temperature": 1e-300},
        {"temperature": 1e-40},
        {"temperature": 1e-9},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_that_leave_one_token_are_greedy(tiny: Model, params: dict[str, Any]) -> None:
    assert sampled(tiny, 1, seed=3, **params) == undrafted(tiny, PROMPT, 30)


@pytest.mark.parametrize("params", [{"temperature": 1e300}, {"top_k": 2**40}], ids=str)
def test_huge_values_are_harmless(tiny: Model, params: dict[str, Any]) -> None:
    sampled(tiny, 1, seed=3, **({"temperature": 1.0} | params))


# ------------------------------------------------------------------------------- without the GIL


def test_other_threads_run_while_a_step_does(tiny: Model) -> None:
    """The GIL is released: a thread that only runs Python is never held up for a whole step.

    With the GIL held, that thread would see a gap as long as the native call, every time.
    """
    longest = last = time.perf_counter()
    ticked, stop = threading.Event(), threading.Event()

    def tick() -> None:
        nonlocal longest, last
        while not stop.is_set():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
            ticked.set()

    def wait_for_tick() -> None:
        ticked.clear()
        ticked.wait()

    _, executor = make(tiny, n_seq=1, n_ctx=1024, n_batch=1024)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(50):  # a busy machine may hold the thread up for other reasons
            wait_for_tick()
            longest = 0.0
            result = loops.execute(executor, Plan((), (admit(0),), (prefill(0, [50] * 990),)))
            wait_for_tick()
            if longest < result.target_time / 2:
                return
            loops.execute(executor, Plan((0,), (), ()))
    finally:
        stop.set()
        thread.join()
    pytest.fail("no step let the other thread run")


# --------------------------------------------------------------------------------- running ahead


@pytest.mark.parametrize("run_ahead", [1, 3, 100])
def test_a_plan_stands_until_the_next_one(tiny: Model, run_ahead: int) -> None:
    _, executor = make(tiny)
    expected = {s: undrafted(tiny, [50 + s], 30) for s in range(3)}
    tokens: dict[int, list[int]] = {s: [] for s in range(3)}

    def take(results: list[StepResult], number: int, seq_ids: list[int]) -> None:
        assert len(results) <= run_ahead + 1
        for result in results:
            assert result.plan == number
            for seq_id, entry in zip(seq_ids, result.entries, strict=True):
                tokens[seq_id] += entry.token_ids
                assert tokens[seq_id] == expected[seq_id][: len(tokens[seq_id])]
                assert (entry.finish_reason is None) == (
                    entry == NO_RESULT or len(tokens[seq_id]) < 30
                )

    plan = Plan(
        (),
        (admit(0, 30), admit(1, 30)),
        (PlanEntry(0, (50,), True, 2), PlanEntry(1, (51,), True, DEPTH)),
        number=1,
        run_ahead=run_ahead,
    )
    take(executor.exchange(plan, wait=True), 1, [0, 1])
    while not (len(tokens[0]) > 10 or len(tokens[1]) > 10):
        take(executor.exchange(None, wait=True), 1, [0, 1])
    plan = Plan(
        (),
        (admit(2, 30),),
        (step(0, 1), step(1, 0), prefill(2, [52])),
        number=2,
        run_ahead=run_ahead,
    )
    results = executor.exchange(plan, wait=True)
    while min(map(len, tokens.values())) < 30:
        for result in results:  # some may be of the first plan still
            take([result], result.plan, [0, 1, 2][: 1 + result.plan])
        results = executor.exchange(None, wait=min(map(len, tokens.values())) < 30)
    assert tokens == expected
    assert results == []


def test_what_is_released_sits_out_and_the_others_go_on(tiny: Model) -> None:
    target, executor = make(tiny)
    admissions = (admit(0, 40), admit(1, 40))
    entries = tuple(PlanEntry(s, PROMPT, True, s) for s in range(2))
    tokens: list[int] = []
    results = executor.exchange(Plan((), admissions, entries, run_ahead=1), wait=True)
    results += executor.exchange(Plan((0,), (), ()), wait=True)
    while True:
        for result in results:
            tokens += result.entries[1].token_ids
        if result.entries[1].finish_reason:
            break
        results = executor.exchange(None, wait=True)
        assert len(results) <= 2
    assert tokens == undrafted(tiny, PROMPT, 40)
    assert result.entries[0] == NO_RESULT
    assert target.length(0) == 0


def test_an_executor_left_open_at_the_end_of_the_program(demo_path: Path) -> None:
    """Its thread has a plan that it could repeat for long; the program ends all the same."""
    script = f"""
        from mtpbatch.native import Context, Executor, Model
        from mtpbatch.types import Admission, Plan, PlanEntry, SamplingParams

        executor = Executor(Context(Model({str(demo_path)!r}), n_ctx=4096, n_threads=1))
        admission = Admission(0, SamplingParams(), 1, (), 4000)
        entries = (PlanEntry(0, (5, 6, 7), True, 0),)
        assert executor.exchange(Plan((), (admission,), entries, run_ahead=4000), wait=True)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_figures_are_not_old_where_nobody_follows(tiny: Model) -> None:
    """Results of a plan that is not followed come together, but they come.

    The plan could be repeated far more often than a test can wait for.
    """
    _, executor = make(tiny, n_ctx=20_000)
    plan = Plan((), (admit(0, 19_000),), (prefill(0),), run_ahead=10**6, followed=False)
    executor.exchange(plan, wait=True)
    n_results = [len(executor.exchange(None, wait=True)) for _ in range(3)]
    assert all(1 < n < 19_000 for n in n_results)


def test_a_prompt_in_parts_waits_for_its_next_part(tiny: Model) -> None:
    _, executor = make(tiny)
    admissions = (admit(0, 20), admit(1, 20))
    first = Plan(
        (), admissions, (prefill(0), prefill(1, PROMPT[:2], sample=False)), number=1, run_ahead=9
    )
    tokens: list[int] = []
    results = executor.exchange(first, wait=True)
    while len(tokens) < 10:
        for result in results:
            tokens += result.entries[0].token_ids
            assert result.entries[1] == NO_RESULT
        results = executor.exchange(None, wait=True)
    second = Plan((), (), (step(0), prefill(1, PROMPT[2:])), number=2, run_ahead=9)
    others: list[int] = []
    results += executor.exchange(second, wait=True)
    while len(others) < 20:
        for result in results:
            if result.plan == 2:
                others += result.entries[1].token_ids
        results = executor.exchange(None, wait=len(others) < 20)
    assert others == undrafted(tiny, PROMPT, 20)


@pytest.mark.parametrize("n_draft", [0, DEPTH])
def test_a_sequence_stops_where_its_text_is_complete(tiny: Model, n_draft: int) -> None:
    """Python ends it; until then it takes part in no further step."""
    text = undrafted(tiny, PROMPT, 60)
    pieces = [tiny.token_bytes(token) for token in text]
    whole = b"".join(pieces).decode()
    for begin in range(3, 40, 4):
        stops = ("never", whole[begin : begin + 5], whole[begin : begin + 3] + "never")
        found = whole.index(stops[1])
        _, executor = make(tiny)
        admission = admit(0, 60, stop=(), stop_texts=stops)
        entries = (PlanEntry(0, PROMPT, True, n_draft),)
        results = executor.exchange(Plan((), (admission,), entries, run_ahead=100), wait=True)
        tokens: list[int] = []
        while len(b"".join(map(tiny.token_bytes, tokens))) < found + 5:
            for result in results:
                tokens += result.entries[0].token_ids
            results = executor.exchange(None, wait=not results)
        executor.wake()
        assert executor.exchange(None, wait=True) == []
        assert tokens == text[: len(tokens)]
        before_last_step = len(b"".join(pieces[: len(tokens) - 1 - n_draft]))
        assert before_last_step < found + 5, "no step more"


@pytest.fixture(scope="module")
def babbler(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The tiny model, kept from saying anything but "t", "h" and "th"."""
    path = tmp_path_factory.mktemp("models") / "babbler.gguf"
    path.write_bytes(tiny.path.read_bytes())
    banned = [piece not in (b"t", b"h", b"th") for piece in tiny.vocabulary]
    file = gguf.GGUFReader(path, "r+")
    [output] = [tensor.data for tensor in file.tensors if tensor.name == "output.weight"]
    output[banned] = 0
    output[banned, 0] = -60  # by way of the channel that is always 1
    file.data.flush()
    del file, output
    with Model(path) as model:
        assert banned.count(False) == 3
        yield model


def test_a_stop_text_is_found_wherever_it_begins(babbler: Model) -> None:
    """Also within a beginning of it that came to nothing, as "tth" in "ttth"; in any tokens."""

    def generated(*stops: str, min_tokens: int = 0) -> list[bytes]:
        sampled: dict[str, Any] = {"temperature": 3.0, "seed": 1, "min_tokens": min_tokens}
        plan = Plan((), (admit(0, 100, (), stops, **sampled),), (prefill(0),))
        pieces: list[bytes] = []
        while True:
            [entry] = loops.execute(executor, plan).entries
            pieces += map(babbler.token_bytes, entry.token_ids)
            if entry == NO_RESULT or entry.finish_reason:
                loops.execute(executor, Plan((0,), (), ()))
                return pieces
            plan = Plan((), (), (step(0),))

    _, executor = make(babbler, n_ctx=128)
    whole = generated()
    n_found = 0
    for letters in itertools.product("th", repeat=5):
        stop = "".join(letters)
        beginnings = (whole[:n] for n in range(len(whole)))
        expected = next((b for b in beginnings if stop.encode() in b"".join(b)), whole)
        assert generated(stop) == expected
        n_found += expected != whole
        # Not one that ends in the first tokens; one that begins there is found.
        n_before = len(b"".join(whole[:20]))
        later = (b for b in (whole[:n] for n in range(21, len(whole))))
        joined = ((b, b"".join(b)) for b in later)
        expected = next((b for b, t in joined if stop.encode() in t[n_before - 4 :]), whole)
        assert generated(stop, min_tokens=20) == expected
    assert n_found > 16


@pytest.mark.parametrize("n_draft", [0, DEPTH])
def test_who_is_cancelled_sits_out_though_nobody_exchanges(tiny: Model, n_draft: int) -> None:
    """The step under way is the last, whatever keeps Python from handing over a plan."""
    target, executor = make(tiny, n_ctx=2000)
    one, other = (msgspec.structs.replace(admit(s, 1500, stop=()), ticket=10 + s) for s in range(2))
    entries = (PlanEntry(0, PROMPT, True, n_draft), PlanEntry(1, PROMPT, True, n_draft))
    results = executor.exchange(Plan((), (one, other), entries, run_ahead=10**6), wait=True)
    executor.cancel(10)
    n_most = target.length(0) + 1 + n_draft
    while not results or results[-1].entries[1].finish_reason is None:
        results = executor.exchange(None, wait=True)
        assert target.length(0) <= n_most
    assert target.length(1) > 1000
    assert results[-1].entries[0] == NO_RESULT


def busy_with_a_long_step(model: Model) -> tuple[Context, Executor, Callable[[], bool]]:
    """An executor whose first step has begun or is about to, and whether that step still runs.

    It is of plan 1, on sequence 0. Hand over what shall wait behind it, and ask after that.
    """
    target, executor = make(model, n_ctx=1024, n_batch=1024, n_ubatch=1024)
    plan = Plan((), (admit(0),), (prefill(0, [50] * 990),), number=1)
    executor.exchange(plan, wait=False)
    return target, executor, lambda: target.length(0) == 0


def results_until(executor: Executor, number: int) -> dict[int, StepResult]:
    """The first result of each plan, up to the plan of that number."""
    results: dict[int, StepResult] = {}
    while number not in results:
        for result in executor.exchange(None, wait=True):
            results.setdefault(result.plan, result)
    return results


def test_who_is_cancelled_while_its_plan_waits_is_not_even_begun(tiny: Model) -> None:
    """It is admitted, since its plan says so, but no token of its prompt is decoded."""
    one = msgspec.structs.replace(admit(2, 50), ticket=12)
    other = msgspec.structs.replace(admit(3, 50), ticket=13)
    for _ in range(50):  # a busy machine may end the long step too soon
        target, executor, still_busy = busy_with_a_long_step(tiny)
        executor.exchange(Plan((), (one, other), (prefill(2), prefill(3)), number=2), wait=False)
        executor.cancel(12)
        if still_busy():
            break
    else:
        pytest.fail("no plan had to wait")
    sat_out, took_part = results_until(executor, 2)[2].entries
    assert sat_out == NO_RESULT
    assert took_part.token_ids
    assert target.length(2) == 0


def test_who_is_cancelled_before_its_plan_comes_is_not_even_begun(tiny: Model) -> None:
    """With the next exchange, as whoever makes plans learns of it before the one after that."""
    one = msgspec.structs.replace(admit(2, 50), ticket=12)
    target, executor = make(tiny)
    executor.cancel(11)
    executor.cancel(12)
    executor.exchange(Plan((), (one,), (prefill(2),), number=1), wait=False)
    assert results_until(executor, 1)[1].entries == (NO_RESULT,)
    assert target.length(2) == 0
    # Nothing is kept of it longer, lest what is kept of tickets that never come piles up.
    executor.exchange(Plan((2,), (one,), (prefill(2),), number=2), wait=False)
    assert results_until(executor, 2)[2].entries[0].token_ids


def test_a_waiting_exchange_can_be_woken(tiny: Model) -> None:
    _, executor = make(tiny)
    executor.wake()
    assert executor.exchange(None, wait=True) == [], "the next one, if none waits"
    thread = threading.Thread(target=executor.wake)
    thread.start()
    assert executor.exchange(None, wait=True) == []
    thread.join()
    executor.close()
    executor.wake()


@pytest.mark.parametrize("stop", [Executor.close, lambda e: lib.mtpbatch_executor_stop(e._native)])
def test_a_stopped_executor_leaves_nobody_waiting(
    tiny: Model, stop: Callable[[Executor], None]
) -> None:
    """Neither who waits already nor who comes after, who is told why."""
    _, executor = make(tiny)
    about_to = threading.Event()

    def wait() -> None:
        about_to.set()
        with contextlib.suppress(ContextError):  # if it comes too late
            executor.exchange(None, wait=True)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    about_to.wait()
    stop(executor)
    thread.join(60)
    assert not thread.is_alive()
    for wait_too in (True, False):
        with pytest.raises(ContextError):
            executor.exchange(None, wait=wait_too)


def test_gaps_are_counted_only_while_sequences_are_left_to_go_on(tiny: Model) -> None:
    _, executor = make(tiny)
    first = loops.execute(executor, Plan((), (admit(0, 2),), (prefill(0),)))
    second = loops.execute(executor, Plan((), (), (step(0),)))
    third = loops.execute(executor, Plan((), (admit(1, 1),), (prefill(1),)))
    assert second.entries[0].finish_reason
    assert first.gap_time == third.gap_time == 0
    assert second.gap_time > 0
    loops.execute(executor, Plan((0, 1), (admit(2),), (prefill(2),)))
    loops.execute(executor, Plan((2,), (), ()))
    after_release = loops.execute(executor, Plan((), (admit(3),), (prefill(3),)))
    assert after_release.gap_time == 0


def test_what_is_released_does_not_wait_for_plans_that_have_not_begun(tiny: Model) -> None:
    """Each of them passes it over, though the release comes with the last one."""
    for _ in range(50):  # a busy machine may end the long step too soon
        _, executor, still_busy = busy_with_a_long_step(tiny)
        entries = (step(0), prefill(1, [51]), prefill(2, [52]))
        executor.exchange(Plan((), (admit(1), admit(2)), entries, number=2), wait=False)
        executor.exchange(Plan((), (), (step(0), step(1), step(2)), number=3), wait=False)
        executor.exchange(Plan((0,), (), ()), wait=False)
        if still_busy():
            break
    else:
        pytest.fail("no plan had to wait")
    for number, result in results_until(executor, 3).items():
        released, *others = result.entries
        assert (released == NO_RESULT) == (number > 1)
        assert all(entry.token_ids for entry in others)


def test_who_takes_a_released_id_is_not_confused_with_who_had_it(tiny: Model) -> None:
    """Though plans that release it and plans with entries for either wait side by side."""
    _, executor = make(tiny)
    loops.execute(executor, Plan((), (admit(0), admit(1)), (prefill(0), prefill(1, [51]))))
    plans = [
        Plan((), (admit(2),), (step(0), step(1), prefill(2, [52])), number=1),
        Plan((), (), (step(0), step(1), step(2)), number=2),
        Plan((0,), (), ()),
        Plan((), (admit(0),), (prefill(0, [53]), step(1), step(2)), number=3),
        Plan((0,), (admit(0),), (prefill(0, [54]), step(1), step(2)), number=4),
    ]
    results: list[StepResult] = []
    for plan in plans:
        results += executor.exchange(plan, wait=False)
    while len(results) < 4:
        results += executor.exchange(None, wait=True)
    assert [result.plan for result in results] == [1, 2, 3, 4]
    assert list(results[2].entries[0].token_ids) == undrafted(tiny, [53], 1)
    assert list(results[3].entries[0].token_ids) == undrafted(tiny, [54], 1)
    others = [t for result in results for t in result.entries[1].token_ids]
    assert others == undrafted(tiny, [51], 5)[1:]
