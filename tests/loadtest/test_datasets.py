"""What is asked for: same seed, same requests, of the lengths and shares that were asked for."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest

from mtpbatch import InvalidParameterError
from mtpbatch.loadtest import datasets
from mtpbatch.loadtest.datasets import Dataset, Item, Work
from mtpbatch.loadtest.lengths import Normal, lengths
from mtpbatch.loadtest.traces import BLOCK, TraceEntry, read_trace
from mtpbatch.testing import Fixed, LogNormal, Uniform


def first(dataset: Dataset, n: int, seed: int = 1) -> list[Item]:
    return list(itertools.islice(dataset(random.Random(seed)), n))


def made(n: int, *, seed: int = 1, cancelled: float = 0.0, output: str = "10..20") -> list[Work]:
    drawn = datasets.Drawn(Uniform(5, 9))
    requests = datasets.work(drawn, lengths("output_length", output), 64, cancelled, seed)
    return list(itertools.islice(requests, n))


# ------------------------------------------------------------------------------ requests


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    assert made(50, cancelled=0.3) == made(50, cancelled=0.3)
    assert made(50) != made(50, seed=2)


def test_what_is_cancelled_changes_no_prompt_and_no_length() -> None:
    kept, cancelled = made(50), made(50, cancelled=0.5)
    assert [(w.prompt, w.max_tokens) for w in kept] == [(w.prompt, w.max_tokens) for w in cancelled]


def test_so_many_are_cancelled_each_at_a_random_part_of_its_answer() -> None:
    drawn = made(4000, cancelled=0.25, output="100")
    parts = [w.cancel_after for w in drawn if w.cancel_after is not None]
    # Within 3 standard deviations of what the share says.
    assert abs(len(parts) - 1000) < 3 * math.sqrt(4000 * 0.25 * 0.75)
    assert set(parts) <= set(range(100))
    assert statistics.mean(parts) == pytest.approx(49.5, abs=3 * 28.9 / math.sqrt(len(parts)))
    assert all(w.cancel_after is None for w in made(100))


def test_an_answers_length_is_the_one_asked_for_else_the_datasets_else_the_default() -> None:
    items = datasets.Listed((Item("a", None, 7),))
    asked = datasets.work(items, Fixed(3), 64, 0.0, 1)
    own = datasets.work(items, None, 64, 0.0, 1)
    default = datasets.work(datasets.Listed((Item("a"),)), None, 64, 0.0, 1)
    assert [next(each).max_tokens for each in (asked, own, default)] == [3, 7, 64]


# ------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("128", Fixed(128)),
        ("64..256", Uniform(64, 256)),
        ("normal:200,50", Normal(200, 50)),
        ("lognormal:200,0.7", LogNormal(200, 0.7, 1 << 20)),
        ("lognormal:200,0.7,4096", LogNormal(200, 0.7, 4096)),
    ],
)
def test_a_distribution_is_read_as_it_is_written(text: str, meant: object) -> None:
    assert lengths("prompt_length", text) == meant


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-3", "1.5", "9..3", "0..3", "x..y", "poisson:3", "normal:", "normal:0,1"),
        *("normal:9,-1", "normal:1", "normal:1,2,3", "normal:nan,1", "lognormal:0,1"),
        "lognormal:1,1,0",
    ],
)
def test_a_length_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="prompt_length: must be a length"):
        lengths("prompt_length", text)


def test_normal_lengths_have_their_mean_and_deviation() -> None:
    chance = random.Random(5)
    drawn = [Normal(200, 30)(chance) for _ in range(4000)]
    assert statistics.mean(drawn) == pytest.approx(200, abs=3 * 30 / math.sqrt(4000))
    assert statistics.stdev(drawn) == pytest.approx(30, rel=0.05)
    assert min(Normal(1, 5)(chance) for _ in range(100)) == 1


# --------------------------------------------------------------------------------- drawn


def test_random_prompts_have_so_many_words_and_never_come_again() -> None:
    items = first(datasets.Drawn(Fixed(12)), 200)
    assert all(isinstance(i.prompt, str) and len(i.prompt.split()) == 12 for i in items)
    assert len({i.prompt for i in items}) == 200
    assert items[0].prompt_tokens is None  # the server's vocabulary says how many tokens


def test_random_token_ids_are_in_their_range_and_counted() -> None:
    items = first(datasets.Drawn(Fixed(40), datasets.TokenIds(10, 12)), 20)
    assert {token for item in items for token in item.prompt} == {10, 11, 12}
    assert {item.prompt_tokens for item in items} == {40}


def test_prompts_share_one_of_so_many_prefixes_and_go_on_each_in_its_own_way() -> None:
    shared = datasets.SharedPrefixes(3, Fixed(20), Fixed(10), datasets.TokenIds(0, 10**6))
    items = first(shared, 300)
    prefixes = [item.prompt[:20] for item in items]
    assert len(set(prefixes)) == 3
    assert min(prefixes.count(prefix) for prefix in set(prefixes)) > 60
    assert len({item.prompt[20:] for item in items}) == 300
    assert {item.prompt_tokens for item in items} == {30}


# ------------------------------------------------------------------------------ from files


def test_the_packaged_prompts_all_come_before_any_comes_again() -> None:
    packaged = datasets.builtin()
    n = len(packaged.items)
    assert n >= 16
    items = first(packaged, 2 * n)
    assert set(items[:n]) == set(items[n:]) == set(packaged.items)
    assert items[:n] != items[n:]


def read(tmp_path: Path, text: str) -> tuple[Item, ...]:
    path = tmp_path / "data"
    path.write_text(text, encoding="utf-8")
    return datasets.read_dataset("dataset", path).items


def test_jsonl_has_prompts_token_ids_and_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    lines = [{"prompt": "a"}, {"prompt": [1, 2, 3], "output_tokens": 5}, {"messages": messages}]
    items = read(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n")
    assert items == (Item("a"), Item((1, 2, 3), 3, 5), Item(tuple(messages)))
    assert datasets.Listed(items).conversational
    assert not datasets.Listed(items[:2]).conversational


def test_sharegpt_gives_the_first_turn_and_the_length_of_its_reply(tmp_path: Path) -> None:
    turns = [("human", "question"), ("gpt", "x" * 41), ("human", "more"), ("gpt", "y")]
    one = {"id": "1", "conversations": [{"from": who, "value": text} for who, text in turns]}
    short = {"conversations": [{"from": "human", "value": "alone"}]}
    assert read(tmp_path, json.dumps([one, short])) == (Item("question", None, 11),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2"),
        ('{"text": "a"}', "line 1 must have a prompt"),
        ('{"prompt": "a", "output_tokens": 0}', "line 1"),
        ("[1]", "ShareGPT"),
        ("[]", "no prompts"),
        ("", "no prompts"),
        ("not json", "line 1"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_with_the_place(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match="cannot be read"):
        datasets.read_dataset("dataset", tmp_path / "nowhere")


# -------------------------------------------------------------------------------- traces

MOONCAKE = """\
{"timestamp": 27500, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 27000, "input_length": 600, "output_length": 3, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 6472, "output_length": 0}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.7500000,4808,10
2023-11-16 18:17:04.0000000,3180,8
"""
BURST_GPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""


def test_published_traces_are_read() -> None:
    assert read_trace("trace", MOONCAKE) == (
        TraceEntry(0.0, 600, 3, (46, 47)),
        TraceEntry(0.5, 6955, 52, (46, 47)),
    )
    assert read_trace("trace", AZURE) == (
        TraceEntry(0.0, 4808, 10),
        TraceEntry(0.25, 3180, 8),
    )
    assert read_trace("trace", BURST_GPT) == (TraceEntry(0, 472, 18), TraceEntry(40, 1087, 230))


@pytest.mark.parametrize("text", ["", "{}", "a,b\n1,2\n", '{"timestamp": "x"}', AZURE[:40] + "\n"])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="trace: is "):
        read_trace("trace", text)


def test_prompts_of_a_trace_are_as_long_and_as_alike_as_they_were() -> None:
    entries = (
        TraceEntry(0, 2 * BLOCK + 100, 5, (1, 2)),
        TraceEntry(1, BLOCK + 7, 6, (1, 3)),
        TraceEntry(2, 30, 7),
    )
    traced = datasets.Traced(entries, datasets.TokenIds(0, 10**6))
    items = first(traced, 10)
    assert [len(item.prompt) for item in items] == [2 * BLOCK + 100, BLOCK + 7, 30]
    assert [item.output_tokens for item in items] == [5, 6, 7]
    assert items[0].prompt[:BLOCK] == items[1].prompt[:BLOCK]
    assert items[0].prompt[BLOCK : BLOCK + 7] != items[1].prompt[BLOCK:]
    assert first(traced, 10, seed=2)[0].prompt[:BLOCK] != items[0].prompt[:BLOCK]
