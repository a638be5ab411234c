"""Executor: one plan is one native call, right token for token, and wrong plans change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest

import loops
from mtpbatch.exceptions import ContextError, InternalError
from mtpbatch.native import Context, Executor, Model, MtpSession
from mtpbatch.types import Admission, Plan, PlanEntry, SamplingParams, StepResult

DEPTH = 3
PROMPT = (40, 50, 60, 70, 80)


def make_target(model: Model, **params: Any) -> Context:
    given: dict[str, Any] = {
        "n_seq": 4,
        "n_ctx": 64,
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
    seq_id: int, max_tokens: int = 99, stop: tuple[int, ...] = (), **params: Any
) -> Admission:
    sampling = SamplingParams(**params)
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
        [result] = executor.execute(plan).entries
        tokens += result.token_ids
        if result.finish_reason:
            executor.execute(Plan((seq_id,), (), ()))
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
    "admission for no token": Plan((), (admit(1, 0),), ()),
    "entry of an idle sequence": Plan((), (), (prefill(1),)),
    "entry of a released sequence": Plan((0,), (), (step(0),)),
    "entry of an unknown sequence": Plan((), (), (step(4),)),
    "entry twice": Plan((), (), (step(0), step(0))),
    "more prompt after sampling": Plan((), (), (prefill(0, [5]),)),
    "decode without sampling": Plan((), (), (PlanEntry(0, (), False, 0),)),
    "no prompt": Plan((), (admit(1),), (step(1),)),
    "draft with the prompt": Plan((), (admit(1),), (PlanEntry(1, PROMPT, True, 1),)),
    "draft deeper than the session": Plan((), (), (step(0, DEPTH + 1),)),
    "negative draft": Plan((), (), (step(0, -1),)),
    "token not in the vocabulary": Plan((), (admit(1),), (prefill(1, [5, 300]),)),
    "negative token": Plan((), (admit(1),), (prefill(1, [-1]),)),
    "number that fits no integer": Plan((), (admit(1),), (prefill(1, [2**40]),)),
    "prompt longer than the context": Plan((), (admit(1),), (prefill(1, [5] * 65),)),
    "more rows than n_batch": Plan(
        (), (admit(1), admit(2)), (prefill(1, [5] * 60), prefill(2, [5] * 41))
    ),
    "more outputs than n_outputs_max": Plan(
        (), (admit(2),), (step(0, DEPTH), step(3, DEPTH), prefill(2))
    ),
    "a right entry before a wrong one": Plan((3,), (admit(1),), (prefill(1), step(0, 9))),
}


@pytest.mark.parametrize("plan", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_plan_changes_nothing(tiny: Model, plan: Plan) -> None:
    def run(wrong: Plan | None) -> tuple[StepResult, ...]:
        target, executor = make(tiny, n_batch=100, n_outputs_max=8)
        results = [
            executor.execute(Plan((), (admit(0), admit(3)), (prefill(0), prefill(3, [99])))),
            executor.execute(Plan((), (), (step(0, 2), step(3, 3)))),
        ]
        if wrong:
            lengths = [target.length(s) for s in range(4)]
            with pytest.raises(InternalError):
                executor.execute(wrong)
            assert lengths == [target.length(s) for s in range(4)]
        # Sequences 1 and 2 are still free, 0 and 3 go on.
        results.append(
            executor.execute(Plan((), (admit(1), admit(2)), (prefill(1), prefill(2, [5, 6]))))
        )
        results.append(executor.execute(Plan((), (), (step(0, 3), step(3, 3)))))
        return tuple(
            (result.entries, result.n_target_tokens, result.n_draft_decodes)  # type: ignore[misc]
            for result in results
        )

    assert run(plan) == run(None)


def test_a_finished_sequence_does_not_go_on(tiny: Model) -> None:
    _, executor = make(tiny)
    [result] = executor.execute(Plan((), (admit(0, 1),), (prefill(0),))).entries
    assert result.finish_reason == "length"
    with pytest.raises(InternalError, match="has finished"):
        executor.execute(Plan((), (), (step(0),)))
    executor.execute(Plan((0,), (), ()))


def test_a_full_context_ends_before_the_plan_that_outgrows_it(tiny: Model) -> None:
    target, executor = make(tiny, n_ctx=8)
    executor.execute(Plan((), (admit(0),), (prefill(0),)))
    with pytest.raises(InternalError, match="outgrow"):
        executor.execute(Plan((), (), (step(0, 3),)))
    executor.execute(Plan((), (), (step(0, 2),)))
    while target.length(0) < 8:
        executor.execute(Plan((), (), (step(0),)))
    with pytest.raises(InternalError, match="outgrow"):
        executor.execute(Plan((), (), (step(0),)))


def test_an_empty_plan_does_nothing(tiny: Model) -> None:
    _, executor = make(tiny)
    assert executor.execute(Plan((), (), ())).entries == ()


def test_without_a_session_nothing_can_be_drafted(tiny: Model) -> None:
    executor = Executor(make_target(tiny))
    executor.execute(Plan((), (admit(0),), (prefill(0),)))
    with pytest.raises(InternalError, match="cannot draft"):
        executor.execute(Plan((), (), (step(0, 1),)))
    assert generate(executor, 1, 20, 0) == undrafted(tiny, PROMPT, 20)


def test_the_session_must_draft_for_the_target(tiny: Model) -> None:
    target, other = make_target(tiny), make_target(tiny)
    session = MtpSession(other, Context.mtp(other), 4, DEPTH)
    with pytest.raises(ContextError, match="another context"):
        Executor(target, session)
    with pytest.raises(ContextError):
        Executor(Context.mtp(target))


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
        executor.execute(Plan((), (), ()))


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
        [result] = executor.execute(plan).entries
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
        inside += steps[-1][1] > 0 and steps[-1][2] == steps[-1][0]
        for produced, drafted, accepted in steps:
            assert accepted <= drafted <= n_draft
            assert produced in (accepted, accepted + 1)
    for stop in set(text):
        tokens, reason, steps = one_request(tiny, n_draft, 99, (299, stop))
        assert (tokens, reason) == (text[: text.index(stop) + 1], "stop")
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
        for s in range(n_seq):
            if s not in active and draw.random() < 0.5:
                active[s] = new_request(draw, texts)
                admissions.append(admit(s, active[s].max_tokens, active[s].stop))
        entries = []
        room = 60
        for s in draw.sample(sorted(active), len(active)):
            request = active[s]
            left = request.prompt[request.fed :]
            if draw.random() < 0.2 or room < 4:
                continue  # idle for a step
            if left:
                chunk = left[: draw.randint(1, min(room, 20))]
                entries.append(prefill(s, chunk, sample=len(chunk) == len(left)))
                request.fed += len(chunk)
                room -= len(chunk)
            else:
                entries.append(step(s, draw.randint(0, DEPTH)))
                room -= 1 + entries[-1].n_draft
        results = executor.execute(Plan(release, tuple(admissions), tuple(entries))).entries
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
    limit = len(expected) if reason == "length" else 99
    return Request(prompt, limit, stop, expected, reason)


def test_a_sequence_is_released_and_taken_anew_in_one_plan(tiny: Model) -> None:
    _, executor = make(tiny)
    expected = undrafted(tiny, PROMPT, 30)
    executor.execute(Plan((), (admit(0), admit(1)), (prefill(0, [99] * 30), prefill(1, [98]))))
    tokens: list[int] = []
    for _ in range(3):
        executor.execute(Plan((), (), (step(0, DEPTH), step(1, DEPTH))))
        plan = Plan((0,), (admit(0, 30),), (prefill(0), step(1, 1)))
        tokens = []
        for _ in range(4):
            tokens += executor.execute(plan).entries[0].token_ids
            plan = Plan((), (), (step(0, DEPTH),))
        assert tokens == expected[: len(tokens)]


# ---------------------------------------------------------------------------------- sampling


def sampled(
    model: Model, n_draft: int, neighbours: int = 0, seq_id: int = 0, **params: Any
) -> list[int]:
    """30 tokens of PROMPT, sampled beside other requests."""
    _, executor = make(model)
    others = [s for s in range(4) if s != seq_id][:neighbours]
    admissions = (
        admit(seq_id, 30, **params),
        *(admit(s, 99, temperature=2.0, seed=s) for s in others),
    )
    plan = Plan((), admissions, (prefill(seq_id), *(prefill(s, [30 + s]) for s in others)))
    tokens: list[int] = []
    while True:
        result = executor.execute(plan).entries[0]
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


# ---------------------------------------------------------------------------- in one native call


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
            result = executor.execute(Plan((), (admit(0),), (prefill(0, [50] * 1000),)))
            wait_for_tick()
            if longest < result.target_time / 2:
                return
            executor.execute(Plan((0,), (), ()))
    finally:
        stop.set()
        thread.join()
    pytest.fail("no step let the other thread run")
