"""What requests may ask of the form of their answers."""

from __future__ import annotations

import json
from importlib import metadata, util
from typing import Any

import msgspec
import pydantic
import pytest

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.structured.library import VERSION, require_llguidance
from mtpbatch.structured.source import grammar_source
from mtpbatch.types import GrammarSource, SamplingParams, parse

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}


class Person(msgspec.Struct):
    name: str
    age: int


class Pet(pydantic.BaseModel):
    name: str
    legs: int


def source(**params: Any) -> GrammarSource | None:
    return grammar_source(parse(SamplingParams, params))


def test_nothing_is_asked_for_by_default() -> None:
    assert source() is None


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (SCHEMA, SCHEMA),
        (json.dumps(SCHEMA), SCHEMA),
        (Person, msgspec.json.schema(Person)),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (Pet, Pet.model_json_schema()),
    ],
    ids=["dict", "text", "msgspec", "any type", "pydantic"],
)
def test_schemas_come_in_several_kinds(value: Any, schema: Any) -> None:
    asked = source(json_schema=value)
    assert asked is not None
    assert asked.parameter == "json_schema"
    assert json.loads(asked.text) == schema
    assert list(json.loads(asked.text)) == list(schema)  # the order of properties matters


def test_other_forms_are_taken_as_they_are() -> None:
    assert source(regex="a+") == GrammarSource("regex", "a+")
    assert source(grammar="start: /a/") == GrammarSource("grammar", "start: /a/")
    choices = source(choice=["yes", "né"])
    assert choices is not None
    assert json.loads(choices.text) == ["yes", "né"]


@pytest.mark.parametrize("value", [5, True, object, [1], lambda: None, {"a": object()}])
def test_what_is_no_schema_is_refused(value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=r"(?s)^json_schema: must be .*, got "):
        source(json_schema=value)


def test_a_schema_that_is_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(InvalidParameterError, match="json_schema: must be"):
        source(json_schema=schema)


def test_texts_without_end_are_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"regex: has 1000001 characters; at most"):
        source(regex="a" * 1_000_001)


def test_a_nul_would_end_the_text_in_c() -> None:
    with pytest.raises(InvalidParameterError, match="grammar: holds a NUL"):
        source(grammar="start: /a/\0")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "a", "choice": ["b"]}, "choice: cannot be combined with regex"),
        ({"json_schema": {}, "grammar": "x"}, "grammar: cannot be combined with json_schema"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos: cannot be combined with regex"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens: cannot be combined with regex"),
        ({"regex": 5}, "regex: must be a text or None, got 5"),
        ({"choice": "yes"}, "choice: must be a list, each item a text .*, got 'yes'"),
        ({"choice": [""]}, "choice: must be a list, each item a text that is not empty"),
    ],
)
def test_what_contradicts_itself_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        source(**params)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(
        InvalidParameterError, match=r"regex: needs .* none is installed: pip install 'mtpbatch\["
    ):
        require_llguidance("regex")


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.1")
    with pytest.raises(InvalidParameterError, match=f"needs llguidance {VERSION}, and .* 0.1 is"):
        require_llguidance("choice")


def test_the_extra_brings_that_version() -> None:
    required = metadata.requires("mtpbatch") or []
    assert any(one.startswith(f"llguidance=={VERSION}; extra") for one in required)
