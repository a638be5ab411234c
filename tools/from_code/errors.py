"""The errors that mtpbatch raises: each with its cause, its remedy and its messages, from the code.

What a class means, and what to do about it, is its docstring; its messages are found where it is
made, in Python by the syntax tree and in C++ by the string literals of what is thrown.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mtpbatch import exceptions

ROOT = Path(__file__).parents[2]
REMEDY = "What to do: "

_HEAD = """\
# Errors

Every error that mtpbatch raises on purpose, with its cause and its remedy. All are subclasses of
`MtpBatchError`, can be imported from `mtpbatch`, and are caught by the class that they are a kind
of. What a request had generated when an error ended it is in the error's `completion`. The messages
are templates: what is in braces, or an ellipsis, is filled in.

Over HTTP they come as [OpenAI's error objects](server.md#errors). Where the package that a part of
mtpbatch needs is not installed, importing that part raises `ModuleNotFoundError`, with the
`pip install` that mends it.

"""

# Of a call that breaks a rule of the C interface: the module of csrc/, and what its callers raise.
_INVALID = {
    "adapter": "InvalidParameterError",
    "grammar": "InvalidParameterError",
    "model": "InvalidParameterError",
    "plan": "InternalError",
    "session": "MtpBadSequenceError",
}
_PARAMETERS = {"adapter": "lora", "model": "text"}
_PACKAGES = {
    "": "Message",
    "server": "Message of [the server](server.md)",
    "loadtest": "Message of [`mtpbatch bench`](load-testing.md)",
    "testing": "Message of [`mtpbatch.testing`](reference/testing.md)",
}


class Message(NamedTuple):
    """What one place in the code says."""

    error: str
    package: str
    parameter: str
    text: str


def page() -> str:
    """The whole page, made by `tools/reference_pages.py`."""
    found = sorted({*python_messages(), *native_messages()}, key=lambda each: each[1:])
    tables: dict[str, dict[str, list[Message]]] = defaultdict(lambda: defaultdict(list))
    for message in found:
        tables[message.error][message.package].append(message)
    return _HEAD + "\n".join(_section(kind, tables[kind.__name__]) for kind in kinds())


def kinds() -> list[type[exceptions.MtpBatchError]]:
    """All classes, as the tree in the module's docstring has them."""
    names = re.findall(r"^[\s│├└─]*([A-Z]\w+)", inspect.getdoc(exceptions) or "", re.MULTILINE)
    return [getattr(exceptions, name) for name in names if hasattr(exceptions, name)]


def _section(kind: type[exceptions.MtpBatchError], tables: dict[str, list[Message]]) -> str:
    cause, _, remedy = as_text(kind).partition(REMEDY)
    bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
    lines = [f"## {kind.__name__}\n", f"A kind of {bases}.\n", f"{cause.strip()}\n"]
    if remedy:
        lines.append(f"**What to do:** {remedy}\n")
    if kind is exceptions.InternalError:
        tables = {}  # nobody can do anything about them but report them
    for package, heading in _PACKAGES.items():
        messages = tables.get(package, [])
        if any(message.parameter for message in messages):
            lines += [f"| parameter | {heading} |", "|---|---|"]
            lines += [f"| {_code(each.parameter)} | {_code(each.text)} |" for each in messages]
        elif messages:
            lines += [f"| {heading} |", "|---|"]
            lines += [f"| {_code(each.text)} |" for each in messages]
        if messages:
            lines.append("")
    return "\n".join(lines)


def as_text(kind: type) -> str:
    """A class's docstring without its example, with names instead of roles."""
    text, _, _ = (inspect.getdoc(kind) or "").partition("\n\n::\n")
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("\n", " ")
    return f"`{escaped}`" if "`" not in escaped else f"`` {escaped} ``"


# --------------------------------------------------------------------------------- in Python


def python_messages() -> Iterator[Message]:
    """The messages of errors that are made in the package."""
    source = ROOT / "src" / "mtpbatch"
    for path in sorted(source.rglob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        package = path.relative_to(source).parts[0]
        package = package if package in _PACKAGES else ""
        returned = {
            each.name: [r.value for r in ast.walk(each) if isinstance(r, ast.Return) and r.value]
            for each in ast.walk(module)
            if isinstance(each, ast.FunctionDef)
        }
        for call in ast.walk(module):
            if not isinstance(call, ast.Call):
                continue
            error = _made(call, module)
            if error is None:
                continue
            parameter, message = "", call.args[0]
            if issubclass(error, exceptions.InvalidParameterError):
                parameter, message = _template(call.args[0]), call.args[1]
            for text in _texts(message, returned):
                yield Message(error.__name__, package, parameter, text)


def _made(call: ast.Call, module: ast.Module) -> type[exceptions.MtpBatchError] | None:
    """The class of the error that a call gives its message to, if it does that."""
    named = {kind.__name__: kind for kind in kinds()}
    wording = {  # their messages stand in their own __init__
        kind
        for kind in named.values()
        if "__init__" in vars(kind) and kind is not exceptions.InvalidParameterError
    }
    name = ast.unparse(call.func)
    if name == "super().__init__":
        owners = [
            each
            for each in module.body
            if isinstance(each, ast.ClassDef) and call in ast.walk(each)
        ]
        kind = named.get(owners[0].name) if owners else None
        return kind if kind in wording else None
    kind = named.get(name)
    return kind if call.args and kind not in wording else None


def _texts(argument: ast.expr, returned: dict[str, list[ast.expr]]) -> list[str]:
    """What an argument may say: of a function of the same module, all that it returns."""
    if isinstance(argument, ast.Call) and isinstance(argument.func, ast.Name):
        return [_template(each) for each in returned.get(argument.func.id, [argument])]
    if isinstance(argument, ast.IfExp):
        return [_template(argument.body), _template(argument.orelse)]
    return [_template(argument)]


def _template(part: ast.expr) -> str:
    match part:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_template, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _template(left) + _template(right)
        case ast.FormattedValue(value=value):
            return _template(value)
        case ast.Name(id=name) | ast.Attribute(attr=name) if not name.startswith("__"):
            return f"{{{name.strip('_')}}}"
        case ast.Call(func=ast.Name(id="repr" | "shown" | "str"), args=[value]):
            return _template(value)
        case _:
            return "…"


# ------------------------------------------------------------------------------------ in C++


def native_messages() -> Iterator[Message]:
    """The messages of errors that native code throws."""
    header = (ROOT / "src" / "mtpbatch" / "native" / "_library.py").read_text(encoding="utf-8")
    errors = dict(re.findall(r"lib\.(MTPBATCH_\w+): (\w+),", header))
    for path in sorted((ROOT / "csrc").glob("*.cpp")):
        code = path.read_text(encoding="utf-8")
        module = path.stem
        aliases = dict(
            re.findall(
                r"(\w+)(?:\s*=\s*\[\])?\(const std::string & \w+\) \{\s*throw Error\((\w+),", code
            )
        )
        for found in re.finditer(r"\b(Error|\w+)\(", code):
            name = found[1]
            if name != "Error" and name not in aliases:
                continue
            arguments = _arguments(code, found.end())
            status, *rest = [aliases.get(name, arguments[0]), *arguments[name == "Error" :]]
            if not rest or '"' not in rest[0]:
                continue
            error = errors.get(status, _INVALID.get(module, "ContextError"))
            parameter = _PARAMETERS.get(module, "…") if error == "InvalidParameterError" else ""
            yield Message(error, "", parameter, _native_template(rest[0]))


def _arguments(code: str, start: int) -> list[str]:
    """A call's arguments from behind its parenthesis on."""
    arguments, depth, begin = [], 0, start
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]').finditer(code, start):
        sign = match[0]
        if sign in "([{":
            depth += 1
        elif sign in ")]}" and depth:
            depth -= 1
        elif sign == ")" or (sign == "," and not depth):
            arguments.append(code[begin : match.start()].strip())
            begin = match.end()
            if sign == ")":
                return arguments
    raise ValueError("a call without an end")


def _native_template(expression: str) -> str:
    if expression.startswith("with_reason("):
        return _native_template(_arguments(expression, len("with_reason("))[0]) + ": …"
    parts = re.split(r"\s*\+\s*(?![^()]*\))", expression)
    return "".join(_native_part(part) for part in parts)


def _native_part(part: str) -> str:
    if part.startswith("sequence_name("):
        return "sequence …"
    literals = re.findall(r'"((?:[^"\\]|\\.)*)"', part)
    if part.startswith(('"', 'std::string("')):
        return "".join(literals)
    if literals and "?" in part:
        return " / ".join(literals)
    if literals:
        return f"… {literals[0]} …"
    if match := re.fullmatch(r"std::to_string\((?:[\w.]+(?:->|\.))?(\w+?)_?\)|(\w+)", part.strip()):
        return f"{{{match[1] or match[2]}}}"
    return "…"
