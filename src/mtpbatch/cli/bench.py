"""``mtpbatch bench``: load on an engine or a server, and what it did under it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio

from mtpbatch.cli import bench_results
from mtpbatch.loadtest import records
from mtpbatch.loadtest.settings import ARRIVALS, DRAWN, Settings

# Names are those of Settings, which holds the defaults and the checks.
_GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "what is measured": {
        "target": {"metavar": "URL", "help": "a server that speaks OpenAI's API"},
        "endpoint": {
            "choices": ("completions", "chat"),
            "help": "of the server; default: as the dataset needs it",
        },
        "api_key": {"metavar": "KEY", "help": "default: OPENAI_API_KEY of the environment"},
        "params": {"metavar": "JSON", "help": 'more fields of requests, as {"temperature": 0.8}'},
        "timeout": {"metavar": "TIME", "help": "after which a request is an error; default: 10m"},
        "name": {"help": "its name in the report"},
    },
    "what is asked": {
        "dataset": {
            "metavar": "WHICH",
            "help": f"builtin (default), {', '.join(DRAWN)}, or a file: JSONL or ShareGPT's",
        },
        "prompt_length": {
            "metavar": "N",
            "help": "of random prompts: 128 (default), 64..256, normal:200,50, lognormal:200,0.7",
        },
        "output_length": {
            "metavar": "N",
            "help": "likewise, of answers; default: as the dataset says, or 128",
        },
        "token_ids": {"metavar": "A..B", "help": "random prompts are ids of these, not words"},
        "prefixes": {"type": int, "metavar": "N", "help": "how many are shared; default: 1"},
        "prefix_length": {"metavar": "N", "help": "tokens of each; default: 128"},
        "ignore_eos": {"action": "store_true", "help": "answers go on to their full length"},
        "cancel": {"type": float, "metavar": "SHARE", "help": "of requests, at random moments"},
    },
    "when": {
        "arrivals": {
            "choices": ARRIVALS,
            "help": "default: as --rate or --trace need, or closed",
        },
        "concurrency": {
            "metavar": "N",
            "help": "closed: requests at once, 8 by default; 1..64: more and more, for --duration",
        },
        "rate": {
            "metavar": "R",
            "help": "requests per second; 1..20: more and more, for --duration; inf: all at once",
        },
        "burstiness": {"type": float, "metavar": "X", "help": "of gamma; below 1: in bursts"},
        "burst_size": {"type": int, "metavar": "N", "help": "of burst: requests at the same time"},
        "trace": {"metavar": "FILE", "help": "times and lengths to replay: Mooncake's, Azure's, …"},
        "requests": {
            "type": int,
            "metavar": "N",
            "help": "default: 100 or 10 for each client, if no --duration is given",
        },
        "duration": {"metavar": "TIME", "help": "how long requests are sent: 90s, 5m"},
        "warmup": {"metavar": "TIME", "help": "not counted, besides ramp-up"},
        "seed": {"type": int, "metavar": "N", "help": "same seed, same requests; default: 0"},
    },
    "how it is judged": {
        "slo": {"metavar": "LIMITS", "help": "ttft=500ms,tpot=50ms,e2e=10s: what a good one keeps"},
    },
}
_SWEEP_OPTIONS: dict[str, dict[str, Any]] = {
    "slo_share": {
        "type": float,
        "default": 0.95,
        "metavar": "SHARE",
        "help": "of requests that must keep the SLO; default: 0.95",
    },
    "precision": {
        "type": float,
        "default": 0.1,
        "metavar": "SHARE",
        "help": "by which the capacity may be wrong; default: 0.1",
    },
}
OPTIONS = {name for group in _GROUPS.values() for name in group} | _SWEEP_OPTIONS.keys()

_EXAMPLES = """\
  mtpbatch bench --concurrency 16 --slo ttft=500ms,tpot=50ms --out results
  mtpbatch bench --target http://127.0.0.1:8080 --rate 4 --duration 60s --out results
  mtpbatch bench sweep -m model.gguf --rate 0.5..32 --slo ttft=1s,tpot=50ms --out results
"""


def add_parser(commands: Any, engine_options: Mapping[str, Mapping[str, Any]]) -> None:
    """Add ``bench`` and its subcommands."""
    parser = commands.add_parser(
        "bench",
        help="put load on an engine or a server, and report on it",
        description="Put load on an engine in this process, or on a server that speaks OpenAI's\n"
        "API, and report latencies, throughput, goodput and acceptance.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(bench_command="run")
    _add_options(parser, engine_options)
    subcommands = parser.add_subparsers(dest="bench_command", metavar="COMMAND")
    sweeping = subcommands.add_parser(
        "sweep",
        help="find the greatest --rate or --concurrency at which the SLO is kept",
        description="Raise --rate or --concurrency from A to B of A..B, doubling it, until the\n"
        "SLO is not kept any more; then find the capacity between. Without --slo: the curve.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_options(sweeping, engine_options)
    for name, details in _SWEEP_OPTIONS.items():
        sweeping.add_argument("--" + name.replace("_", "-"), **details)
    bench_results.add_parsers(subcommands)


def _add_options(
    parser: argparse.ArgumentParser, engine_options: Mapping[str, Mapping[str, Any]]
) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="NAME",
        help="GGUF file of the engine, by default the packaged one; or a model of the server",
    )
    parser.add_argument("--out", metavar="DIR", help="write result.json, requests.csv, report.html")
    for title, options in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name, details in options.items():
            group.add_argument("--" + name.replace("_", "-"), **details)
    group = parser.add_argument_group("engine options")
    for name, setting in engine_options.items():
        group.add_argument("--" + name.replace("_", "-"), metavar="N", **setting)


def run(options: argparse.Namespace, engine_options: Iterable[str]) -> int:
    """Run a subcommand; return the exit status: 1 if no request ended well, 130 after Ctrl-C."""
    if options.bench_command in ("report", "compare"):
        bench_results.run(options)
        return 0
    # Only here: they take a while to import.
    from mtpbatch.loadtest import results
    from mtpbatch.loadtest.bench import bench, sweep
    from mtpbatch.loadtest.report import tables

    given = vars(options)
    settings = {name: given[name] for name in Settings.__struct_fields__ if name in given}
    settings.setdefault("api_key", os.environ.get("OPENAI_API_KEY"))
    config = {name: given[name] for name in engine_options if name in given}
    record: records.Record
    if options.bench_command == "sweep":
        judged = options.slo_share, options.precision
        record, interrupted = anyio.run(sweep, Settings(**settings), config, *judged)
    else:
        record, interrupted = anyio.run(bench, Settings(**settings), config)
    tables.print_record(record)
    if "out" in given:
        for path in results.save(record, Path(options.out)):
            print(path)
    if interrupted:
        return 130
    requests = (request for run in records.runs_of(record) for request in run.requests)
    return 0 if any(each.outcome == "ok" for each in requests) else 1
