"""Answers are taken apart the same way in whatever pieces they come, and nothing gets lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpbatch.chat import AnswerFormat, AnswerParser
from mtpbatch.chat.messages import FunctionCall

SCHEMAS = {
    "weather": {
        "function": {
            "name": "weather",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "number"},
                    "hourly": {"type": "boolean"},
                    "wind": {"type": "array"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "id": {"type": ["integer", "string"]},
                }
            },
        }
    }
}
ALL = AnswerFormat(thinks=True, calls=True, schemas=SCHEMAS)
CALLS = AnswerFormat(calls=True, schemas=SCHEMAS)

Taken = tuple[str, str, list[FunctionCall]]


def take(format: AnswerFormat, *pieces: str) -> Taken:
    """Reasoning, content and calls of an answer that comes in these pieces."""
    parser = AnswerParser(format, "req-1")
    parts = [*(parser.feed(piece) for piece in pieces), parser.flush()]
    return (
        "".join(part.reasoning_content for part in parts),
        "".join(part.content for part in parts),
        [call.function for part in parts for call in part.tool_calls],
    )


# ------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("format", "text", "reasoning", "content"),
    [
        (ALL, "<think>\nhm\n\nso\n</think>\n\nYes. ", "hm\n\nso", "Yes. "),
        (ALL, " \n<think>hm</think>Yes", "hm", "Yes"),
        (ALL, "<think>\n\n</think>\n\nYes", "", "Yes"),
        (ALL, "<think>hm, and then the lim", "hm, and then the lim", ""),
        (ALL, "<think>a </thin", "a </thin", ""),
        (ALL, "Yes <think>no</think>", "", "Yes <think>no</think>"),
        (ALL, "  Yes", "", "  Yes"),
        (ALL, "<thi", "", "<thi"),
        (ALL, "", "", ""),
        (AnswerFormat(), "<think>x</think>Yes", "", "<think>x</think>Yes"),
        (AnswerFormat(thinks=True, opened=True), "\nhm\n</think>\n\nYes", "hm", "Yes"),
        (AnswerFormat(thinks=True, opened=True), "hm", "hm", ""),
        # A call that is thought of is not made.
        (ALL, "<think><tool_call>{}</tool_call></think>", "<tool_call>{}</tool_call>", ""),
    ],
)
def test_reasoning_is_split_out(
    format: AnswerFormat, text: str, reasoning: str, content: str
) -> None:
    assert take(format, text) == (reasoning, content, [])


@pytest.mark.parametrize(
    ("source", "prompt", "thinks", "opened", "calls"),
    [
        ("", "user: <think>", False, True, False),
        ("…</think>…<tool_call>…", "<|im_start|>assistant\n<think>\n", True, True, True),
        ("…</think>…", "<|im_start|>assistant\n<think>\n\n</think>\n\n", True, False, False),
        ("…</think>…", "<|im_start|>assistant\n", True, False, False),
    ],
)
def test_the_template_and_the_prompt_say_what_to_look_for(
    source: str, prompt: str, thinks: bool, opened: bool, calls: bool
) -> None:
    assert AnswerFormat.of(source, prompt, SCHEMAS) == AnswerFormat(
        thinks=thinks, opened=opened, calls=calls, schemas=SCHEMAS
    )
    assert not AnswerFormat.of(source, prompt, {}).calls, "without tools there are no calls"


# ---------------------------------------------------------------------------- calls


def one_call(text: str) -> FunctionCall:
    reasoning, content, [call] = take(CALLS, f"<tool_call>\n{text}\n</tool_call>")
    assert (reasoning, content) == ("", "")
    return call


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": [1, {"b": null}], "c": "é\\n"}}', None),
        ('{"arguments": {}, "name": "f"}', {}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}', None),
        ('{"name": "f", "arguments": {"a": "</tool_call>"}}', None),
        ('{"name": "f", "arguments": {"a": "two\nlines"}}', {"a": "two\nlines"}),
    ],
)
def test_a_call_in_json(body: str, arguments: dict[str, Any] | None) -> None:
    if arguments is None:
        arguments = json.loads(body)["arguments"]
    assert one_call(body) == FunctionCall("f", arguments)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "Zürich", "Zürich"),
        ("city", "42", "42"),
        ("city", "\n two\n\nlines \n", "\n two\n\nlines \n"),
        ("city", "</tool_call> & <b>", "</tool_call> & <b>"),
        ("city", "", ""),
        ("days", "3", 3),
        ("days", "3.5", "3.5"),
        ("days", "three", "three"),
        ("exact", "3.5", 3.5),
        ("exact", "3", 3),
        ("exact", "NaN", "NaN"),
        ("hourly", "true", True),
        ("hourly", "False", False),
        ("wind", '["speed", {"a": 1}]', ["speed", {"a": 1}]),
        ("wind", "[1", "[1"),
        ("note", "null", None),
        ("note", "42", "42"),
        ("id", "42", 42),
        ("id", "A42", "A42"),
        ("unknown", "42", "42"),
    ],
)
def test_a_parameter_is_what_its_schema_says(key: str, text: str, value: Any) -> None:
    body = f"<function=weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    assert one_call(body) == FunctionCall("weather", {key: value})


def test_a_function_that_is_not_in_the_tools_is_called_all_the_same() -> None:
    """The app decides; all of its parameters are texts."""
    assert one_call("<function=f><parameter=a>1</parameter></function>") == FunctionCall(
        "f", {"a": "1"}
    )
    assert one_call("<function=f>\n</function>") == FunctionCall("f", {})


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "{'name': 'f'}",
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no json"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "", "arguments": {}}',
        '{"name": 5}',
        '{"arguments": {}}',
        '{"name": "f"} and more',
        "[1]",
        '"f"',
        "{" * 5000,
        '{"a":' * 5000,
        '{"name": "f", "arguments": {"a": ' + "1" * 5000 + "}}",
        "<function=f>",
        "<function=>\n</function>",
        "<function=f>\nwords\n</function>",
        "<function=f>\n<parameter=a>1</function>",
        "f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>",
    ],
)
def test_a_call_that_cannot_be_read_stays_text(body: str) -> None:
    text = f"Look: <tool_call>{body}</tool_call> done"
    assert take(CALLS, text) == ("", text, [])


def test_what_follows_a_broken_call_is_read() -> None:
    text = '<tool_call>{oops <tool_call>{"name": "f"}</tool_call>'
    assert take(CALLS, text) == ("", "<tool_call>{oops", [FunctionCall("f", {})])


def test_a_call_whose_end_tag_is_missing_counts_if_it_is_whole() -> None:
    assert take(CALLS, 'Now.\n<tool_call>\n{"name": "f"}\n') == (
        "",
        "Now.",
        [FunctionCall("f", {})],
    )
    assert take(CALLS, '<tool_call>\n{"name": "f", ') == ("", '<tool_call>\n{"name": "f", ', [])


def test_text_around_calls_is_content() -> None:
    text = (
        'One.\n\n<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>\nTwo.\n'
    )
    assert take(CALLS, text) == ("", "One.Two.\n", [FunctionCall("f", {}), FunctionCall("g", {})])


def test_calls_have_ids_of_their_own() -> None:
    parser = AnswerParser(CALLS, "req-7")
    delta = parser.feed('<tool_call>{"name": "f"}</tool_call>' * 2)
    assert [call.id for call in delta.tool_calls] == ["req-7-call-0", "req-7-call-1"]


# --------------------------------------------------------------------------- streams


def test_text_is_given_out_as_soon_as_it_can_be_no_markup() -> None:
    parser = AnswerParser(ALL, "req-1")
    given = []
    for piece in ("<thi", "nk>\nso ", "then</th", "e</think", ">\n", "Yes", " <tool", "ing> <"):
        delta = parser.feed(piece)
        given.append((delta.reasoning_content, delta.content))
    assert given == [
        ("", ""),
        ("so", ""),
        (" then", ""),
        ("</the", ""),
        ("", ""),
        ("", "Yes"),
        ("", ""),
        ("", " <tooling>"),
    ]
    assert parser.flush().content == " <"


FRAGMENTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<function=weather>",
            "</function>",
        ),
        *(
            "<parameter=days>",
            "</parameter>",
            '{"name": "f", "arguments": {"a": "',
            '"}}',
            "}",
            '"',
        ),
        *('{"name": "f"}', "3", "\n", " ", "é", "x", "<", ">", "</", "\\"),
    ]
)
FORMATS = st.builds(
    AnswerFormat,
    thinks=st.booleans(),
    opened=st.booleans(),
    calls=st.booleans(),
    schemas=st.just(SCHEMAS),
)


@given(FORMATS, st.lists(FRAGMENTS, max_size=25).map("".join), st.data())
def test_how_an_answer_is_cut_into_pieces_makes_no_difference(
    format: AnswerFormat, text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=30)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert take(format, *pieces) == take(format, text) == take(format, *text)


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
TOLD = WORDS.map(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text('ab<>/"\\\n é', max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TOLD, inner, max_size=3),
    max_leaves=8,
)
FUNCTIONS = st.builds(FunctionCall, TOLD.filter(bool), st.dictionaries(WORDS, JSON, max_size=3))


@given(TOLD, TOLD, st.lists(FUNCTIONS, max_size=3))
def test_what_was_written_is_what_is_read(
    reasoning: str, content: str, functions: list[FunctionCall]
) -> None:
    """The answer is put together as Qwen's template writes it, and taken apart again."""
    calls = [
        json.dumps({"name": f.name, "arguments": f.arguments}, ensure_ascii=False)
        for f in functions
    ]
    text = f"<think>\n{reasoning}\n</think>\n\n{content}"
    text += "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
    assert take(ALL, text) == (reasoning, content, functions)


@given(FORMATS.filter(lambda f: not f.thinks and not f.opened), st.lists(FRAGMENTS, max_size=25))
def test_without_calls_all_of_the_text_is_kept(format: AnswerFormat, fragments: list[str]) -> None:
    text = "".join(fragments)
    _, content, calls = take(format, text)
    if not calls:
        assert content == text
    if not format.calls:
        assert not calls
