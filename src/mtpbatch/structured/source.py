"""What a request asks of the form of its answer."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.in_words import shown
from mtpbatch.types import GrammarSource, SamplingParams

_MOST_CHARS: Final = 1_000_000


def grammar_source(params: SamplingParams) -> GrammarSource | None:
    """What an answer must be like; ``None`` if it may be anything.

    Raises :class:`InvalidParameterError` for what is no schema at all; whether a grammar can be
    made of the rest shows when it is compiled.
    """
    source: GrammarSource | None = None
    if params.json_schema is not None:
        source = GrammarSource("json_schema", _schema_text(params.json_schema))
    elif params.regex is not None:
        source = GrammarSource("regex", params.regex)
    elif params.choice:
        source = GrammarSource("choice", json.dumps(params.choice))
    elif params.grammar is not None:
        source = GrammarSource("grammar", params.grammar)
    if source is None:
        return None
    if len(source.text) > _MOST_CHARS:
        raise InvalidParameterError(
            source.parameter, f"has {len(source.text)} characters; at most {_MOST_CHARS} can be"
        )
    if "\0" in source.text:
        raise InvalidParameterError(source.parameter, "holds a NUL character; write it as \\x00")
    return source


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    try:
        if not isinstance(schema, dict):
            schema = (
                schema.model_json_schema()  # pydantic's
                if hasattr(schema, "model_json_schema")
                else msgspec.json.schema(schema)
            )
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(
            "json_schema",
            f"must be a JSON schema as a dict or as text, or a type that msgspec or pydantic can "
            f"make one of ({error}), got {shown(schema)}",
        ) from None
