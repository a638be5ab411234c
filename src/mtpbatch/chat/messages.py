"""The messages of a conversation, and their validation: once, before a template sees them.

Templates read messages as plain dicts. :func:`plain_messages` and :func:`plain_tools` give them
these, checked, and otherwise as the caller wrote them: keys that only some templates know go
through, as they do in Hugging Face's ``apply_chat_template``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import Completion, FinishReason

Role = Literal["system", "developer", "user", "assistant", "tool"]
Plain: TypeAlias = dict[str, Any]

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # as different templates call it


class TextPart(Struct, frozen=True):
    """A part of a message's content.

    ::

        mtpbatch.ChatMessage(role="user", content=(mtpbatch.TextPart(text="Hello"),))
    """

    text: str
    """Unicode, as the template is to have it."""
    type: Literal["text"] = "text"
    """Other kinds of parts, such as images, are refused."""


class FunctionCall(Struct, frozen=True):
    """Which function, with what.

    ::

        answer = await engine.chat(messages, max_tokens=20)
        for call in answer.tool_calls:
            print(call.function.name, call.function.arguments)
    """

    name: str
    """One of the functions that the request offered, if the model keeps to them."""
    arguments: dict[str, Any]
    """By name, as the model wrote them: nothing has checked them against the schema."""


class ToolCall(Struct, frozen=True, kw_only=True):
    """A function that the model wants to be called.

    ::

        add = mtpbatch.FunctionCall(name="add", arguments={"a": 6, "b": 7})
        call = mtpbatch.ToolCall(function=add, id="call-1")
        messages.append(mtpbatch.ChatMessage(role="assistant", tool_calls=(call,)))
    """

    function: FunctionCall
    """What is to be called."""
    id: str | None = None
    """Names the call for the ``tool`` message that answers it."""
    type: Literal["function"] = "function"
    """There are no others."""


class ChatMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation. A dict with the same keys does as well.

    ::

        messages = [
            mtpbatch.ChatMessage(role="system", content="Be brief."),
            mtpbatch.ChatMessage(role="user", content="How much is 6 times 7?"),
        ]
        answer = await engine.chat(messages, max_tokens=20)
    """

    role: Role
    """Who says it: "system", "developer", "user", "assistant" or "tool"."""
    content: str | tuple[TextPart, ...] | None = None
    """Only an assistant's message may be without."""
    reasoning_content: str | None = None
    """What an assistant thought first. Most templates leave out that of earlier turns."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """An assistant's. Arguments may be given as JSON text as well."""
    tool_call_id: str | None = None
    """Of a ``tool`` message: which call it answers."""
    name: str | None = None
    """Of a ``tool`` message: which function it comes from."""


class ChatDelta(Struct, frozen=True, kw_only=True):
    """What a step added to an answer; all of it may be empty, but not in the last one.

    ::

        async with engine.stream_chat(messages, max_tokens=20) as deltas:
            async for delta in deltas:
                print(delta.content, end="")
    """

    content: str = ""
    """Text of the answer; whole characters."""
    reasoning_content: str = ""
    """Text of what the model thinks first."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that have become complete."""
    finish_reason: FinishReason | None = None
    """How the request ended; None while more is to come."""


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """An answer, taken apart.

    ::

        answer = await engine.chat(messages, max_tokens=20)
        print(answer.content, answer.completion.usage.completion_tokens)
        messages.append(answer.message)
    """

    content: str
    """The answer's text, without reasoning and tool calls."""
    reasoning_content: str | None
    """What the model thought first; None if it did not, or if the template does not mark it."""
    tool_calls: tuple[ToolCall, ...]
    """In the order in which the model wrote them; empty if it wants none."""
    completion: Completion
    """The request's figures, and the text with all of its markup."""

    @property
    def message(self) -> ChatMessage:
        """The answer as the next message of the conversation."""
        return ChatMessage(
            role="assistant",
            content=self.content,
            reasoning_content=self.reasoning_content,
            tool_calls=self.tool_calls or None,
        )

    @property
    def finish_reason(self) -> FinishReason:
        """How the request ended; "stop" also where the model wants tools to be called."""
        return self.completion.finish_reason


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(Struct):
    function: _Function
    type: Literal["function"] = "function"


def plain_messages(messages: object) -> list[Plain]:
    """The messages as templates want them.

    Of each message, keys whose value is None are left out. Arguments of tool calls become dicts.
    Reasoning is there under both names that templates know.

    Raises :class:`InvalidParameterError`, which says what is wrong with which message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        kind = type(messages).__name__
        raise InvalidParameterError(
            "messages",
            f"must be a list of messages, got {kind}; a message is a dict with role and content",
        )
    if not messages:
        raise InvalidParameterError("messages", "is empty; a conversation has at least one message")
    return [_plain_message(f"message {index}", message) for index, message in enumerate(messages)]


def plain_tools(tools: object) -> list[Plain] | None:
    """The tools as templates want them; None if there are none."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        kind = type(tools).__name__
        raise InvalidParameterError(
            "tools", f"must be a list of tools, got {kind}; for none leave it out"
        )
    plain = []
    for index, tool in enumerate(tools):
        try:
            value = plain_value(tool)
            msgspec.convert(value, _Tool)
        except (TypeError, msgspec.ValidationError, UnicodeEncodeError) as error:
            raise InvalidParameterError(
                "tools",
                f"tool {index}: {_words(error)}; a tool is "
                '{"type": "function", "function": {"name": …, "description": …, "parameters": …}}',
            ) from None
        plain.append(value)
    return plain or None


def plain_value(value: object) -> Any:
    """``value`` in dicts, lists, texts, numbers, booleans and None; TypeError if that cannot be."""
    return msgspec.to_builtins(value, builtin_types=(), str_keys=True)


def _plain_message(which: str, message: object) -> Plain:
    if not isinstance(message, dict | Struct):
        kind = type(message).__name__
        raise InvalidParameterError("messages", f"{which} must be a dict, got {kind}")
    try:
        plain = plain_value(message)
    except TypeError as error:
        raise InvalidParameterError("messages", f"{which}: {error}") from None
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in plain.items()
        if value is not None
    }
    role = plain.get("role")
    if role not in get_args(Role):
        raise InvalidParameterError(
            "messages", f"{which}: role must be one of {', '.join(get_args(Role))}, got {role!r}"
        )
    which = f"{which} ({role})"
    if "content" not in plain and role != "assistant":
        raise InvalidParameterError(
            "messages", f"{which} has no content; give it a text, if an empty one"
        )
    if "tool_calls" in plain:
        if role != "assistant":
            raise InvalidParameterError(
                "messages", f"{which}: only an assistant has tool_calls; take them out"
            )
        plain["tool_calls"] = _plain_calls(which, plain["tool_calls"])
    reasoning = [plain[key] for key in _REASONING_KEYS if key in plain]
    if reasoning:
        plain = {"thinking": reasoning[0], **plain, "reasoning_content": reasoning[0]}
    _check_unicode(which, plain)
    try:
        msgspec.convert(plain, ChatMessage)
    except msgspec.ValidationError as error:
        raise InvalidParameterError("messages", f"{which}: {_words(error)}") from None
    return plain


def _plain_calls(which: str, calls: object) -> object:
    """Arguments that are JSON text become what the text stands for."""
    if not isinstance(calls, list):
        return calls  # the message's validation says what it should be
    plain = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise InvalidParameterError(
                    "messages",
                    f"{which}: tool_calls[{index}].function.arguments is not JSON: {error}",
                ) from None
            call = {**call, "function": {**function, "arguments": arguments}}
        plain.append(call)
    return plain


def _check_unicode(where: str, value: object) -> None:
    """Half a character is refused here: neither JSON nor a tokenizer could take it."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidParameterError(
                    "messages", f"{where} is not valid Unicode: {error}"
                ) from None
        case dict():
            for key, item in value.items():
                _check_unicode(f"{where}: a key", key)
                _check_unicode(f"{where}: {key}", item)
        case list():
            for index, item in enumerate(value):
                _check_unicode(f"{where}[{index}]", item)


def _words(error: Exception) -> str:
    """msgspec's words, with the place first."""
    reason, _, place = str(error).partition(" - at `$.")
    reason = reason.replace("`", "").replace("Expected ", "must be ").replace("Object ", "")
    place = place.rstrip("`")
    if place.startswith("content[") and "Invalid" in reason:
        reason = "only text parts are possible: " + reason
    return f"{place}: {reason}" if place else reason
