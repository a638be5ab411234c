"""Executor: drafts that stop where they no longer pay.

What the head is sure of is computed here from its logits, and what pays from that, in plain Python.
Chances and prices are multiples of 1/32, of which single precision adds and multiplies the few at
hand exactly: where something is worth just as much as it costs, both must decide alike.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import loops
from mtpbatch.exceptions import InternalError
from mtpbatch.native import Context, DraftRequest, Executor, Model, MtpSession
from mtpbatch.types import (
    N_CONFIDENCES,
    Admission,
    Plan,
    PlanEntry,
    SamplingParams,
    StepResult,
    Terms,
)

DEPTH = 4
N_SEQ = 4
MAX_TOKENS = 28
TEXTS = (
    "import os\nimport sys\n\n\nclass",
    "And it came to pass",
    "def f(n):",
    "1 2 3 4 5 6 1 2 3",
)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.7)
MIXED = (GREEDY, SAMPLED, SamplingParams(temperature=1.0, top_k=20), GREEDY)
CERTAIN = (1.0,) * N_CONFIDENCES
NO_PRICE = Terms(0.0, 0.0, 0.0, 0.0, CERTAIN, CERTAIN)


@pytest.fixture(params=["demo", "glm"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=[True, False], ids=["unified", "split"])
def kv_unified(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def make_target(model: Model, **params: Any) -> Context:
    given: dict[str, Any] = {"n_ctx": 96, "n_rs_seq": DEPTH, "kv_type": "f32", "n_threads": 1}
    return Context(model, **(given | params))


class Head:
    """What a model's MTP head drafts after a text, and the logits it picks that from."""

    def __init__(self, model: Model) -> None:
        self._target = make_target(model, n_seq=1)
        self._context = Context.mtp(self._target)
        self._session = MtpSession(self._target, self._context, 1, DEPTH)

    def __call__(self, text: Sequence[int]) -> list[tuple[int, NDArray[np.float32]]]:
        """To the full depth; only the last decode's logits can be read, so once for each depth."""
        found: list[tuple[int, NDArray[np.float32]]] = []
        for depth in range(1, DEPTH + 1):
            self._target.truncate(0, 0)
            loops.feed(self._target, 0, text[:-1], self._session)
            n_rows = self._session.statistics().rows
            request = DraftRequest(0, len(text) - 1, text[-1], depth)
            [draft] = self._session.draft_many([request])
            n_rows = self._session.statistics().rows - n_rows
            logits = self._context.logits(n_rows - 1 if depth == 1 else 0)
            found.append((int(logits.argmax()), logits))
            assert draft == [token for token, _ in found]
        return found


def confidence(logits: NDArray[np.float32], temperature: float) -> int | None:
    """The class of the likeliest token; None: too near to the next one for single precision."""
    powers = (logits.astype(np.float64) - logits.max()) / (temperature or 1.0)
    others = np.exp(np.delete(powers, logits.argmax())).sum()
    exact = 2 * math.log2((1 + others) / others) if others else math.inf
    if exact >= N_CONFIDENCES:
        return N_CONFIDENCES - 1
    near = abs(exact - round(exact)) < 0.002 and round(exact) not in (0, N_CONFIDENCES)
    return None if near else int(exact)


class Running:
    """Requests side by side on an executor, and what they have generated."""

    def __init__(
        self, model: Model, params: Sequence[SamplingParams], *, drafts: bool = True, **sizes: Any
    ) -> None:
        target = make_target(model, n_seq=N_SEQ, **sizes)
        session = MtpSession(target, Context.mtp(target), N_SEQ, DEPTH) if drafts else None
        self.executor = Executor(target, session)
        self.params = params
        self.prompts = [model.tokenize(text) for text in TEXTS[: len(params)]]
        self.generated: list[list[int]] = [[] for _ in params]
        self.over = [False for _ in params]

    @property
    def going_on(self) -> list[int]:
        return [s for s, tokens in enumerate(self.generated) if tokens and not self.over[s]]

    def text(self, s: int) -> list[int]:
        return [*self.prompts[s], *self.generated[s]]

    def limit(self, entry: PlanEntry) -> int:
        """Most tokens it drafts: a step gives one more."""
        return min(entry.n_draft, MAX_TOKENS - len(self.generated[entry.seq_id]) - 1)

    def start(self, *seq_ids: int) -> list[PlanEntry]:
        return [PlanEntry(s, tuple(self.prompts[s]), True, 0) for s in seq_ids]

    def step(self, entries: Sequence[PlanEntry], terms: Terms | None) -> StepResult:
        """Entries with tokens are new requests."""
        admit = tuple(
            Admission(e.seq_id, self.params[e.seq_id], e.seq_id, (), MAX_TOKENS)
            for e in entries
            if e.tokens
        )
        result = loops.execute(self.executor, Plan((), admit, tuple(entries), terms))
        for entry, given in zip(entries, result.entries, strict=True):
            self.generated[entry.seq_id] += given.token_ids
            self.over[entry.seq_id] = given.finish_reason is not None
        return result

    def begin(self) -> None:
        self.step(self.start(*range(len(self.params))), None)


def undrafted(model: Model, params: Sequence[SamplingParams]) -> list[list[int]]:
    """What each gives alone, one token a step; greedy ones without an executor too."""
    found = []
    for s, sampling in enumerate(params):
        batch = Running(model, params, drafts=False)
        batch.step(batch.start(s), None)
        while batch.going_on:
            batch.step([PlanEntry(s, (), True, 0)], None)
        found.append(batch.generated[s])
        if sampling.temperature == 0:
            with make_target(model, n_seq=1) as context:
                assert loops.greedy(context, 0, batch.prompts[s], MAX_TOKENS) == found[s]
    return found


def fraction(rng: random.Random, most: int, least: int = 0) -> float:
    """A multiple of 1/32."""
    return rng.randint(least, most) / 32


def random_terms(rng: random.Random) -> Terms:
    """Where drafts pay now and then."""
    return Terms(
        target_row=fraction(rng, 24),
        target_pass=fraction(rng, rng.choice([4, 32])),
        draft_row=fraction(rng, rng.choice([0, 4])),
        draft_decode=fraction(rng, rng.choice([0, 16])),
        greedy=tuple(fraction(rng, 32, 12) for _ in range(N_CONFIDENCES)),
        sampled=tuple(fraction(rng, 32, 12) for _ in range(N_CONFIDENCES)),
    )


def random_entry(rng: random.Random, s: int) -> PlanEntry:
    """Selective more often than not."""
    selective = rng.random() < 0.7
    return PlanEntry(s, (), True, rng.randint(0, DEPTH), selective, fraction(rng, 32, 16))


def check_trials(batch: Running, entries: Sequence[PlanEntry], result: StepResult) -> None:
    """They add up: what was verified to the first that is rejected."""
    tried, accepted = Counter[bool](), Counter[bool]()
    for entry, given in zip(entries, result.entries, strict=True):
        sampled = batch.params[entry.seq_id].temperature > 0
        tried[sampled] += min(given.n_drafted, len(given.token_ids))
        accepted[sampled] += given.n_accepted
    classes = [c for c, _, _ in result.trials]
    assert len(set(classes)) == len(classes)
    for sampled in (False, True):
        trials = [trial for trial in result.trials if (trial[0] >= N_CONFIDENCES) == sampled]
        assert sum(n for _, n, _ in trials) == tried[sampled]
        assert sum(n for _, _, n in trials) == accepted[sampled]
    assert all(0 <= n_accepted <= n and n > 0 for _, n, n_accepted in result.trials)
    assert all(0 <= c < 2 * N_CONFIDENCES for c in classes)


# ------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("params", [(GREEDY,) * 4, MIXED], ids=["greedy", "mixed"])
def test_whatever_the_terms_tokens_are_those_without_drafts(
    model: Model, kv_unified: bool, params: Sequence[SamplingParams]
) -> None:
    """Undrafted, fixed and selective ones side by side; some begin while others generate."""
    expected = undrafted(model, params)
    seen = Counter[str]()
    for seed in range(4):
        rng = random.Random(seed)
        batch = Running(model, params, kv_unified=kv_unified)
        waiting = list(range(N_SEQ))
        while waiting or batch.going_on:
            entries = [random_entry(rng, s) for s in batch.going_on]
            if waiting and (not entries or rng.random() < 0.3):
                entries += batch.start(waiting.pop(rng.randrange(len(waiting))))
            terms = random_terms(rng)
            result = batch.step(entries, terms)
            check_trials(batch, entries, result)
            for entry, given in zip(entries, result.entries, strict=True):
                if entry.selective:
                    seen["drafted"] += given.n_drafted
                    seen["accepted"] += given.n_accepted
                    seen["stopped"] += given.n_drafted < entry.n_draft
        assert batch.generated == expected
    assert min(seen["stopped"], seen["accepted"], seen["drafted"] - seen["accepted"]) > 20


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_that_ends_the_request_is_a_trial_too(
    model: Model, sampling: SamplingParams
) -> None:
    """By a stop token, with drafts left that nobody asked the model for."""
    batch = Running(model, [sampling])
    batch.begin()
    entries = [PlanEntry(0, (), True, DEPTH)]
    ends = []
    while batch.going_on:
        before = len(batch.generated[0])
        given = batch.step(entries, NO_PRICE).entries[0]
        ends += [batch.generated[0][before + i] for i in range(min(1, given.n_accepted))]
    assert ends
    for token in set(ends):
        batch = Running(model, [sampling])
        admission = Admission(0, sampling, 0, (token,), MAX_TOKENS)
        [prompt] = batch.start(0)
        [given] = loops.execute(batch.executor, Plan((), (admission,), (prompt,))).entries
        while given.finish_reason is None:
            result = loops.execute(batch.executor, Plan((), (), tuple(entries), NO_PRICE))
            check_trials(batch, entries, result)
            [given] = result.entries


@pytest.mark.parametrize("params", [(GREEDY,) * 4, MIXED], ids=["greedy", "mixed"])
def test_what_costs_nothing_is_drafted_as_if_depths_were_fixed(
    model: Model, kv_unified: bool, params: Sequence[SamplingParams]
) -> None:
    rng = random.Random(5)
    chances = [tuple(fraction(rng, 16, 4) for _ in range(N_CONFIDENCES)) for _ in range(2)]
    terms = Terms(0.0, 0.0, 0.0, 0.0, *chances)
    fixed, selective = (Running(model, params, kv_unified=kv_unified) for _ in range(2))
    fixed.begin()
    selective.begin()
    n_accepted = 0
    while fixed.going_on:
        entries = [
            PlanEntry(s, (), True, rng.randint(0, DEPTH), False, fraction(rng, 32, 1))
            for s in fixed.going_on
        ]
        one = fixed.step(entries, terms)
        other = selective.step([msgspec.structs.replace(e, selective=True) for e in entries], terms)
        same = ("entries", "trials", "n_target_tokens", "n_target_decodes")
        for name in (*same, "n_draft_tokens", "n_draft_decodes"):
            assert getattr(one, name) == getattr(other, name), name
        n_accepted += sum(given.n_accepted for given in one.entries)
    assert n_accepted > 20


def test_what_can_never_pay_is_not_verified(model: Model, kv_unified: bool) -> None:
    """Nothing is as sure as a price above 1."""
    batch = Running(model, MIXED, kv_unified=kv_unified)
    batch.begin()
    while batch.going_on:
        entries = [PlanEntry(s, (), True, DEPTH, True, 1.0) for s in batch.going_on]
        result = batch.step(entries, msgspec.structs.replace(NO_PRICE, target_row=1.03125))
        assert all(given.n_drafted == 0 for given in result.entries)
        assert (result.n_target_tokens, result.n_target_decodes) == (len(entries), 1)
        assert result.trials == ()
    assert batch.generated == undrafted(model, MIXED)


@pytest.mark.parametrize("price", ["draft_row", "draft_decode"])
def test_where_drafting_is_dear_the_head_decodes_once(
    model: Model, kv_unified: bool, price: str
) -> None:
    """Only what it has decoded can tell. Its first draft costs no more, and is verified."""
    batch = Running(model, MIXED, kv_unified=kv_unified)
    batch.begin()
    while batch.going_on:
        entries = [PlanEntry(s, (), True, DEPTH, True, 1.0) for s in batch.going_on]
        limits = [batch.limit(entry) for entry in entries]
        result = batch.step(entries, msgspec.structs.replace(NO_PRICE, **{price: 1e30}))
        assert result.n_draft_decodes == any(limits)
        assert [given.n_drafted for given in result.entries] == [min(1, n) for n in limits]


# ------------------------------------------------------------------------- how sure the head is


@pytest.mark.parametrize("temperature", [0.0, 1e-7, 0.1, 0.5, 1.0, 1e30])
def test_trials_tell_how_sure_the_head_was(model: Model, temperature: float) -> None:
    """By the softmax of its logits, at the request's own temperature; 1e-7 is greedy."""
    greedy = temperature < 1e-6
    head = Head(model)
    batch = Running(model, [SamplingParams(temperature=temperature)])
    batch.begin()
    seen = Counter[int]()
    while batch.going_on:
        text = batch.text(0)
        entry = PlanEntry(0, (), True, DEPTH)
        limit = batch.limit(entry)
        result = batch.step([entry], NO_PRICE)
        [given] = result.entries
        assert given.n_drafted == limit
        expected: dict[int | None, list[int]] = {}
        for (token, logits), actual in zip(head(text)[:limit], given.token_ids, strict=False):
            found = confidence(logits, 0.0 if greedy else temperature)
            trials = expected.setdefault(found, [0, 0])
            trials[0] += 1
            trials[1] += token == actual
        if None not in expected:
            first = 0 if greedy else N_CONFIDENCES
            assert {c - first: [n, hits] for c, n, hits in result.trials} == expected
            seen.update(c for c in expected if c is not None)
    assert seen.total() >= 5
    if temperature == 1e30:
        assert set(seen) == {0}
    elif 0 < temperature < 1 and not greedy:
        assert len(seen) >= 5


# ---------------------------------------------------------------------------------- what pays


class Drafter(NamedTuple):
    """An entry, with its limit and the chances of what the head would draft for it."""

    entry: PlanEntry
    limit: int
    chances: list[float]  # of each, if all before it are accepted


class Drafted(NamedTuple):
    lengths: list[int]
    n_decodes: int
    n_deeper: int
    """Rows of all decodes but the first, which has what the heads have to catch up with."""


def draft(drafters: Sequence[Drafter], terms: Terms, *, level: bool) -> Drafted:
    """How deep each is drafted; ``level``: selective ones equally, up to their limits."""
    lengths = [0 for _ in drafters]
    chance = [1.0 for _ in drafters]
    turn = [i for i, drafter in enumerate(drafters) if drafter.limit > 0]
    n_decodes = n_deeper = 0
    for depth in range(DEPTH):
        if not turn:
            break
        n_decodes += 1
        n_deeper += len(turn) if depth else 0
        deeper = []
        for i in turn:
            entry, limit, chances = drafters[i]
            chance[i] *= chances[depth]
            if entry.selective and not level and chance[i] < terms.target_row:
                continue
            lengths[i] += 1
            if lengths[i] < limit:
                deeper.append(i)

        fixed = [i for i in deeper if not drafters[i].entry.selective]
        asked = [i for i in deeper if drafters[i].entry.selective]
        next_gain = {i: chance[i] * drafters[i].entry.expected - terms.target_row for i in asked}
        if level:
            total = sum(max(gain, 0.0) - terms.draft_row for gain in next_gain.values())
            stay = asked if total >= terms.draft_decode else []
        else:
            stay = [i for i in asked if next_gain[i] > terms.draft_row]
            total = sum(next_gain[i] - terms.draft_row for i in stay)
            if not fixed and total < terms.draft_decode:
                stay = []
        turn = [i for i in deeper if i in fixed or i in stay]
    return Drafted(lengths, n_decodes, n_deeper)


class Rows:
    """Rows that the first decode of the heads has: tokens that they have not seen."""

    def __init__(self) -> None:
        self._seen = [0] * N_SEQ

    def take(self, batch: Running, drafters: Sequence[Drafter]) -> int:
        n = 0
        for entry, limit, _ in drafters:
            if limit > 0:
                length = len(batch.text(entry.seq_id))
                n += length - self._seen[entry.seq_id]
                self._seen[entry.seq_id] = length
        return n


def look(
    batch: Running, head: Head, entries: Sequence[PlanEntry], terms: Terms
) -> list[Drafter] | None:
    """What the head would draft. None: its classes are not clear."""
    drafters = []
    for entry in entries:
        temperature = batch.params[entry.seq_id].temperature
        known = terms.sampled if temperature else terms.greedy
        chances = []
        for _, logits in head(batch.text(entry.seq_id)):
            found = confidence(logits, temperature)
            if found is None:
                return None
            chances.append(known[found])
        drafters.append(Drafter(entry, batch.limit(entry), chances))
    return drafters


@pytest.mark.parametrize("seed", range(3))
def test_a_draft_stops_where_it_no_longer_pays(glm: Model, kv_unified: bool, seed: int) -> None:
    """Before a token that is not worth its row, and before a decode that is not worth making."""
    rng = random.Random(seed)
    head, rows = Head(glm), Rows()
    batch = Running(glm, MIXED, kv_unified=kv_unified)
    batch.begin()
    n_checked, seen = 0, Counter[int]()
    while batch.going_on:
        entries = [random_entry(rng, s) for s in batch.going_on]
        terms = random_terms(rng)
        drafters = look(batch, head, entries, terms)
        limits = drafters or [Drafter(entry, batch.limit(entry), []) for entry in entries]
        n_first = rows.take(batch, limits)
        result = batch.step(entries, terms)
        if drafters is None:
            continue
        expected = draft(drafters, terms, level=False)
        assert [given.n_drafted for given in result.entries] == expected.lengths
        assert result.n_draft_decodes == expected.n_decodes
        assert result.n_draft_tokens == n_first + expected.n_deeper
        assert result.n_target_tokens == sum(1 + length for length in expected.lengths)
        assert result.n_target_decodes == 1
        n_checked += 1
        seen.update(length for d, length in zip(drafters, expected.lengths, strict=True) if d.limit)
    assert n_checked >= 8
    assert set(seen) >= {0, 1, 2}


@pytest.mark.parametrize(
    ("prices", "expected", "n_drafted", "n_decodes"),
    [
        ({}, 1.0, 4, 4),
        ({}, 0.0, 1, 1),
        ({"target_row": 0.5}, 1.0, 1, 1),
        ({"target_row": 0.53125}, 1.0, 0, 1),
        ({"target_row": 0.125}, 1.0, 3, 3),
        ({"target_row": 0.125}, 0.5, 2, 2),
        ({"draft_row": 0.25}, 1.0, 2, 2),
        ({"draft_row": 0.21875}, 1.0, 3, 3),
        ({"draft_decode": 0.25}, 1.0, 3, 3),
        ({"draft_decode": 0.28125}, 1.0, 2, 2),
        ({"target_row": 0.125, "draft_row": 0.125}, 1.0, 2, 2),
        ({"target_row": 0.125, "draft_row": 0.0625, "draft_decode": 0.0625}, 1.0, 3, 3),
        ({"target_row": 0.125, "draft_row": 0.0625, "draft_decode": 0.09375}, 1.0, 2, 2),
        ({"target_pass": 9.0}, 1.0, 4, 4),
    ],
)
def test_where_something_is_worth_just_what_it_costs(
    glm: Model, prices: dict[str, float], expected: float, n_drafted: int, n_decodes: int
) -> None:
    """With every draft as likely right as wrong. Then a draft is verified and a decode is made; but
    a row of that decode must be worth more than it costs."""
    half = (0.5,) * N_CONFIDENCES
    terms = msgspec.structs.replace(NO_PRICE, greedy=half, **prices)
    batch = Running(glm, [GREEDY])
    batch.begin()
    result = batch.step([PlanEntry(0, (), True, DEPTH, True, expected)], terms)
    assert (result.entries[0].n_drafted, result.n_draft_decodes) == (n_drafted, n_decodes)


def best_gain(drafters: Sequence[Drafter], lengths: Sequence[int], terms: Terms) -> float:
    """The most that selective ones can be worth with at most two lengths, tried one by one."""
    selective = [i for i, d in enumerate(drafters) if d.entry.selective and lengths[i]]
    pairs = itertools.combinations_with_replacement(range(max(lengths) + 1), 2)
    choices = itertools.chain.from_iterable(
        itertools.product(pair, repeat=len(selective)) for pair in pairs
    )
    return max(
        gain_of(drafters, lengths, dict(zip(selective, choice, strict=True)), terms)
        for choice in choices
    )


def gain_of(
    drafters: Sequence[Drafter], lengths: Sequence[int], cut: dict[int, int], terms: Terms
) -> float:
    """What drafts are worth if some are cut, less the passes of all."""
    verified = [min(length, cut.get(i, length)) for i, length in enumerate(lengths)]
    worth = sum(
        chance - terms.target_row
        for i in cut
        for chance in itertools.accumulate(drafters[i].chances[: verified[i]], float.__mul__)
    )
    return worth - terms.target_pass * len(set(verified))


@pytest.mark.parametrize("seed", range(3))
def test_where_each_length_is_a_pass_drafts_have_two_at_most(
    demo: Model, kv_unified: bool, seed: int
) -> None:
    """The two that are worth most, or one; others only if the token limit cuts them."""
    rng = random.Random(seed)
    head, rows = Head(demo), Rows()
    batch = Running(demo, MIXED, kv_unified=kv_unified)
    batch.begin()
    n_checked, seen, n_lengths = 0, Counter[int](), Counter[int]()
    while batch.going_on:
        depth = rng.randint(2, DEPTH)
        entries = [
            msgspec.structs.replace(entry, n_draft=depth) if entry.selective else entry
            for entry in (random_entry(rng, s) for s in batch.going_on)
        ]
        terms = random_terms(rng)
        drafters = look(batch, head, entries, terms)
        limits = drafters or [Drafter(entry, batch.limit(entry), []) for entry in entries]
        n_first = rows.take(batch, limits)
        result = batch.step(entries, terms)
        actual = [given.n_drafted for given in result.entries]
        free = {
            length
            for entry, length, d in zip(entries, actual, limits, strict=True)
            if entry.selective and (length < d.limit or d.limit == depth)
        }
        assert len(free) <= 2
        assert result.n_target_tokens == sum(1 + length for length in actual)
        if kv_unified:
            assert result.n_target_decodes == len(set(actual))
        if drafters is None:
            continue
        drafted = draft(drafters, terms, level=True)
        assert result.n_draft_decodes == drafted.n_decodes
        assert result.n_draft_tokens == n_first + drafted.n_deeper
        selective = {i: actual[i] for i, d in enumerate(drafters) if d.entry.selective and d.limit}
        for i, length in enumerate(actual):
            assert length <= drafted.lengths[i] if i in selective else length == limits[i].limit
        if len({drafted.lengths[i] for i in selective}) == 1:
            gain = gain_of(drafters, drafted.lengths, selective, terms)
            assert gain == best_gain(drafters, drafted.lengths, terms)
            n_checked += 1
            n_lengths[len({*selective.values()})] += 1
            seen.update(selective.values())
    assert n_checked >= 8
    assert set(seen) >= {0, 1, 2}
    assert set(n_lengths) == {1, 2}


# -------------------------------------------------------------------------------- wrong terms


def with_terms(**fields: Any) -> Terms:
    return msgspec.structs.replace(NO_PRICE, **fields)


WRONG = {
    "no price": (with_terms(target_row=math.nan), "target_row"),
    "negative price": (with_terms(target_pass=-0.5), "target_pass"),
    "infinite price": (with_terms(draft_row=math.inf), "draft_row"),
    "price that fits no float": (with_terms(draft_decode=1e39), "draft_decode"),
    "no chance": (with_terms(greedy=(math.nan, *CERTAIN[1:])), "class 0"),
    "negative chance": (with_terms(greedy=(*CERTAIN[1:], -0.1)), "class 15"),
    "more than certain": (with_terms(sampled=(*CERTAIN[1:], 1.1)), "class 31"),
    "infinite chance": (with_terms(sampled=(math.inf, *CERTAIN[1:])), "class 16"),
    "a class too few": (with_terms(greedy=CERTAIN[1:]), "16"),
    "a class too many": (with_terms(sampled=(*CERTAIN, 1.0)), "16"),
    "one class in the other's place": (
        with_terms(greedy=CERTAIN[1:], sampled=(*CERTAIN, 1.0)),
        "16",
    ),
}


@pytest.mark.parametrize(("terms", "named"), WRONG.values(), ids=WRONG.keys())
def test_wrong_terms_are_refused(glm: Model, terms: Terms, named: str) -> None:
    check_refused(glm, PlanEntry(0, (), True, DEPTH, True, 1.0), terms, named)


@pytest.mark.parametrize("expected", [math.nan, -0.1, 1.1, math.inf])
def test_wrong_expectations_are_refused(glm: Model, expected: float) -> None:
    entry = PlanEntry(0, (), True, DEPTH, True, expected)
    check_refused(glm, entry, NO_PRICE, "expected")


def test_selective_drafts_need_terms(glm: Model) -> None:
    check_refused(glm, PlanEntry(0, (), True, DEPTH, True, 1.0), None, "terms")


def check_refused(model: Model, entry: PlanEntry, terms: Terms | None, named: str) -> None:
    """In words, and nothing has changed."""
    batch, spared = Running(model, [GREEDY]), Running(model, [GREEDY])
    batch.begin()
    spared.begin()
    with pytest.raises(InternalError, match=f"^plan: .*{named}"):
        batch.step([entry], terms)
    right = PlanEntry(0, (), True, DEPTH, True, 1.0)
    assert batch.step([right], NO_PRICE).entries == spared.step([right], NO_PRICE).entries
