"""Results as files: JSON to compare and to report from, CSV with a line for each request."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.loadtest.records import FORMAT, Record, RequestRecord, RunRecord, runs_of, values_of
from mtpbatch.loadtest.report.html import report
from mtpbatch.loadtest.summary import Summary, acceptance_length, e2e, meets, summarize, tpot, ttft


class _File(Struct, frozen=True):
    """The summaries come first, for people; they are worked out anew from what follows."""

    summaries: list[Summary]
    record: Record


class _Content(Struct, frozen=True):
    record: Record


class _Version(Struct, frozen=True):
    version: int


class _Head(Struct, frozen=True):
    record: _Version


def save(record: Record, folder: Path) -> list[Path]:
    """Write ``result.json``, ``requests.csv`` and ``report.html``; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    summaries = [summarize(run) for run in runs_of(record)]
    result.write_bytes(msgspec.json.encode(_File(summaries, record)))
    return [result, *save_report(record, folder)]


def save_report(record: Record, folder: Path) -> list[Path]:
    """Write what is made of a ``result.json``; return where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    requests, page = folder / "requests.csv", folder / "report.html"
    with requests.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for value, run in values_of(record):
            writer.writerows(_line(run, request, value) for request in run.requests)
    page.write_text(report(record), encoding="utf-8")
    return [requests, page]


def load(path: Path) -> Record:
    """Read a ``result.json``.

    Raises :class:`~mtpbatch.InvalidParameterError` if it is none, or one of another version.
    """
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Head).record.version
        if version != FORMAT:
            raise InvalidParameterError(
                "file",
                f"{path} has version {version} of the format, and this mtpbatch reads version "
                f"{FORMAT}: read it with the mtpbatch that wrote it, or measure again",
            )
        return msgspec.json.decode(content, type=_Content).record
    except msgspec.DecodeError as error:
        raise InvalidParameterError(
            "file",
            f"{path} is no result of a load test ({error}): give the result.json that "
            f"`mtpbatch bench` wrote",
        ) from None


_COLUMNS = (
    *("value", "index", "scheduled", "sent", "first_chunk", "ended", "counted"),
    *("outcome", "finish_reason", "error", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("chunks", "ttft", "tpot", "e2e", "slo_met"),
    *("drafted", "accepted", "steps", "acceptance_length"),
)


def _line(run: RunRecord, request: RequestRecord, value: float | None) -> dict[str, object]:
    """One request: seconds, tokens; nothing where it is unknown."""
    begin, end = run.window
    own = {name: getattr(request, name) for name in _COLUMNS if hasattr(request, name)}
    return own | {
        "value": value,
        "first_chunk": request.chunks[0][0] if request.chunks else None,
        "counted": begin <= request.sent <= end,
        "chunks": len(request.chunks),
        "ttft": ttft(request),
        "tpot": tpot(request),
        "e2e": e2e(request),
        "slo_met": meets(request, run.slo) if run.slo else None,
        "acceptance_length": acceptance_length(request),
    }
