"""A command line's words become the load they say, or are refused by name."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mtpbatch import InvalidParameterError
from mtpbatch.loadtest import datasets, units
from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop, Level, OpenLoop, Replay
from mtpbatch.loadtest.driver import Load
from mtpbatch.loadtest.settings import Settings
from mtpbatch.testing import Fixed, Uniform

# ---------------------------------------------------------------------------- quantities


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h", 3600), ("3", 3), (" 250 us ", 0.00025)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert units.duration("timeout", text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "0", "1 week", "1..2", "inf", "nan", "1e999"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="timeout: must be a time such as 500ms"):
        units.duration("timeout", text)


def test_ranges_are_read() -> None:
    assert units.span("rate", "4") == (4, 4)
    assert units.span("rate", "0.5..32") == (0.5, 32)
    assert units.span("rate", "32..0") == (32, 0)
    assert units.span("rate", "inf") == (math.inf, math.inf)


@pytest.mark.parametrize("text", ["", "x", "1..", "..2", "-1..2", "0", "0..0", "nan", "1..nan"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="rate: must be a number above 0"):
        units.span("rate", text)


def test_slos_are_read() -> None:
    assert units.slo("slo", "ttft=500ms, TPOT=50ms,e2e=10") == {
        "ttft": 0.5,
        "tpot": 0.05,
        "e2e": 10,
    }


@pytest.mark.parametrize("text", ["", "ttft", "itl=5ms", "ttft=fast", "ttft=1s,,"])
def test_what_is_no_slo_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="slo: must be"):
        units.slo("slo", text)


# ------------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, ClosedLoop(Level(8, 8))),
        ({"concurrency": "3"}, ClosedLoop(Level(3, 3))),
        ({"concurrency": "1..64", "duration": "60s"}, ClosedLoop(Level(1, 64, 60))),
        ({"rate": "4"}, OpenLoop(Level(4, 4), 1.0)),
        ({"rate": "4", "arrivals": "constant"}, OpenLoop(Level(4, 4), math.inf)),
        ({"rate": "1..20", "duration": "2m"}, OpenLoop(Level(1, 20, 120), 1.0)),
        ({"rate": "inf", "requests": 9}, OpenLoop(Level(math.inf, math.inf), 1.0)),
        (
            {"rate": "4", "arrivals": "gamma", "burstiness": 0.5},
            OpenLoop(Level(4, 4), 0.5),
        ),
        (
            {"rate": "4", "arrivals": "burst", "burst_size": 16},
            OpenLoop(Level(4, 4), math.inf, 16),
        ),
    ],
)
def test_arrivals_are_as_they_were_asked_for(given: dict[str, Any], meant: Arrivals) -> None:
    assert Settings(**given).make_arrivals() == meant


def test_a_trace_gives_times_lengths_and_their_number(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 * i, "input_length": 9 + i, "output_length": 2} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = Settings(trace=str(path), token_ids="1..9")
    load = settings.make_load()
    assert load.arrivals == Replay((0, 1, 2, 3))
    assert load.n_requests == 4
    works = list(settings.make_work())
    assert [(w.prompt_tokens, w.max_tokens) for w in works] == [(9 + i, 2) for i in range(4)]


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (100, None)),
        ({"concurrency": "64"}, (640, None)),
        ({"duration": "5s"}, (None, 5.0)),
        ({"duration": "5s", "requests": 7}, (7, 5.0)),
        ({"rate": "3"}, (100, None)),
    ],
)
def test_a_load_ends_somewhere(given: dict[str, Any], limits: tuple[object, object]) -> None:
    load: Load = Settings(**given).make_load()
    assert (load.n_requests, load.seconds) == limits


# -------------------------------------------------------------------------------- datasets


def test_datasets_are_as_they_were_asked_for(tmp_path: Path) -> None:
    def dataset(**given: Any) -> object:
        return Settings(**given).make_dataset()

    assert dataset() == datasets.builtin()
    assert dataset(dataset="random") == datasets.Drawn(Fixed(128))
    ids = datasets.TokenIds(5, 2000)
    assert dataset(dataset="random", prompt_length="10..20", token_ids="5..2000") == datasets.Drawn(
        Uniform(10, 20), ids
    )
    assert dataset(
        dataset="shared-prefix", prefixes=4, prefix_length="512", prompt_length="32"
    ) == datasets.SharedPrefixes(4, Fixed(512), Fixed(32))
    path = tmp_path / "own.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    own = Settings(dataset=str(path))
    assert own.conversational
    assert not Settings(dataset=str(path), endpoint="completions").conversational
    assert Settings(endpoint="chat").conversational
    assert not Settings().conversational


def test_parameters_of_requests_are_greedy_unless_they_say_otherwise() -> None:
    assert Settings().make_params() == {"temperature": 0}
    own = Settings(params='{"temperature": 1, "top_k": 5}', ignore_eos=True)
    assert own.make_params() == {"temperature": 1, "top_k": 5, "ignore_eos": True}


def test_the_seed_settles_every_request() -> None:
    def works(seed: int) -> list[datasets.Work]:
        settings = Settings(
            dataset="random", prompt_length="5..50", output_length="1..9", cancel=0.5, seed=seed
        )
        return list(itertools.islice(settings.make_work(), 40))

    assert works(1) == works(1)
    assert works(1) != works(2)


def test_the_record_says_what_was_asked_for_and_no_secret() -> None:
    facts = Settings(rate="3", target="http://x", api_key="secret", slo="ttft=1s").facts()
    assert facts["arrivals"] == "poisson"
    assert facts["rate"] == "3"
    assert facts["dataset"] == "builtin"
    assert "secret" not in facts.values()


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rate": "3", "concurrency": "4"}, "concurrency: goes with --arrivals closed, not"),
        ({"arrivals": "closed", "rate": "3"}, "rate: goes with --arrivals constant or poisson"),
        ({"arrivals": "poisson"}, "arrivals: poisson needs --rate"),
        ({"arrivals": "gamma", "rate": "3"}, "arrivals: gamma needs --burstiness"),
        ({"rate": "3", "burstiness": 2.0}, "burstiness: goes with --arrivals gamma"),
        ({"rate": "3", "burst_size": 2}, "burst_size: goes with --arrivals burst"),
        ({"arrivals": "trace"}, "arrivals: trace needs --trace"),
        ({"trace": "nowhere.jsonl"}, "trace: cannot be read"),
        ({"concurrency": "1..8"}, "concurrency: 1..8 needs --duration"),
        ({"concurrency": "0.5"}, "concurrency: must be at least 1"),
        ({"rate": "2..inf", "duration": "9s"}, "rate: 2..inf needs"),
        ({"rate": "inf", "duration": "9s"}, "rate: inf sends all at once and needs --requests"),
        ({"requests": 0}, "requests: must be at least 1"),
        ({"cancel": 1.5}, "cancel: must be a share"),
        ({"dataset": "nowhere"}, "dataset: nowhere cannot be read"),
        ({"prompt_length": "5"}, "prompt_length: goes with --dataset random or shared-prefix"),
        ({"dataset": "random", "prefixes": 3}, "prefixes: goes with --dataset shared-prefix"),
        ({"dataset": "shared-prefix", "prefixes": 0}, "prefixes: must be at least 1"),
        ({"dataset": "random", "token_ids": "9"}, "token_ids: must be a range"),
        ({"dataset": "random", "token_ids": "9..3"}, "token_ids: must be a range"),
        ({"params": "[]"}, "params: must be JSON"),
        ({"timeout": "soon"}, "timeout: must be a time"),
        ({"slo": "fast"}, "slo: must be limits"),
        ({"output_length": "0"}, "output_length: must be a length"),
        ({"arrivals": "gamma", "rate": "3", "burstiness": -1.0}, "burstiness: must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        Settings(**given).check()
    assert str(caught.value).startswith(words)
