"""A model's chat template: Jinja in a sandbox, with what Hugging Face gives to templates.

A template is a program that comes with a model file. The sandbox keeps it from everything but
its arguments, and it is bounded: in the steps it takes (iterations of loops, and calls), in the
texts it makes on its way, and in what it gives out. These bounds are far from what a sensible
template needs; they are for mistakes, not for a file that means harm and that llama.cpp would
have to load as well.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, Final, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mtpbatch.chat.answer import AnswerFormat
from mtpbatch.chat.messages import Plain, plain_messages, plain_tools, plain_value
from mtpbatch.exceptions import ChatTemplateError, InvalidParameterError

MAX_STEPS: Final = 1_000_000
"""Iterations of loops and calls that one rendering may take."""
MAX_CHARS: Final = 2**24
"""Characters of a prompt, and of any text that a template makes on its way."""

_RESERVED: Final = ("messages", "tools")
_FILENAME: Final = "<template>"  # Jinja's name for what comes from no file


class ChatPrompt(NamedTuple):
    """A conversation as a prompt."""

    text: str
    answer: AnswerFormat
    """How the answer is to be read."""


class ChatTemplate:
    """The chat template of one model.

    Args:
        source: its Jinja text.
        special_tokens: the texts of special tokens by the names that templates know: ``bos_token``,
            ``eos_token``.
        tool_source: another template for conversations with tools, if the model has one.
        now: the time for templates that tell the model the date.

    The Jinja text is compiled when it is first used. Threads may share it.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        tool_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._source = source
        self._tool_source = tool_source or source
        self._special_tokens = dict(special_tokens or {})
        self._now = now

    def render(
        self,
        messages: object,
        tools: object = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, as ``Engine.apply_chat_template`` describes it."""
        return self._render(plain_messages(messages), plain_tools(tools), template_args)

    def prompt(
        self,
        messages: object,
        tools: object = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A prompt for the assistant's next message, and how to read that."""
        plain = plain_tools(tools)
        text = self._render(plain_messages(messages), plain, template_args)
        source = self._tool_source if plain else self._source
        schemas = {tool["function"]["name"]: tool for tool in plain or ()}
        return ChatPrompt(text, AnswerFormat.of(source, text, schemas))

    def _render(
        self,
        messages: list[Plain],
        tools: list[Plain] | None,
        template_args: Mapping[str, Any] | None,
    ) -> str:
        program = self._tool_program if tools else self._program
        if any(isinstance(message.get("content"), list) for message in messages):
            messages = program.with_readable_content(messages)
        return program.render(
            {
                "documents": None,
                "add_generation_prompt": True,
                **self._special_tokens,
                **_plain_args(template_args),
                "messages": messages,
                "tools": tools,
            }
        )

    @cached_property
    def _program(self) -> _Program:
        return _Program(self._source, self._now)

    @cached_property
    def _tool_program(self) -> _Program:
        if self._tool_source == self._source:
            return self._program
        return _Program(self._tool_source, self._now)


class _Program:
    """A compiled template."""

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        self._environment = _Environment(now)
        try:
            tree = self._environment.parse(source)
            code = self._environment.compile(_Bounds().visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the model's chat template cannot be read: line {error.lineno}: {error.message}"
            ) from None
        except (SyntaxError, RecursionError, MemoryError) as error:  # from Python, which runs it
            raise ChatTemplateError(
                f"the model's chat template cannot be read: nested too deeply ({error})"
            ) from None
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def with_readable_content(self, messages: list[Plain]) -> list[Plain]:
        """Parts of contents joined by line breaks, if the template only knows texts."""
        return messages if self._takes_parts else [_with_joined_parts(m) for m in messages]

    @cached_property
    def _takes_parts(self) -> bool:
        parts = [{"type": "text", "text": "probe"}]
        message = {"role": "user", "content": parts}
        try:
            text = self.render({"messages": [message], "add_generation_prompt": False})
        except ChatTemplateError:
            return False
        return "probe" in text and "'type'" not in text  # not the list, as Python prints it

    def render(self, variables: Mapping[str, Any]) -> str:
        pieces = []
        n_chars = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                n_chars += len(piece)
                _check_size(n_chars)
        except _RefusedError as error:
            raise ChatTemplateError(
                f"the model's chat template refuses the conversation: {error.message}"
            ) from None
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it can fail in every way
            raise ChatTemplateError(_failure(error)) from None
        return "".join(pieces)


class _RefusedError(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class _Context(Context):
    """One rendering's variables, and the steps it has taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_steps = 0


class _Environment(ImmutableSandboxedEnvironment):
    """What templates find: the same as with Hugging Face. What is added are the bounds."""

    context_class = _Context
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda format: now().strftime(format)

    def step(self) -> bool:
        """Called by loops, once for each iteration: see :meth:`call`."""
        return True

    def joined(self, *values: object) -> str:
        """What ``~`` does."""
        text = "".join(map(str, values))
        _check_size(len(text))
        return text

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(context, _Context)
        context.n_steps += 1
        if context.n_steps > MAX_STEPS:
            raise ChatTemplateError(
                f"the model's chat template does not end within {MAX_STEPS} steps"
            )
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _check_size(value)  # such as a width
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_size(len(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            _check_size(len(result))
        return result


class _GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounds(NodeTransformer):
    """Rewrites a template: iterations of loops make calls, which are counted; ``~`` is one."""

    def visit_For(self, loop: nodes.For) -> nodes.For:
        self.generic_visit(loop)
        line = loop.lineno
        loop.body.insert(0, nodes.ExprStmt(_call("step", [], line), lineno=line))
        if loop.test is not None:
            loop.test = nodes.And(_call("step", [], line), loop.test, lineno=line)
        return loop

    def visit_Concat(self, concat: nodes.Concat) -> nodes.Call:
        self.generic_visit(concat)
        return _call("joined", concat.nodes, concat.lineno)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a method of the environment."""
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise ChatTemplateError(
            f"the model's chat template makes a text of more than {MAX_CHARS} characters"
        )


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As prompts have it, where nothing needs to be escaped for HTML as Jinja's own filter does."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _failure(error: Exception) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == _FILENAME
    ]
    where = f" at line {lines[-1]}" if lines else ""
    what = type(error).__name__
    return (
        f"the model's chat template failed{where}: {what}: {error}; either it cannot write such "
        f"messages (look for what it reads of them) or it has a mistake"
    )


def _with_joined_parts(message: Plain) -> Plain:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _plain_args(template_args: Mapping[str, Any] | None) -> dict[str, Any]:
    if template_args is None:
        return {}
    if not isinstance(template_args, Mapping):
        kind = type(template_args).__name__
        raise InvalidParameterError(
            "template_args", f"must be a dict, got {kind}; for none leave it out"
        )
    plain = {}
    for name, value in template_args.items():
        if name in _RESERVED:
            raise InvalidParameterError(
                "template_args", f"{name} has a parameter of its own; use that"
            )
        try:
            plain[name] = plain_value(value)
        except TypeError as error:
            raise InvalidParameterError(
                "template_args", f"{name} cannot be given to a template: {error}"
            ) from None
    return plain
