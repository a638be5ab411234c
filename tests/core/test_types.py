"""Values are checked where they enter, and the error names the parameter."""

from __future__ import annotations

from typing import Any

import pytest

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import EngineConfig, EngineStats, SamplingParams, Usage, parse


@pytest.mark.parametrize(
    ("kind", "parameter", "value", "words"),
    [
        (SamplingParams, "temperature", -0.1, ">= 0"),
        (SamplingParams, "temperature", float("nan"), "got nan"),
        (SamplingParams, "temperature", float("inf"), "finite"),
        (SamplingParams, "temperature", "hot", "a finite number"),
        (SamplingParams, "top_p", 0, "> 0"),
        (SamplingParams, "top_p", 1.5, "<= 1"),
        (SamplingParams, "min_p", -1, ">= 0"),
        (SamplingParams, "top_k", -1, ">= 0"),
        (SamplingParams, "typical_p", 0, "> 0"),
        (SamplingParams, "typical_p", 1.1, "<= 1"),
        (SamplingParams, "xtc_probability", 1.1, "<= 1"),
        (SamplingParams, "xtc_threshold", 0.6, "<= 0.5"),
        (SamplingParams, "repetition_penalty", 0, ">= 0.01"),
        (SamplingParams, "repetition_penalty", float("nan"), "got nan"),
        (SamplingParams, "presence_penalty", 2.5, "<= 2"),
        (SamplingParams, "frequency_penalty", -2.5, ">= -2"),
        (SamplingParams, "dry_multiplier", -1, ">= 0"),
        (SamplingParams, "dry_multiplier", float("inf"), "finite"),
        (SamplingParams, "dry_base", 0.5, ">= 1"),
        (SamplingParams, "dry_allowed_length", 0, ">= 1"),
        (SamplingParams, "dry_penalty_last_n", -2, ">= -1"),
        (SamplingParams, "dry_sequence_breakers", ["x" * 41], "at most 40 bytes"),
        (SamplingParams, "dry_sequence_breakers", ["é" * 21], "at most 40 bytes"),
        (SamplingParams, "dry_sequence_breakers", ["a\0b"], "none of them 0"),
        (SamplingParams, "dry_sequence_breakers", "\ud800", "not valid Unicode"),
        (SamplingParams, "logit_bias", {5: 101}, "<= 100"),
        (SamplingParams, "logit_bias", {-1: 1}, ">= 0"),
        (SamplingParams, "logit_bias", {5: float("nan")}, "nan"),
        (SamplingParams, "bad_words", ["a", ""], "not empty"),
        (SamplingParams, "bad_words", "\ud800", "not valid Unicode"),
        (SamplingParams, "min_tokens", -1, ">= 0"),
        (SamplingParams, "min_tokens", 257, "at most max_tokens=256"),
        (SamplingParams, "max_tokens", 0, ">= 1"),
        (SamplingParams, "max_tokens", 1.5, "a whole number"),
        (SamplingParams, "seed", -1, ">= 0"),
        (SamplingParams, "seed", 2**32, "<= 4294967295"),
        (SamplingParams, "stop", "", "not empty"),
        (SamplingParams, "stop", ["a", ""], "not empty"),
        (SamplingParams, "stop", 3, "a list"),
        (SamplingParams, "stop", "\ud800", "not valid Unicode"),
        (SamplingParams, "stop_token_ids", [-1], ">= 0"),
        (SamplingParams, "ignore_eos", "yes", "True or False"),
        (SamplingParams, "speculation", "fast", '"auto" or a whole number'),
        (SamplingParams, "speculation", -1, ">= 0 and <= 32"),
        (SamplingParams, "speculation", True, '"auto" or a whole number'),
        (SamplingParams, "priority", 101, "<= 100"),
        (SamplingParams, "priority", -101, ">= -100"),
        (SamplingParams, "priority", 0.5, "a whole number"),
        (SamplingParams, "deadline", 0, "> 0"),
        (SamplingParams, "deadline", float("inf"), "finite"),
        (SamplingParams, "deadline", float("nan"), "got nan"),
        (SamplingParams, "logprobs", -1, ">= 0"),
        (SamplingParams, "logprobs", 21, "<= 20"),
        (SamplingParams, "logprobs", True, "a whole number"),
        (SamplingParams, "prompt_logprobs", 21, "<= 20"),
        (SamplingParams, "prompt_logprobs", 0.5, "a whole number"),
        (EngineConfig, "step_timeout", 0, "> 0"),
        (EngineConfig, "step_timeout", float("inf"), "finite"),
        (EngineConfig, "step_timeout", 30.0, 'needs isolation="process"'),
        (EngineConfig, "n_seq", 0, ">= 1"),
        (EngineConfig, "n_seq", 257, "<= 256"),
        (EngineConfig, "n_ctx", 1, ">= 2"),
        (EngineConfig, "n_draft_max", 33, "<= 32"),
        (EngineConfig, "n_batch", 0, ">= 1"),
        (EngineConfig, "n_threads", 0, ">= 1"),
        (EngineConfig, "n_gpu_layers", -2, ">= -1"),
        (EngineConfig, "kv_type", "f17", "one of bf16, f16, f32"),
        (EngineConfig, "kv_unified", 1, "True or False"),
        (EngineConfig, "speculation", 4, "deeper than n_draft_max=3"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(
    kind: type[Any], parameter: str, value: object, words: str
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse(kind, {parameter: value})
    assert caught.value.parameter == parameter
    assert str(caught.value).startswith(f"{parameter}: ")
    assert words in str(caught.value)


def test_the_right_one_of_several_values_is_named() -> None:
    with pytest.raises(InvalidParameterError, match=r"^top_p: "):
        parse(SamplingParams, {"temperature": 1.0, "top_p": 2.0, "stop": "x"})


def test_an_unknown_parameter_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(InvalidParameterError, match=r"temprature: .*did you mean temperature"):
        parse(SamplingParams, {"temprature": 1.0})
    with pytest.raises(InvalidParameterError, match=r"xyzzy: .*known: n_seq, n_ctx"):
        parse(EngineConfig, {"xyzzy": 1})


def test_good_values_are_taken() -> None:
    params = parse(SamplingParams, {"stop": "END", "temperature": 1, "stop_token_ids": [1, 2]})
    assert params == SamplingParams(stop=("END",), temperature=1.0, stop_token_ids=(1, 2))
    assert parse(SamplingParams, {"stop": ["a", "b"]}).stop == ("a", "b")
    words = parse(SamplingParams, {"bad_words": "END", "dry_sequence_breakers": "é" * 20})
    assert (words.bad_words, words.dry_sequence_breakers) == (("END",), ("é" * 20,))
    assert parse(EngineConfig, {}) == EngineConfig()


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().seed = 1  # type: ignore[misc]


def test_derived_figures() -> None:
    assert Usage(2, 3).total_tokens == 5
    stats = EngineStats(
        running=0,
        waiting=0,
        free_sequences=1,
        n_seq=1,
        mtp=True,
        finished={},
        prompt_tokens=0,
        generated_tokens=0,
        prefix_queries=0,
        prefix_hits=0,
        preemptions=0,
        kv_cells_used=50,
        n_cells=200,
        snapshot_bytes=0,
        drafted=0,
        accepted=0,
        drafted_by_depth=(),
        accepted_by_depth=(),
        draft_depth=0,
        steps=0,
        gap_time=0.0,
        draft_time=0.0,
        target_time=0.0,
        sample_time=0.0,
    )
    assert stats.kv_cache_usage == 0.25
    assert stats.acceptance is None
