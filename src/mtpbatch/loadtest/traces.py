"""Traces of real traffic: when requests came, and how long prompts and answers were. Pure."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError

BLOCK: Final = 512
"""Tokens of a prompt that one of a trace's ``hash_ids`` stands for."""


class TraceEntry(Struct, frozen=True):
    """One request of a trace."""

    moment: float
    """Seconds since the first one."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """What the prompt holds, block by block of ``BLOCK`` tokens: equal numbers, equal tokens."""


class _Line(Struct):
    """A line of a JSONL trace, as Mooncake's are."""

    timestamp: float  # milliseconds
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(parameter: str, text: str) -> tuple[TraceEntry, ...]:
    """The requests of a trace in the order in which they came.

    JSONL as Mooncake publishes it (``timestamp`` in milliseconds, ``input_length``,
    ``output_length``, ``hash_ids``), or CSV with the columns of Azure's traces (``TIMESTAMP``,
    ``ContextTokens``, ``GeneratedTokens``) or of BurstGPT's (``Timestamp`` in seconds,
    ``Request tokens``, ``Response tokens``). Requests without an answer are left out.
    """
    read = _read_jsonl if text.lstrip().startswith("{") else _read_csv
    try:
        entries = sorted(read(text), key=lambda entry: entry.moment)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise InvalidParameterError(
            parameter,
            f"is no trace that can be read: {error!r}; it must be JSONL with timestamp, "
            f"input_length and output_length, or CSV with TIMESTAMP, ContextTokens and "
            f"GeneratedTokens",
        ) from None
    entries = [each for each in entries if each.prompt_tokens > 0 and each.output_tokens > 0]
    if not entries:
        raise InvalidParameterError(parameter, "is a trace without any request")
    first = entries[0].moment
    return tuple(msgspec.structs.replace(entry, moment=entry.moment - first) for entry in entries)


def _read_jsonl(text: str) -> Iterable[TraceEntry]:
    decode = msgspec.json.Decoder(_Line).decode
    for row in filter(str.strip, text.splitlines()):
        line = decode(row)
        yield TraceEntry(
            line.timestamp / 1000, line.input_length, line.output_length, line.hash_ids
        )


def _read_csv(text: str) -> Iterable[TraceEntry]:
    for row in csv.DictReader(io.StringIO(text)):
        moment, prompt, output = _AZURE if "TIMESTAMP" in row else _BURST_GPT
        yield TraceEntry(moment(row), int(row[prompt]), int(row[output]))


def _azure_moment(row: Mapping[str, str]) -> float:
    # Its fractions have seven digits, of which datetime reads six.
    whole, _, fraction = row["TIMESTAMP"].partition(".")
    digits = fraction[:6].rstrip("Z+")
    parsed = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return parsed.timestamp() + float(f"0.{digits or 0}")


def _burst_gpt_moment(row: Mapping[str, str]) -> float:
    return float(row["Timestamp"])


_Columns = tuple[Callable[[Mapping[str, str]], float], str, str]
_AZURE: Final[_Columns] = (_azure_moment, "ContextTokens", "GeneratedTokens")
_BURST_GPT: Final[_Columns] = (_burst_gpt_moment, "Request tokens", "Response tokens")
