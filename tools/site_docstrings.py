"""griffe extension: docstrings, which are written for ``help()``, as the Markdown of the site.

Roles such as ``:class:`~mtpbatch.Engine``` become links to what the site documents, the second
colon of a ``::`` before a block of code goes, and the fields of a struct become a table.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`(?:([^`<]+) <)?(~?)([\w.]+)>?`")


class SiteDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            words, short, name = match.groups()
            first, *rest = name.split(".")
            with suppress(griffe.NameResolutionError):
                first = obj.resolve(first)
            words = words or (name.rpartition(".")[2] if short else name)
            target = ".".join((first, *rest)).replace("mtpbatch.exceptions.", "mtpbatch.")
            return f'<autoref optional identifier="{target}"><code>{words}</code></autoref>'

        text = ROLE.sub(link, obj.docstring.value)
        # A block without an introduction has a line of its own for the colons.
        obj.docstring.value = re.sub(r"(?m)^\s*::$|(?<=:):$", "", text)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if "Struct" not in map(str, cls.bases) or cls.docstring is None:
            return
        rows = ["Attributes:"]
        for name, field in list(cls.attributes.items()):
            if name.startswith("_") or "property" in field.labels:
                continue
            words = " ".join(field.docstring.value.split()) if field.docstring else ""
            default = f" Default: `{field.value}`." if field.value is not None else ""
            rows.append(f"    {name} ({_plain(field.annotation)}): {words}{default}")
            cls.del_member(name)
        cls.docstring.value += "\n\n" + "\n".join(rows)


def _plain(annotation: Any) -> str:
    """A type without the bounds that msgspec checks."""
    text = str(annotation)
    while (
        bare := re.sub(r"Annotated\[((?:[^][]|\[[^][]*\])*?), Meta\([^()]*\)\]", r"\1", text)
    ) != text:
        text = bare
    return text
