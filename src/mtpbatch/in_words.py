"""What a field's type allows, in words for error messages. Pure."""

from __future__ import annotations

import msgspec
from msgspec import Struct, inspect

_LONGEST = 100  # characters of a wrong value that are shown


def allowed(kind: type[Struct], field: str) -> str | None:
    """What may be given for a struct's field: "a whole number >= 1 and <= 256 or None".

    ``None`` for values with an inside, of which msgspec says better what is wrong.
    """
    types = {each.name: each.type for each in msgspec.structs.fields(kind)}
    return _words(inspect.type_info(types[field]))


def shown(value: object) -> str:
    """A wrong value, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _words(kind: inspect.Type) -> str | None:
    match kind:
        case inspect.NoneType():
            return "None"
        case inspect.BoolType():
            return "True or False"
        case inspect.IntType():
            return f"a whole number{_range(kind)}"
        case inspect.FloatType():
            return f"a finite number{_range(kind)}"
        case inspect.StrType():
            return "a text that is not empty" if kind.min_length else "a text"
        case inspect.LiteralType():
            choices = ", ".join(map(str, kind.values))
            return f"one of {choices}" if len(kind.values) > 1 else f'"{choices}"'
        case inspect.VarTupleType():
            item = _words(kind.item_type)
            return item and f"a list, each item {item}"
        case inspect.DictType():
            key, value = _words(kind.key_type), _words(kind.value_type)
            return key and value and f"a dict, each key {key}, each value {value}"
        case inspect.UnionType():
            # None comes last, choices first.
            members = sorted(kind.types, key=lambda member: isinstance(member, inspect.NoneType))
            words = [_words(member) for member in members]
            return " or ".join(word for word in words if word) if all(words) else None
        case _:
            return None


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    bounds = {">=": kind.ge, ">": kind.gt, "<=": kind.le, "<": kind.lt}
    words = [f"{sign} {bound:.16g}" for sign, bound in bounds.items() if bound is not None]
    return f" {' and '.join(words)}" if words else ""
