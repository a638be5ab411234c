"""Text comes out as soon as it may be shown, in whole characters, and no stop text ever leaks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpbatch.text import TextAssembler


def assembler(pieces: Sequence[bytes], *stop: str, min_tokens: int = 0) -> TextAssembler:
    """One whose token ``i`` is ``pieces[i]``."""
    return TextAssembler(pieces, stop, min_tokens)


def cut_at_stop(text: str, stop: Sequence[str], n_before: int) -> tuple[str, int | None]:
    """The slow truth: the text before the first stop text to end, and where that one ends.

    None ends in the first ``n_before`` characters.
    """
    for end in range(n_before + 1, len(text) + 1):
        ending = [len(s) for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(ending)], end
    return text, None


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text over few letters, so that stop texts overlap, cut into tokens anywhere."""
    text = draw(st.text("abé日🙂", max_size=30))
    data = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=20)))
    bounds = [0, *cuts, len(data)]
    return text, [data[a:b] for a, b in pairwise(bounds)]


STOPS = st.lists(st.text("abé日", min_size=1, max_size=6), max_size=3)


@given(split_texts(), STOPS, st.just(0) | st.integers(1, 8))
def test_text_is_that_of_the_tokens_up_to_the_first_stop_text(
    split: tuple[str, list[bytes]], stop: list[str], min_tokens: int
) -> None:
    text, pieces = split
    n_before = len(b"".join(pieces[:min_tokens]).decode(errors="ignore"))
    wanted, end = cut_at_stop(text, stop, n_before)
    texts = assembler(pieces, *stop, min_tokens=min_tokens)
    shown, n_taken = texts.feed(range(len(pieces)))
    assert texts.stopped == (end is not None)
    assert shown + texts.flush() == wanted
    taken = b"".join(pieces[:n_taken])
    if end is None:
        assert n_taken == len(pieces)
    else:
        assert taken.decode(errors="ignore").startswith(text[:end])
        before = b"".join(pieces[: n_taken - 1]).decode(errors="ignore")
        assert not before.startswith(text[:end]), "the last token taken completes the stop text"


@given(split_texts(), STOPS, st.just(0) | st.integers(1, 8))
def test_tokens_one_by_one_give_the_same_as_all_at_once(
    split: tuple[str, list[bytes]], stop: list[str], min_tokens: int
) -> None:
    _, pieces = split
    whole = assembler(pieces, *stop, min_tokens=min_tokens)
    together, n_together = whole.feed(range(len(pieces)))
    texts = assembler(pieces, *stop, min_tokens=min_tokens)
    shown, n_taken = "", 0
    for token_id in range(len(pieces)):
        if texts.stopped:
            break
        more, taken = texts.feed([token_id])
        shown += more
        n_taken += taken
    assert (shown, n_taken) == (together, n_together)


@given(split_texts(), STOPS)
def test_nothing_is_held_back_longer_than_it_must_be(
    split: tuple[str, list[bytes]], stop: list[str]
) -> None:
    _, pieces = split
    texts = assembler(pieces, *stop)
    shown = ""
    for n_fed, _ in enumerate(pieces, 1):
        shown += texts.feed([n_fed - 1])[0]
        if texts.stopped:
            return
        so_far = b"".join(pieces[:n_fed]).decode(errors="ignore")
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert not held or any(s.startswith(held) for s in stop)


@given(st.lists(st.binary(max_size=4), max_size=20))
def test_bytes_that_are_not_utf8_become_replacement_characters(pieces: list[bytes]) -> None:
    texts = assembler(pieces)
    shown, _ = texts.feed(range(len(pieces)))
    assert shown + texts.flush() == b"".join(pieces).decode(errors="replace")


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_a_split_character_waits_for_its_last_byte(stop: tuple[str, ...]) -> None:
    texts = assembler([b"\xf0", b"\x9f\x99", b"\x82!"], *stop)
    assert [texts.feed([i])[0] for i in range(3)] == ["", "", "🙂!"]


def test_a_character_cut_off_by_the_end_is_replaced() -> None:
    texts = assembler([b"ok \xf0\x9f"])
    assert texts.feed([0]) == ("ok ", 1)
    assert texts.flush() == "\ufffd"


def test_the_start_of_a_stop_text_is_shown_once_it_turns_out_to_be_none() -> None:
    texts = assembler([b"a</", b"b>", b"</", b"end>", b"more"], "</end>")
    assert texts.feed([0]) == ("a", 1)
    assert texts.feed([1]) == ("</b>", 1)
    assert texts.feed([2]) == ("", 1)
    assert texts.feed([3, 4]) == ("", 1)
    assert texts.stopped
    assert texts.flush() == ""


def test_text_held_back_at_the_end_is_given_out() -> None:
    texts = assembler([b"x</e"], "</end>")
    assert texts.feed([0]) == ("x", 1)
    assert texts.flush() == "</e"


def test_of_stop_texts_that_end_together_the_longest_is_left_out() -> None:
    assert assembler([b"xyab"], "b", "ab", "yab").feed([0]) == ("x", 1)


def test_tokens_without_bytes_show_nothing() -> None:
    assert assembler([b"", b"a"], "zz").feed([0, 1, 0]) == ("a", 3)


@pytest.mark.parametrize("n_tokens", [4096, 4097, 20_001])
def test_a_long_answer_is_the_text_of_all_its_tokens(n_tokens: int) -> None:
    """Characters are cut everywhere, also where slices end."""
    data = ("日本語 and é🙂" * n_tokens).encode()
    pieces = [data[i : i + 1] for i in range(n_tokens)]
    texts = assembler(pieces)
    shown, n_taken = texts.feed(range(n_tokens))
    assert n_taken == n_tokens
    assert shown + texts.flush() == data[:n_tokens].decode(errors="replace")
