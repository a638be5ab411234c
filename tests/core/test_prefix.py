"""The prefix index, against a search through all prompts and snapshots."""

from __future__ import annotations

import time
from itertools import pairwise, takewhile
from operator import eq
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpbatch import prefix
from mtpbatch.exceptions import InternalError
from mtpbatch.prefix import PrefixIndex

BLOCK, LEAST = 2, 5

# Two letters, so that prompts share much and part anywhere.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "BLOCK", BLOCK)
    monkeypatch.setattr(prefix, "LEAST", LEAST)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=400)
@given(
    snapshots=st.lists(st.tuples(TOKENS, st.booleans(), st.booleans()), max_size=8),
    prompt=TOKENS,
    drafts=st.booleans(),
    truncates=st.booleans(),
)
def test_the_longest_prefix_that_any_snapshot_holds(
    snapshots: list[tuple[tuple[int, ...], bool, bool]],
    prompt: tuple[int, ...],
    drafts: bool,
    truncates: bool,
) -> None:
    index = PrefixIndex(truncates=truncates)
    left: dict[int, tuple[int, ...]] = {}
    for number, (token_ids, drafted, stays) in enumerate(snapshots, start=1):
        index.add(number, token_ids, drafts=drafted)
        if not stays:
            index.remove(number)
        elif drafted == drafts:
            left[number] = token_ids
    index.enter("r", prompt, drafts=drafts)
    index.check_integrity()

    def spares(token_ids: tuple[int, ...]) -> int:
        n_tokens = shared(token_ids, prompt[:-1])  # the last one is sampled from
        whole = n_tokens == len(token_ids)
        return n_tokens if n_tokens >= LEAST and (truncates or whole) else 0

    hit = index.longest("r")
    most = max(map(spares, left.values()), default=0)
    if truncates and most >= LEAST + BLOCK:
        assert most - BLOCK < hit.n_tokens <= most, "the last block may be another's"
    elif truncates:
        assert hit.n_tokens in (0, *range(LEAST, most + 1))
    else:
        assert hit.n_tokens == most
    if hit.snapshot:
        assert spares(left[hit.snapshot]) == hit.n_tokens
        assert len(left[hit.snapshot]) == hit.n_held
    else:
        assert hit.n_tokens == hit.n_held == 0


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=400)
@given(
    others=st.lists(TOKENS, max_size=6),
    gone=st.integers(0, 6),
    prompt=TOKENS,
    n_stored=st.integers(0, 6),
    truncates=st.booleans(),
)
def test_a_prompt_is_saved_where_others_part_from_it(
    others: list[tuple[int, ...]],
    gone: int,
    prompt: tuple[int, ...],
    n_stored: int,
    truncates: bool,
) -> None:
    index = PrefixIndex(truncates=truncates)
    index.enter("r", prompt, drafts=True)
    for number, other in enumerate(others):
        index.enter(f"r{number}", other, drafts=True)
        if number < gone:
            index.leave(f"r{number}")  # it counts on, for a while
    index.check_integrity()

    n_reusable = len(prompt) - 1
    lengths = sorted({*range(BLOCK, len(prompt), BLOCK), n_reusable} - {0})
    sharing = [
        sum(
            len(other) > length <= shared(other, prompt)
            and (length % BLOCK == 0 or len(other) == len(prompt))
            for other in others
        )
        for length in lengths
    ]
    parting = [
        length
        for length, (here, later) in zip(lengths, pairwise([*sharing, 0]), strict=True)
        if here > later and length >= n_stored + LEAST
    ]
    points = index.points("r", n_stored)
    assert set(points) <= set(parting)
    assert bool(points) == bool(parting)
    if truncates:
        assert points == tuple(parting[-1:])
    elif parting:
        assert points[0] == parting[0], "where most of them part"
        assert points[-1] == parting[-1] or parting[-1] < parting[0] + LEAST


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("truncates", [True, False])
def test_a_shared_prompt_is_saved_to_its_last_token_but_one(truncates: bool) -> None:
    index = PrefixIndex(truncates=truncates)
    prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    index.enter("first", prompt, drafts=True, shared=True)
    assert index.points("first", 0) == (9,), "nobody else is there yet"
    index.enter("part", (*prompt[:7], 0), drafts=True)
    assert index.points("first", 0) == ((9,) if truncates else (6, 9))
    assert index.points("first", 8) == (9,)
    assert index.points("first", 9) == ()
    index.expect("first", (9,))
    index.enter("second", prompt, drafts=True, shared=True)
    assert index.awaited("second", 8), "however little it is"
    assert not index.awaited("second", 9)
    assert bool(index.awaited("part", 0)) == truncates, "only a cut one has a part of it"
    index.add(1, prompt[:9], drafts=True)
    assert index.longest("second").n_tokens == 9
    index.enter("short", (1, 1, 1, 1, 1), drafts=True, shared=True)
    assert index.points("short", 0) == (), "less than LEAST"
    index.check_integrity()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("truncates", [True, False])
def test_who_has_use_for_what_is_computed_waits_for_it(truncates: bool) -> None:
    index = PrefixIndex(truncates=truncates)
    common = (1, 2, 3, 4, 5, 6, 7, 8)
    index.enter("first", (*common, 1, 1), drafts=True)
    index.enter("like it", (*common, 2, 2), drafts=True)
    index.enter("never drafts", (*common, 2, 2), drafts=False)
    index.enter("another", (9, *common), drafts=True)
    assert not index.awaited("like it", 0), "nobody computes it yet"
    index.expect("first", index.points("first", 0))
    assert [name for name in index.entered if index.awaited(name, 0)] == ["first", "like it"]
    assert not index.awaited("like it", 4), "that much is not worth waiting for"
    index.leave("first")
    assert not index.awaited("like it", 0), "it will not come"
    index.check_integrity()


@pytest.mark.usefixtures("small_blocks")
def test_what_left_long_ago_does_not_count() -> None:
    index = PrefixIndex(truncates=True)
    index.enter("old", (1,) * 9, drafts=True)
    index.leave("old")
    index.enter("new", (1,) * 9, drafts=True)
    assert index.points("new", 0) == (8,)
    for number in range(prefix._RECENT):
        index.enter(f"r{number}", (number + 2,) * 9, drafts=True)
        index.leave(f"r{number}")
    assert index.points("new", 0) == ()
    index.check_integrity()


def test_different_tokens_of_one_key_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_key(token_ids: tuple[int, ...], n_tokens: int, **_: Any) -> tuple[int, ...]:
        return tuple(range(n_tokens // prefix.BLOCK))

    monkeypatch.setattr(prefix, "_keys", one_key)
    for truncates in (True, False):
        index = PrefixIndex(truncates=truncates)
        index.add(1, (1,) * 100, drafts=True)
        index.enter("r", (2,) * 200, drafts=True)
        assert index.longest("r").snapshot == 0


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=400)
@given(prompt=TOKENS, answer=TOKENS, cut=st.integers(1, 28), other=TOKENS, truncates=st.booleans())
def test_a_snapshot_is_found_alike_if_its_prompt_is_known(
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    cut: int,
    other: tuple[int, ...],
    truncates: bool,
) -> None:
    held = (*prompt, *answer)[:cut]
    found = []
    for of in ("r", None):
        index = PrefixIndex(truncates=truncates)
        index.enter("r", prompt, drafts=True)
        assert index.is_new(held, drafts=True, of=of) == (len(held) >= LEAST)
        index.add(1, held, drafts=True, of=of)
        index.check_integrity()
        index.enter("longer", (*held, *other), drafts=True)
        index.enter("other", (*held[: len(other)], *other), drafts=True)
        new = index.is_new((*held, *other), drafts=True, of="longer")
        found.append((index.longest("longer"), index.longest("other"), new))
    assert found[0] == found[1]


def test_a_prompt_of_2000_tokens_costs_well_below_a_millisecond() -> None:
    index = PrefixIndex(truncates=True)
    prompts = [(*range(1900), *(7000 + number,) * 100) for number in range(1000)]
    for number in range(500):
        index.enter(f"r{number}", prompts[number], drafts=True)
        index.add(number + 1, prompts[number], drafts=True)

    def seconds() -> float:
        begin = time.process_time()
        for number in range(500, 600):
            index.enter(f"r{number}", prompts[number], drafts=True)
            assert index.longest(f"r{number}").n_tokens == 1900
            assert index.points(f"r{number}", 0)
            index.awaited(f"r{number}", 0)
            index.leave(f"r{number}")
        return (time.process_time() - begin) / 100

    assert min(seconds() for _ in range(5)) < 1e-3


def test_check_integrity_notices_a_snapshot_that_nobody_finds() -> None:
    index = PrefixIndex(truncates=True)
    index.add(1, (1,) * 100, drafts=True)
    index._holders.popitem()
    with pytest.raises(InternalError, match="found by its keys"):
        index.check_integrity()
