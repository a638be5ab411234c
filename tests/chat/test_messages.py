"""Bad messages and tools are refused with words that say which, and what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from mtpbatch import ChatMessage, InvalidParameterError
from mtpbatch.chat.messages import plain_messages, plain_tools

CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "must be a list of messages, got str"),
        ({"role": "user", "content": "Hello"}, "must be a list of messages, got dict"),
        (None, "must be a list of messages, got NoneType"),
        ([], "is empty"),
        (["Hello"], "message 0 must be a dict, got str"),
        ([{"content": "Hello"}], "message 0: role must be one of system, developer, user"),
        ([{"role": "usr", "content": "x"}], "got 'usr'"),
        ([{"role": ["user"], "content": "x"}], r"got \['user'\]"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 5}], "content: must be str | array | null, got int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]: .*object, got str"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"message 0 \(user\): ",
        ),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "only text parts"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only an assistant has"),
        ([{"role": "assistant", "tool_calls": {}}], "tool_calls: must be array"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]: .*`?function`?"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1, "arguments": {}}}]}],
            r"tool_calls\[0\].function.name: must be str, got int",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"tool_calls\[0\].function.arguments is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}],
            r"tool_calls\[0\].function.arguments: must be object, got int",
        ),
        ([{"role": "user", "content": "x", "extra": object()}], "message 0: .*object"),
        ([{"role": "user", "content": "\ud800"}], "content is not valid Unicode"),
        (
            [{"role": "user", "content": "x"}, {"role": "tool", "content": 1}],
            r"message 1 \(tool\)",
        ),
    ],
)
def test_a_bad_message_is_named(messages: Any, words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words) as caught:
        plain_messages(messages)
    assert caught.value.parameter == "messages"


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({}, "must be a list of tools, got dict"),
        ([print], "tool 0: "),
        ([{"name": "f"}], "tool 0: missing required field function; a tool is "),
        ([{"type": "function", "function": {"name": 1}}], "function.name: must be str, got int"),
        ([{"type": "web", "function": {"name": "f"}}], "type: Invalid"),
        ([{"function": {"name": "f", "parameters": []}}], "function.parameters: must be object"),
    ],
)
def test_a_bad_tool_is_named(tools: Any, words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words) as caught:
        plain_tools(tools)
    assert caught.value.parameter == "tools"


def test_keys_that_only_templates_know_go_through_and_empty_ones_do_not() -> None:
    message = {"role": "user", "content": "x", "weight": [1], "name": None}
    assert plain_messages([message]) == [{"role": "user", "content": "x", "weight": [1]}]


def test_reasoning_goes_by_every_name_that_templates_know() -> None:
    for name in ("reasoning_content", "thinking", "reasoning"):
        [plain] = plain_messages([{"role": "assistant", "content": "4", name: "2 and 2"}])
        assert plain["thinking"] == plain["reasoning_content"] == "2 and 2"


def test_a_message_as_a_struct_is_the_same_as_a_dict() -> None:
    assert plain_messages([ChatMessage(role="user", content="Hello")]) == [
        {"role": "user", "content": "Hello"}
    ]
