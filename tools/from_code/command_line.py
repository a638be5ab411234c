"""The command line's reference, from the parser itself."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator

from mtpbatch.cli import make_parser

_HEAD = """\
# Command line

`mtpbatch COMMAND --help` says the same. The exit status is 0, 1 if it could not be done, 2 if the
command line is wrong, and 130 after Ctrl-C; `serve` has [more](../server.md#how-it-ends). Options
that are named like a [parameter](../requests.md) have its range and its default.
"""


def page() -> str:
    """The whole page, made by `tools/reference_pages.py`."""
    return "\n".join([_HEAD, *_sections(make_parser())])


def _sections(
    command: argparse.ArgumentParser, above: argparse.ArgumentParser | None = None
) -> Iterator[str]:
    """A section for each command, in the order of ``--help``; options of the one above it once."""
    told = set(above._option_string_actions) if above else set()
    told = told if told <= command._option_string_actions.keys() else set()
    if above:
        yield f"## {command.prog}\n"
        yield f"{textwrap.fill(' '.join((command.description or '').split()), 110)}\n"
        if told - {"-h", "--help"}:
            yield f"It has the options of `{above.prog}`, and these:\n"
    for group in command._action_groups:
        actions = [
            action
            for action in group._group_actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            and told.isdisjoint(action.option_strings)
        ]
        if not actions:
            continue
        yield f"| {(group.title or 'options').removeprefix('positional ')} | |"
        yield "|---|---|"
        for action in actions:
            yield f"| {_name(action)} | {_help(action)} |"
        yield ""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _sections(each, command)


def _name(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if not action.option_strings:
        return f"`{value.strip()}`" + (", one or more" if action.nargs == "+" else "")
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    words = (action.help or "").replace("|", "\\|")
    if action.choices:
        words = f"{', '.join(map(str, action.choices))}; {words}"
    told = action.default in (None, False, argparse.SUPPRESS) or "default" in words
    return words if told else f"{words}; default: {action.default}"
