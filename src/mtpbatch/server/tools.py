"""Calls that a client insists on: ``tool_choice`` that leaves the model no choice but of which.

The answer then keeps to a schema: the arguments of the function, or, where there are several to
choose from, ``{"name": …, "arguments": …}``. Where the model is free to call or not, it writes
calls as its template has them, and ``mtpbatch.chat.answer`` finds these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from mtpbatch.chat import ChatDelta, FunctionCall, ToolCall
from mtpbatch.chat.messages import plain_tools
from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.server.protocol import ChatRequest, NamedTool

_DEFINITIONS: Final = ("$defs", "definitions")  # what references in a schema lead to
_LAYOUT: Final = {
    # As models write calls: with room for white space, they may ramble in it.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class ForcedCall:
    """A call that has to come: of the one function, or of one of several."""

    def __init__(self, functions: Sequence[dict[str, Any]]) -> None:
        self._only = functions[0]["name"] if len(functions) == 1 else None
        schema = _arguments(functions[0]) if self._only else _any_of(functions)
        self.schema = {"x-guidance": _LAYOUT, **schema}

    def read(self, text: str, call_id: str) -> ChatDelta:
        """An answer as the call that it is; as content, if it was cut off."""
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            return ChatDelta(content=text)
        name = self._only or value["name"]
        arguments = value if self._only else value["arguments"]
        return ChatDelta(tool_calls=(ToolCall(function=FunctionCall(name, arguments), id=call_id),))


def forced_call(asked: ChatRequest) -> ForcedCall | None:
    """The call that a request insists on, if it does."""
    choice = asked.tool_choice
    if choice in (None, "none", "auto"):
        return None
    functions = [tool["function"] for tool in plain_tools(asked.tools) or ()]
    if not functions:
        raise InvalidParameterError("tool_choice", "needs tools; give some, or leave it out")
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        names = ", ".join(function["name"] for function in functions)
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            raise InvalidParameterError(
                "tool_choice", f"names {wanted!r}, which is not among the tools: {names}"
            )
    return ForcedCall(functions)


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(function.get("parameters") or {})}


def _any_of(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A schema of a call of one of these. What they refer to moves to where references look."""
    shared: dict[str, dict[str, Any]] = {}
    calls = []
    for function in functions:
        arguments = _arguments(function)
        for place in _DEFINITIONS:
            definitions = arguments.pop(place, {})
            if not isinstance(definitions, dict):
                raise InvalidParameterError(
                    "tools",
                    f"{place} of {function['name']!r} must be an object, "
                    f"got a {type(definitions).__name__}",
                )
            for name, definition in definitions.items():
                known = shared.setdefault(place, {}).setdefault(name, definition)
                if known != definition:
                    raise InvalidParameterError(
                        "tools", f"two of them define {name!r} in {place} differently; rename one"
                    )
        properties = {"name": {"const": function["name"]}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, **shared}
