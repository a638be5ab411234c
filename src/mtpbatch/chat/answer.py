"""An answer taken apart: what the model thought, what it says, and the tools it wants called.

Three kinds of markup are known, and each only where the model's template uses it:

- ``<think>…</think>`` around what is thought before the answer. Some templates open it themselves,
  at the end of the prompt.
- ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as Hermes, Qwen2.5 and Qwen3 write it.
- ``<tool_call><function=…><parameter=…>…</parameter></function></tool_call>``, as Qwen3-Coder and
  Qwen3.5 write it. There values are bare texts, and the tool's schema says what they stand for.

A call that cannot be read stays in the text, as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, NoReturn, TypeAlias

from msgspec import Struct

from mtpbatch.chat.messages import ChatCompletion, ChatDelta, FunctionCall, ToolCall
from mtpbatch.types import Completion

_THINK: Final = "<think>"
_END_THINK: Final = "</think>"
_CALL: Final = "<tool_call>"
_END_CALL: Final = "</tool_call>"

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

_Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]


class AnswerFormat(Struct, frozen=True, kw_only=True):
    """What markup an answer may have."""

    thinks: bool = False
    """The answer may begin with reasoning."""
    opened: bool = False
    """The prompt ends where reasoning begins."""
    calls: bool = False
    """It may call tools."""
    schemas: _Schemas = {}
    """The tools that may be called, by name."""

    @classmethod
    def of(cls, source: str, prompt: str, schemas: _Schemas) -> AnswerFormat:
        """What a template's answers may have, of which this is a prompt with these tools."""
        return cls(
            thinks=_END_THINK in source,
            opened=prompt.rstrip().endswith(_THINK),
            calls=bool(schemas) and _CALL in source,
            schemas=schemas,
        )

    def read(self, completion: Completion) -> ChatCompletion:
        """Take a whole answer apart."""
        parser = AnswerParser(self, completion.request_id)
        parts = (parser.feed(completion.text), parser.flush())
        return ChatCompletion(
            content="".join(part.content for part in parts),
            reasoning_content="".join(part.reasoning_content for part in parts) or None,
            tool_calls=tuple(call for part in parts for call in part.tool_calls),
            completion=completion,
        )


class AnswerParser:
    """Takes an answer apart as it comes, whatever pieces it comes in.

    Text is given out as soon as it cannot be part of markup any more. White space around
    reasoning, before and after a tool call is left out.

    State: ``_pending`` is what was taken in and not given out. ``_where`` says what it begins with:
    an answer's first characters, reasoning, content, or a tool call, whose tag begins at
    ``_n_gap`` and whose end is looked for from ``_searched`` on. While ``_trims``, white space at
    its begin is left out.
    """

    def __init__(self, format: AnswerFormat, request_id: str) -> None:
        self._format = format
        self._request_id = request_id
        self._where: Literal["start", "reasoning", "content", "call"]
        self._where = "reasoning" if format.opened else "start" if format.thinks else "content"
        self._trims = format.opened
        self._pending = ""
        self._n_gap = 0
        self._searched = 0
        self._n_calls = 0

    def feed(self, text: str) -> ChatDelta:
        """Take in a piece of the answer; what can now be said of it."""
        self._pending += text
        return self._take(ended=False)

    def flush(self) -> ChatDelta:
        """The end of the answer: what was held back."""
        return self._take(ended=True)

    def _take(self, *, ended: bool) -> ChatDelta:
        reasoning: list[str] = []
        content: list[str] = []
        calls: list[ToolCall] = []
        goes_on = True
        while goes_on:
            if self._trims:
                self._pending = self._pending.lstrip()
                self._trims = not self._pending
            match self._where:
                case "start":
                    goes_on = self._take_start(ended)
                case "reasoning":
                    goes_on = self._take_reasoning(reasoning, ended)
                case "content":
                    goes_on = self._take_content(content, ended)
                case "call":
                    goes_on = self._take_call(content, calls, ended)
        return ChatDelta(
            content="".join(content),
            reasoning_content="".join(reasoning),
            tool_calls=tuple(calls),
        )

    # Each takes what it can from the front of what is pending; whether something else may follow.

    def _take_start(self, ended: bool) -> bool:
        begin = self._pending.lstrip()
        if begin.startswith(_THINK):
            self._pending = begin[len(_THINK) :]
            self._where = "reasoning"
            self._trims = True
            return True
        if _THINK.startswith(begin) and not ended:
            return False
        self._where = "content"
        return True

    def _take_reasoning(self, out: list[str], ended: bool) -> bool:
        before, tag, after = self._pending.partition(_END_THINK)
        if tag:
            out.append(before.rstrip())
            self._pending = after
            self._where = "content"
            self._trims = True
            return True
        n_settled = len(before) if ended else len(before) - _n_begun(before, _END_THINK)
        settled = before[:n_settled].rstrip()
        out.append(settled)
        self._pending = "" if ended else before[len(settled) :]
        return False

    def _take_content(self, out: list[str], ended: bool) -> bool:
        if not self._format.calls:
            out.append(self._pending)
            self._pending = ""
            return False
        before, tag, _ = self._pending.partition(_CALL)
        if ended and not tag:
            out.append(self._pending)
            self._pending = ""
            return False
        if not tag:
            before = before[: len(before) - _n_begun(before, _CALL)]
        settled = before.rstrip()
        out.append(settled)
        self._pending = self._pending[len(settled) :]
        if tag:
            self._n_gap = len(before) - len(settled)
            self._searched = self._n_gap + len(_CALL)
            self._where = "call"
        return bool(tag)

    def _take_call(self, content: list[str], calls: list[ToolCall], ended: bool) -> bool:
        body_begin = self._n_gap + len(_CALL)
        while True:
            end = self._pending.find(_END_CALL, self._searched)
            if end < 0 and not ended:
                self._searched = max(body_begin, len(self._pending) - len(_END_CALL) + 1)
                return False
            body_end = end if end >= 0 else len(self._pending)
            body = self._pending[body_begin:body_end].strip()
            function = _read_call(body, self._format.schemas)
            if function is not None:
                call_id = f"{self._request_id}-call-{self._n_calls}"
                calls.append(ToolCall(function=function, id=call_id))
                self._n_calls += 1
                self._pending = self._pending[body_end + len(_END_CALL) :]
                self._trims = True
                break
            if end < 0 or not _is_inside_a_value(body):
                content.append(self._pending[:body_begin])  # not a call after all
                self._pending = self._pending[body_begin:]
                break
            self._searched = end + len(_END_CALL)
        self._where = "content"
        return True


def _n_begun(text: str, tag: str) -> int:
    """How many characters of ``tag`` the text ends with, without all of it."""
    for n in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:n]):
            return n
    return 0


def _read_call(body: str, schemas: _Schemas) -> FunctionCall | None:
    """What the text between the tags calls; None if that cannot be known."""
    return _read_json(body) if body.startswith("{") else _read_function(body, schemas)


def _read_json(body: str) -> FunctionCall | None:
    try:
        call = _from_json(body)
        if isinstance(call.get("arguments"), str):  # some models write JSON inside JSON
            call["arguments"] = _from_json(call["arguments"])
    except (ValueError, RecursionError):
        return None
    match call:
        case {"name": str(name), "arguments": dict(arguments)} if name:
            return FunctionCall(name, arguments)
        case {"name": str(name)} if name and "arguments" not in call:
            return FunctionCall(name, {})
    return None


def _from_json(text: str) -> Any:
    """Strictly, but that a text may hold line breaks, which models forget to escape."""
    return json.loads(text, strict=False, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _read_function(body: str, schemas: _Schemas) -> FunctionCall | None:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        return None
    name, inside = function[1], function[2]
    if _PARAMETER.sub("", inside).strip():
        return None  # what is left is nothing that we know
    parameters = (schemas.get(name, {}).get("function", {}).get("parameters") or {}).get(
        "properties"
    ) or {}
    return FunctionCall(
        name,
        {key: _value(text, parameters.get(key)) for key, text in _PARAMETER.findall(inside)},
    )


def _value(text: str, schema: object) -> Any:
    """What a bare text stands for: a text, unless the schema says something that it can be."""
    kinds = _kinds(schema)
    if not kinds - {"string"}:
        return text
    words = {"True": True, "False": False, "None": None}  # as some templates write them
    try:
        value = words[text] if text in words else _from_json(text)
    except (ValueError, RecursionError):
        return text
    return value if _kind(value) in kinds else text


def _kinds(schema: object) -> set[str]:
    """The JSON types that a schema names."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
    for option in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        kinds |= _kinds(option)
    if "number" in kinds:
        kinds.add("integer")
    return kinds


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _is_inside_a_value(body: str) -> bool:
    """Whether a call that seems to end after ``body`` is in the middle of a value there."""
    if not body.startswith("{"):
        return body.rfind("<parameter=") > body.rfind("</parameter>")
    try:
        _from_json(body)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False
