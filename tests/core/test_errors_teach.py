"""Every parameter with bad values: the error names it, the value, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, get_args

import msgspec
import pytest
from msgspec import Struct, inspect

from mtpbatch import EngineConfig, InvalidParameterError, SamplingParams
from mtpbatch.types import KvType, parse

STRUCTS: list[type[Struct]] = [EngineConfig, SamplingParams]

# What tells of the values that would be right.
RANGE = re.compile(
    r"(?:whole|finite) number (>=?|<=?) -?\d|one of bf16, f16, f32|\"auto\" or|True or False"
    r"|be a text|a list, each item|one of reject, wait|one of none, process|a dict, each key"
)


def bad_values(kind: inspect.Type) -> Iterator[Any]:
    """One of another type, and one past each bound."""
    if isinstance(kind, inspect.AnyType):
        return  # a schema's type is no matter of types: tests/structured
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    yield object
    if not any(isinstance(member, inspect.StrType) for member in members):
        yield "seventeen"
    for member in members:
        if isinstance(member, inspect.IntType | inspect.FloatType):
            step = 1 if isinstance(member, inspect.IntType) else 0.5
            yield from (bound - step for bound in (member.ge,) if bound is not None)
            yield from (bound + step for bound in (member.le,) if bound is not None)
            yield from (bound for bound in (member.gt, member.lt) if bound is not None)
            yield True
        if isinstance(member, inspect.IntType):
            yield 1.5
        if isinstance(member, inspect.FloatType):
            yield from (float("nan"), float("inf"), float("-inf"))
        if isinstance(member, inspect.VarTupleType):
            yield from ((wrong,) for wrong in bad_values(member.item_type))
        if isinstance(member, inspect.DictType):
            others = islice(bad_values(member.value_type), 1)  # of another type
            yield from ({"a": wrong} for wrong in others)
        if isinstance(member, inspect.StrType) and member.min_length:
            yield ""


TEXTS = ("stop", "bad_words", "dry_sequence_breakers")  # a text alone is a list of one
CASES = [
    (kind, field.name, value)
    for kind in STRUCTS
    for field in msgspec.structs.fields(kind)
    for value in bad_values(inspect.type_info(field.type))
    if (field.name, value) not in [(name, "seventeen") for name in TEXTS]
]


def test_every_field_is_walked() -> None:
    walked = {(kind, name) for kind, name, _ in CASES}
    fields = {(k, f.name) for k in STRUCTS for f in msgspec.structs.fields(k)}
    assert walked == fields - {(SamplingParams, "json_schema")}


@pytest.mark.parametrize(
    ("kind", "name", "value"), CASES, ids=[f"{name}={value!r}" for _, name, value in CASES]
)
def test_an_error_names_parameter_value_and_range(
    kind: type[Struct], name: str, value: Any
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse(kind, {name: value})
    assert caught.value.parameter == name
    text = str(caught.value)
    assert text.startswith(f"{name}: ")
    assert text.endswith(f"got {value!r}")
    assert RANGE.search(text), text


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (EngineConfig, {"n_seq": 0}, "n_seq: must be a whole number >= 1 and <= 256, got 0"),
        (
            EngineConfig,
            {"kv_type": "f17"},
            f"kv_type: must be one of {', '.join(sorted(get_args(KvType)))}, got 'f17'",
        ),
        (
            SamplingParams,
            {"speculation": -1},
            'speculation: must be "auto" or a whole number >= 0 and <= 32 or None, got -1',
        ),
        (
            SamplingParams,
            {"top_p": 0},
            "top_p: must be a finite number > 0 and <= 1, got 0",
        ),
        (
            SamplingParams,
            {"temperature": float("inf")},
            "temperature: must be a finite number >= 0, got inf",
        ),
        (
            SamplingParams,
            {"stop": ["a", ""]},
            "stop: must be a list, each item a text that is not empty, got ['a', '']",
        ),
        (
            SamplingParams,
            {"stop": "\ud800"},
            "stop: is not valid Unicode: '\\ud800' has a lone surrogate; take it out",
        ),
        (
            SamplingParams,
            {"max_token": 3},
            "max_token: unknown parameter; did you mean max_tokens?",
        ),
        (
            EngineConfig,
            {"lora": "adapter.gguf"},
            "lora: must be a dict, each key a text, each value a finite number, got 'adapter.gguf'",
        ),
        (
            EngineConfig,
            {"lora": {"adapter.gguf": float("inf")}},
            "lora: the scale of adapter.gguf must be a finite number, got inf",
        ),
        (
            EngineConfig,
            {"speculation": 4},
            "speculation: 4 is deeper than n_draft_max=3; raise n_draft_max when opening the "
            "engine, or lower speculation",
        ),
        (
            EngineConfig,
            {"n_ctx": 100, "n_cells": 50},
            "n_cells: must be at least n_ctx=100, got 50: give more cells, or lower n_ctx",
        ),
    ],
)
def test_what_errors_say(kind: type[Struct], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse(kind, values)
    assert str(caught.value) == message


def test_a_long_value_is_cut() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse(SamplingParams, {"temperature": "x" * 10**6})
    assert len(str(caught.value)) < 250
