"""Prompts that begin alike go to the same replica, while it has not too much to do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from mtpbatch.scaleout.routing import beginning, beginning_of, in_order

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def key(**body: Any) -> bytes:
    return beginning(msgspec.json.encode(body))


def test_a_conversation_keeps_its_beginning_from_turn_to_turn() -> None:
    turns: list[dict[str, Any]] = [SYSTEM, {"role": "user", "content": "What is a sequence?"}]
    first = key(messages=turns)
    turns += [{"role": "assistant", "content": "…"}, {"role": "user", "content": "And a draft?"}]
    assert key(messages=turns, temperature=1, stream=True) == first == beginning_of(turns)
    assert key(messages=[SYSTEM, {"role": "user", "content": "What is a token?"}]) != first


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("a" * 2000, "a" * 1024 + "b", True),
        ("a" * 1023 + "b", "a" * 1024, False),
        ([7] * 2000, [*[7] * 1024, 8], True),
        ([7, 8], [7, 9], False),
        (["a", "b"], "a", True),
        ([SYSTEM], [SYSTEM], True),
    ],
)
def test_of_a_prompt_the_beginning_counts(one: object, other: object, alike: bool) -> None:
    assert (key(prompt=one) == key(prompt=other)) is alike
    assert (beginning_of(one) == beginning_of(other)) is alike
    assert key(prompt=one)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b"{}", b'{"prompt": 3}', b'{"prompt": ""', b'{"messages": 1}'],
)
def test_what_has_no_prompt_has_no_beginning(body: bytes) -> None:
    assert beginning(body) == b""


def test_every_router_makes_the_same_choice_and_all_replicas_get_their_share() -> None:
    keys = [beginning_of(f"prompt {i}") for i in range(3000)]
    loads = {"a": 0, "b": 0, "c": 0}
    chosen = [in_order(k, loads)[0][0] for k in keys]
    assert chosen == [in_order(k, dict(reversed(loads.items())))[0][0] for k in keys]
    # Binomial with mean 1000 and a standard deviation of 26.
    assert all(abs(n - 1000) < 130 for n in Counter(chosen).values())


def test_when_a_replica_goes_only_its_prompts_move() -> None:
    for i in range(300):
        k = beginning_of(f"prompt {i}")
        before = in_order(k, {"a": 0, "b": 0, "c": 0})[0]
        after = in_order(k, {"a": 0, "b": 0})[0]
        assert after == [name for name in before if name != "c"]


def test_a_replica_with_more_than_its_share_is_passed_over() -> None:
    keys = [beginning_of(f"prompt {i}") for i in range(50)]
    for k in keys:
        assert in_order(k, {"a": 8, "b": 2})[1] == ["a"]  # at most 1.25 times the mean of 5.5
        assert in_order(k, {"a": 6, "b": 4})[1] == []
        assert in_order(k, {"a": 1, "b": 0})[1] == []


def test_a_beginning_that_everybody_has_spreads_as_the_load_grows() -> None:
    k = beginning_of("The same system prompt")
    loads = dict.fromkeys("abcd", 0)
    for _ in range(100):
        loads[in_order(k, loads)[0][0]] += 1
    assert max(loads.values()) <= 1.25 * 26 + 1
