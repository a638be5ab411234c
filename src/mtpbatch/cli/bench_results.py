"""``mtpbatch bench report`` and ``mtpbatch bench compare``: what is made of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parsers(subcommands: Any) -> None:
    """Add both to the subcommands of ``bench``."""
    report = subcommands.add_parser(
        "report",
        help="figures and plots of a result.json",
        description="Print the figures of a result, and write its report and its requests anew.",
    )
    report.add_argument("file", metavar="FILE", type=_result, help="a result.json, or its folder")
    report.add_argument("--out", metavar="DIR", type=Path, help="default: where the file is")
    compare = subcommands.add_parser(
        "compare",
        help="results beside each other, with ratios",
        description="Print results beside each other, with ratios to the first and how far noise\n"
        "may have moved them, and write a page with their plots on top of each other.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("file", metavar="FILE", type=_result, help="the result to compare with")
    compare.add_argument("others", metavar="FILE", type=_result, nargs="+", help="and others")
    compare.add_argument(
        "--out",
        metavar="PAGE",
        type=Path,
        default=Path("comparison.html"),
        help="the page; default: comparison.html",
    )


def _result(given: str) -> Path:
    path = Path(given)
    return path / "result.json" if path.is_dir() else path


def run(options: argparse.Namespace) -> None:
    """Run the one that ``bench_command`` names."""
    if options.bench_command == "report":
        _report(options.file, options.out)
    else:
        _compare([options.file, *options.others], options.out)


def _report(path: Path, folder: Path | None) -> None:
    # Only here: they take a while to import.
    from mtpbatch.loadtest import results
    from mtpbatch.loadtest.report import tables

    record = results.load(path)
    tables.print_record(record)
    for written in results.save_report(record, folder or path.parent):
        print(written)


def _compare(paths: list[Path], page: Path) -> None:
    from mtpbatch.loadtest import results
    from mtpbatch.loadtest.report import side_by_side, tables

    records = [results.load(path) for path in paths]
    comparison = side_by_side.compare(records, side_by_side.labels(records, paths))
    tables.print_tables(comparison.title, comparison.tables)
    for warning in comparison.warnings:
        print(f"mtpbatch: {warning}", file=sys.stderr)
    page.write_text(comparison.page(), encoding="utf-8")
    print(page)
