"""Prompts of conversations: what Hugging Face makes of them, and never a hang."""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

import render_chat_templates
from mtpbatch import ChatMessage, ChatTemplateError, InvalidParameterError
from mtpbatch.chat import ChatTemplate, template

HERE = Path(__file__).parent
TEMPLATES = {path.stem: path.read_text() for path in sorted((HERE / "templates").glob("*.jinja"))}
SPECIAL_TOKENS = json.loads((HERE / "templates" / "special_tokens.json").read_text())
CONVERSATIONS = json.loads((HERE / "conversations.json").read_text())
TOOLS = json.loads((HERE / "tools.json").read_text())

USER = [{"role": "user", "content": "Hello"}]


def real(name: str) -> ChatTemplate:
    return ChatTemplate(
        TEMPLATES[name], SPECIAL_TOKENS[name], now=lambda: render_chat_templates.NOW
    )


def render(source: str, **template_args: Any) -> str:
    return ChatTemplate(source).render(USER, None, template_args)


# --------------------------------------------------------------- as with Hugging Face


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_hugging_face(name: str) -> None:
    """Character for character, and refused where it is refused there."""
    chat_template = real(name)
    expected = json.loads((HERE / "expected" / f"{name}.json").read_text())
    assert expected.keys() == CONVERSATIONS.keys()
    for title, conversation in CONVERSATIONS.items():
        ask = (
            conversation["messages"],
            TOOLS.get(conversation.get("tools")),
            conversation.get("template_args"),
        )
        wanted = expected[title]
        if title == "content in parts" and (isinstance(wanted, dict) or "One part." not in wanted):
            continue  # the template knows texts only, and drops parts or fails: see below
        if title == "content in parts" and "'type'" in wanted:
            continue  # or writes a Python list
        if isinstance(wanted, dict):
            with pytest.raises(ChatTemplateError) as caught:
                chat_template.render(*ask)
            assert wanted["error"].removeprefix("TemplateError: ") in str(caught.value), title
        else:
            assert chat_template.render(*ask) == wanted, title


def test_the_table_of_real_templates_is_documented() -> None:
    readme = (HERE / "templates" / "README.md").read_text()
    assert len(TEMPLATES) >= 8
    assert TEMPLATES.keys() == SPECIAL_TOKENS.keys()
    assert all(f"| {name} |" in readme for name in TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_joined_for_templates_that_know_texts_only(name: str) -> None:
    texts = ["One part.", "Another."]
    parts = [{"type": "text", "text": text} for text in texts]
    prompt = real(name).render([{"role": "user", "content": parts}])
    assert prompt.index(texts[0]) < prompt.index(texts[1])
    assert "'type'" not in prompt


def test_messages_may_be_structs() -> None:
    for conversation in CONVERSATIONS.values():
        messages = conversation["messages"]
        if any("reasoning" in message for message in messages):
            continue  # a name for it that only dicts may use
        tools = TOOLS.get(conversation.get("tools"))
        structs = [as_struct(message) for message in messages]
        try:
            wanted = real("smollm3").render(messages, tools)
        except ChatTemplateError:
            continue
        assert real("smollm3").render(structs, tools) == wanted


def as_struct(message: dict[str, Any]) -> ChatMessage:
    return msgspec.convert(message, ChatMessage)


def test_what_the_caller_gave_is_not_changed() -> None:
    conversation = CONVERSATIONS["two tools were called at once"]
    messages, tools = copy.deepcopy(conversation["messages"]), copy.deepcopy(TOOLS["weather"])
    real("qwen3").render(messages, tools)
    assert (messages, tools) == (conversation["messages"], TOOLS["weather"])


def test_arguments_of_calls_may_be_json_text() -> None:
    """As the OpenAI API has them; templates that expect dicts get dicts."""
    conversation = CONVERSATIONS["a tool was called"]
    messages = copy.deepcopy(conversation["messages"])
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    for name in ("qwen3.5", "qwen3", "smollm3"):
        assert real(name).render(messages, TOOLS["weather"]) == real(name).render(
            conversation["messages"], TOOLS["weather"]
        )


def test_templates_get_special_tokens_and_arguments() -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ mood }}|{{ documents[0].title }}"
    chat_template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    ask = {"mood": "calm", "documents": [{"title": "A"}]}
    assert chat_template.render(USER, None, ask) == "<s>|</s>|calm|A"
    assert chat_template.render(USER, None, {"bos_token": "", **ask}) == "|</s>|calm|A"


def test_a_model_can_have_another_template_for_tools() -> None:
    chat_template = ChatTemplate("plain", tool_source="with {{ tools | length }}")
    assert chat_template.render(USER) == chat_template.render(USER, []) == "plain"
    assert chat_template.render(USER, TOOLS["weather"]) == "with 1"


def test_the_tag_for_training_changes_nothing() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(source) == "Hello"


def test_the_date_is_todays() -> None:
    today = datetime.now()
    text = render("{{ strftime_now('%Y-%m-%d') }}")
    assert text in {today.strftime("%Y-%m-%d"), datetime.now().strftime("%Y-%m-%d")}


# ------------------------------------------------------------------------------ errors


def test_what_the_template_itself_says_is_passed_on() -> None:
    with pytest.raises(ChatTemplateError, match=r"refuses the conversation: only nice words$"):
        render("{{ raise_exception('only nice words') }}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("one\n{% if %}", "cannot be read: line 2: "),
        ("{{ 1 | nofilter }}", "No filter named 'nofilter'"),
        ("(" * 3 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% for a in 'b' %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
        ("one\ntwo {{ messages.nothing.at_all }}", "failed at line 2: UndefinedError: "),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_with_a_mistake_is_a_clear_error(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(source)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_reaches_nothing_but_its_arguments(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
        "{% set n = namespace(t='x') %}{% for a in 'x'*99 %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% set n = namespace(t='x') %}{% for a in 'x'*99 %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{% set n = namespace(t=[1]) %}{% for a in 'x'*99 %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ 99999999999 * [1] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x'.center(99999999999) }}",
        "{{ '%099999999999d' % 1 }}",
        "{% for a in range(999999999) %}{% endfor %}",
        "{{ lipsum(99999999999) }}",
    ],
)
def test_a_template_that_would_not_end_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MAX_STEPS", 100_000)  # which are sooner reached
    with pytest.raises(ChatTemplateError):
        render(source)


def test_loops_that_are_counted_still_know_where_they_are() -> None:
    source = (
        "{% for x in 'abcd' if x != 'c' %}{{ loop.index }}/{{ loop.length }}{{ x }}"
        "{{ loop.previtem }}{{ '.' if loop.last }}{% if x == 'b' %}{% continue %}{% endif %};"
        "{% else %}none{% endfor %}{{ 1 ~ '-' ~ none }}"
    )
    assert render(source) == "1/3a;2/3ba3/3db.;1-None"


@pytest.mark.parametrize(
    ("template_args", "words"),
    [
        ({"messages": []}, "messages has a parameter of its own"),
        ({"tools": []}, "tools has a parameter of its own"),
        ({"thing": object()}, "thing cannot be given to a template"),
        ([1], "must be a dict, got list"),
    ],
)
def test_a_bad_template_argument_is_a_clear_error(template_args: Any, words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words) as caught:
        ChatTemplate("x").render(USER, None, template_args)
    assert caught.value.parameter == "template_args"
