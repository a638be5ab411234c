"""The ``mtpbatch`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

import anyio

from mtpbatch._log import log_to_console
from mtpbatch.cli import bench
from mtpbatch.cli.demo import demo
from mtpbatch.cli.generate import generate
from mtpbatch.exceptions import InvalidParameterError, MtpBatchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verbose:
        log_to_console("DEBUG")
    try:
        if options.command == "demo":
            anyio.run(demo)
        elif options.command == "bench":
            return bench.run(options, _ENGINE_OPTIONS)
        else:
            anyio.run(
                generate,
                options.prompts,
                options.model,
                _given(options, _ENGINE_OPTIONS),
                _given(options, _REQUEST_OPTIONS),
                options.json,
            )
    except BaseException as error:
        return _status(_first(error))
    return 0


def _first(error: BaseException) -> BaseException:
    """The error itself, or the first of a task group's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _status(error: BaseException) -> int:
    """Tell of an error in one line; what is no fault of the caller's or the model's is raised."""
    match error:
        case InvalidParameterError() if error.parameter in _OPTIONS:
            option = error.parameter.replace("_", "-")
            print(f"mtpbatch: --{option}: {str(error).split(': ', 1)[1]}", file=sys.stderr)
            return 2
        case MtpBatchError():
            print(f"mtpbatch: {error}", file=sys.stderr)
            return 2 if isinstance(error, InvalidParameterError) else 1
        case BrokenPipeError():  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case OSError():  # our output cannot be written
            print(f"mtpbatch: {error}", file=sys.stderr)
            return 1
        case KeyboardInterrupt():
            return 130
        case _:
            raise error


def _depth(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be "auto" or a whole number, got {text!r}')
    return text if text == "auto" else int(text)


# Names are those of EngineConfig and SamplingParams, which hold the defaults and the checks.
_ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "n_seq": {"type": int, "help": "sequences that run at once"},
    "n_ctx": {"type": int, "help": "tokens per sequence"},
    "n_draft_max": {"type": int, "help": "most tokens drafted at once; 0 leaves MTP heads unused"},
    "n_threads": {"type": int, "help": "CPU threads"},
    "n_gpu_layers": {"type": int, "help": "layers on a GPU, -1 for all"},
    "kv_type": {"help": "element type of the KV cache"},
}
_REQUEST_OPTIONS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": int, "help": "most tokens to generate"},
    "temperature": {"type": float, "help": "0 (default): the most probable token"},
    "top_k": {"type": int, "help": "sample among the k most probable tokens"},
    "top_p": {"type": float, "help": "sample among tokens that make up this probability"},
    "min_p": {"type": float, "help": "drop tokens below this share of the best one's probability"},
    "seed": {"type": int, "help": "same seed, same text"},
    "stop": {"action": "append", "help": "text that ends the answer; can be repeated"},
    "ignore_eos": {"action": "store_true", "default": None, "help": "go on after the end token"},
    "speculation": {"type": _depth, "help": 'draft depth: 0 off, a number, or "auto"'},
}

_OPTIONS = _ENGINE_OPTIONS.keys() | _REQUEST_OPTIONS.keys() | bench.OPTIONS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtpbatch",
        description="Many generations at once on one llama.cpp model, with Multi-Token Prediction.",
    )
    version = importlib.metadata.version("mtpbatch")
    parser.add_argument("--version", action="version", version=f"mtpbatch {version}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log events to stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "demo",
        help="eight prompts at once on the packaged model",
        description="Run eight prompts at once on the packaged model and show what drafting gains.",
    )
    run = commands.add_parser(
        "generate",
        help="generate from prompts",
        description="Generate from one or more prompts, all at once; text goes to stdout in order.",
    )
    run.add_argument("prompts", nargs="+", metavar="PROMPT", help="a text to continue")
    run.add_argument("-m", "--model", metavar="FILE", help="GGUF file; default: packaged model")
    run.add_argument("--json", action="store_true", help="one JSON record per line, as they end")
    for title, options in (("request", _REQUEST_OPTIONS), ("engine", _ENGINE_OPTIONS)):
        group = run.add_argument_group(f"{title} options")
        for name, details in options.items():
            if "action" not in details:
                details = details | {"metavar": "N" if "type" in details else "TYPE"}
            group.add_argument("--" + name.replace("_", "-"), **details)
    bench.add_parser(commands, _ENGINE_OPTIONS)
    return parser


def _given(options: argparse.Namespace, names: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options that were written on the command line."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
