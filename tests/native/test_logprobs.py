"""Log probabilities of rows are those of numpy, and what an executor tells is of the right rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import loops
from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.native import Batch, Context, Executor, Model, MtpSession, token_logprobs
from mtpbatch.types import (
    Admission,
    EntryResult,
    Park,
    Plan,
    PlanEntry,
    Resume,
    SamplingParams,
    TokenLogprobs,
)

Logits = npt.NDArray[np.float32]

QWEN_VOCAB = 248_320
DEPTH = 3
PROMPT = (40, 50, 60, 70, 80, 90, 45, 55, 65)


def truth(logits: Logits, token: int, n_top: int) -> TokenLogprobs:
    """In double precision, and by sorting everything."""
    row = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    order = np.argsort(-row, kind="stable")[:n_top]
    rank = 1 + int((row > row[token]).sum())
    if np.isfinite(row.max()):
        row -= row.max()
        row -= np.log(np.exp(row).sum())
    else:
        row = np.full(len(row), -np.inf)
    top = tuple((int(t), float(row[t])) for t in order)
    return TokenLogprobs(token, float(row[token]), rank, top)


def check(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]
    values = [found.logprob, *(value for _, value in found.top)]
    wanted = [expected.logprob, *(value for _, value in expected.top)]
    assert values == pytest.approx(wanted, abs=1e-5)
    assert all(value <= 0 for value in values)


def same(found: Sequence[TokenLogprobs], logits: Logits, tokens: Sequence[int], n_top: int) -> None:
    assert len(found) == len(tokens)
    for told, row, token in zip(found, logits, tokens, strict=True):
        check(told, truth(row, token, n_top))


# -------------------------------------------------------------------------------------- rows

VALUES: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "spread": lambda chance, n: chance.normal(0, 8, n),
    "flat": lambda chance, n: chance.normal(0, 0.01, n),
    "equal": lambda chance, n: np.full(n, 3.0),
    "with ties": lambda chance, n: chance.integers(-3, 3, n),
    "one for all": lambda chance, n: np.where(np.arange(n) == n // 2, 90.0, -50.0),
    "ascending": lambda chance, n: np.linspace(-20, 20, n),
    "descending": lambda chance, n: np.linspace(20, -20, n),
    "great": lambda chance, n: chance.normal(1e5, 5, n),
    "least": lambda chance, n: chance.normal(-1e5, 5, n),
}


@settings(max_examples=200)
@given(
    kind=st.sampled_from(sorted(VALUES)),
    n_vocab=st.integers(1, 300) | st.sampled_from([1000, 4096, 5001]),
    n_top=st.integers(0, 20),
    impossible=st.sampled_from([0.0, 0.5, 0.99]),
    not_numbers=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
@example("flat", QWEN_VOCAB, 20, 0.0, 0.0, 1)
@example("spread", QWEN_VOCAB, 20, 0.0, 0.0, 2)
@example("ascending", QWEN_VOCAB, 20, 0.0, 0.0, 3)
def test_a_row_is_told_as_numpy_tells_it(
    kind: str, n_vocab: int, n_top: int, impossible: float, not_numbers: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    logits = np.stack([VALUES[kind](chance, n_vocab) for _ in range(3)]).astype(np.float32)
    logits[chance.random(logits.shape) < impossible] = -np.inf
    logits[chance.random(logits.shape) < not_numbers] = np.nan
    tokens = chance.integers(0, n_vocab, 3).tolist()
    same(token_logprobs(logits, tokens, n_top), logits, tokens, min(n_top, n_vocab))


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_where_nothing_can_be_said_nothing_is_possible(value: float) -> None:
    logits = np.full((1, 100), -np.inf, np.float32)
    logits[0, 70] = value
    [told] = token_logprobs(logits, [70], 2)
    check(told, truth(logits[0], 70, 2))
    assert told.logprob == told.top[0][1] == told.top[1][1] == -math.inf


ROWS = np.zeros((2, 8), np.float32)


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ((ROWS.astype(np.float64), [0, 0]), "logits"),
        ((ROWS[0], [0]), "logits"),
        (([[0.0]], [0]), "logits"),
        ((ROWS, [0]), "token_ids"),
        ((ROWS, [0, 8]), "token_ids"),
        ((ROWS, [-1, 0]), "token_ids"),
        ((ROWS, [0, 0], 21), "n_top"),
        ((ROWS, [0, 0], -1), "n_top"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(arguments: Any, parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        token_logprobs(*arguments)
    assert caught.value.parameter == parameter


def test_rows_need_not_be_contiguous() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (8, 500)).astype(np.float32)
    same(token_logprobs(logits[::2, ::5], [1, 2, 3, 4], 3), logits[::2, ::5], [1, 2, 3, 4], 3)


# ------------------------------------------------------------------------------------ plans


def rows_after(model: Model, tokens: Sequence[int]) -> Logits:
    """Logits after each token, from a context of its own."""
    with Context(model, n_ctx=256, kv_type="f32", n_threads=1) as context:
        batch = Batch()
        rows = batch.add_sequence(tokens, 0, 0, outputs="all")
        context.decode(batch)
        return np.stack([context.logits(row) for row in rows])


def make(model: Model) -> Executor:
    target = Context(model, n_seq=4, n_ctx=96, n_rs_seq=DEPTH, kv_type="f32", n_threads=1)
    session = MtpSession(target, Context.mtp(target), target.n_seq, DEPTH)
    return Executor(target, session)


def admit(seq_id: int, **params: Any) -> Admission:
    return Admission(seq_id, SamplingParams(**params), 0, (), 32, ticket=seq_id + 1)


def near(found: Sequence[TokenLogprobs], logits: Logits, tokens: Sequence[int], n_top: int) -> None:
    """The same, of logits that another batch rounds in another way: ranks may change places."""
    assert len(found) == len(tokens)
    for told, row, token in zip(found, logits, tokens, strict=True):
        expected = truth(row, token, len(row))
        values = [value for _, value in expected.top]
        assert told.token_id == token
        assert told.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert values[told.rank - 1] == pytest.approx(told.logprob, abs=1e-4)
        assert [value for _, value in told.top] == pytest.approx(values[:n_top], abs=1e-4)
        by_token = dict(expected.top)
        assert [value for _, value in told.top] == pytest.approx(
            [by_token[other] for other, _ in told.top], abs=1e-4
        )


def run(executor: Executor, *entries: PlanEntry, **plan: Any) -> tuple[EntryResult, ...]:
    return loops.execute(executor, Plan((), plan.pop("admit", ()), entries, **plan)).entries


@pytest.mark.parametrize("kind", ["tiny", "glm"])
@pytest.mark.parametrize("n_draft", [0, DEPTH])
def test_each_is_told_what_it_asked_for(
    request: pytest.FixtureRequest, kind: str, n_draft: int
) -> None:
    """On a hybrid model drafts of different lengths are decoded apart, on the other together."""
    model = request.getfixturevalue(kind)
    executor = make(model)
    asking = (admit(0, logprobs=3), admit(1), admit(2, logprobs=0), admit(3, prompt_logprobs=2))
    prompts = [PROMPT[s:] for s in range(4)]
    entries = [PlanEntry(s, prompts[s], True, 0) for s in range(3)]
    scoring = PlanEntry(3, prompts[3], True, 0, scored=prompts[3][1:])
    results = [run(executor, *entries, scoring, admit=asking)]
    near(results[0][3].prompt_logprobs, rows_after(model, prompts[3])[:-1], prompts[3][1:], 2)
    for _ in range(5):
        depths = [n_draft, n_draft, max(0, n_draft - 1), n_draft]
        results.append(run(executor, *(PlanEntry(s, (), True, depths[s]) for s in range(4))))
    assert all(not r.prompt_logprobs for step in results[1:] for r in step)
    assert all(not r[1].logprobs and not r[3].logprobs for r in results)
    accepted = 0
    for s, n_top in ((0, 3), (2, 0)):
        tokens = [t for step in results for t in step[s].token_ids]
        told = [t for step in results for t in step[s].logprobs]
        rows = rows_after(model, [*prompts[s], *tokens])[len(prompts[s]) - 1 : -1]
        near(told, rows, tokens, n_top)
        accepted += sum(step[s].n_accepted for step in results)
    assert (accepted > 0) == (n_draft > 0)


def test_a_border_between_chunks_is_scored_wherever_the_request_goes_on(tiny: Model) -> None:
    executor = make(tiny)
    text = (*PROMPT, *PROMPT)
    first = PlanEntry(0, text[:5], False, 0, scored=text[1:6])
    told = [*run(executor, first, admit=(admit(0, prompt_logprobs=1),))[0].prompt_logprobs]
    moves: Any = {"park": (Park(0, 7),), "resume": (Resume(2, 1, 7),)}
    told += run(executor, PlanEntry(2, text[5:6], False, 0, scored=text[6:7]), **moves)[
        0
    ].prompt_logprobs
    told += run(executor, PlanEntry(2, text[6:], True, 0, scored=text[7:]))[0].prompt_logprobs
    near(told, rows_after(tiny, text)[:-1], text[1:], 1)


def test_a_repeated_plan_scores_nothing_again(tiny: Model) -> None:
    executor = make(tiny)
    entry = PlanEntry(0, PROMPT, True, 0, scored=PROMPT[1:])
    plan = Plan((), (admit(0, prompt_logprobs=0, logprobs=0),), (entry,), run_ahead=2)
    results = executor.exchange(plan, wait=True)
    while len(results) < 3:
        results += executor.exchange(None, wait=True)
    executor.close()
    assert [len(r.entries[0].prompt_logprobs) for r in results[:3]] == [len(PROMPT) - 1, 0, 0]
    assert [len(r.entries[0].logprobs) for r in results[:3]] == [1, 1, 1]
