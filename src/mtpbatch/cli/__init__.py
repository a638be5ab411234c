"""The ``mtpbatch`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NoReturn

import anyio

from mtpbatch._log import log_to_console
from mtpbatch.cli import bench, doctor, plan
from mtpbatch.cli.demo import demo
from mtpbatch.cli.generate import generate
from mtpbatch.cli.serve import serve
from mtpbatch.exceptions import InvalidParameterError, MtpBatchError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.verbose or options.command == "serve":
        log_to_console("DEBUG" if options.verbose else "INFO")
    try:
        if options.command == "demo":
            anyio.run(demo)
        elif options.command == "bench":
            return bench.run(options, _ENGINE_OPTIONS)
        elif options.command == "plan":
            return plan.run(options.model, _given(options, _ENGINE_OPTIONS | _SIZE_OPTIONS))
        elif options.command == "doctor":
            return anyio.run(doctor.run, options.model)
        elif options.command == "serve":
            return anyio.run(
                partial(
                    serve,
                    options.host,
                    options.port,
                    options.model,
                    engine=_given(options, _ENGINE_OPTIONS | _SERVING_ENGINE_OPTIONS),
                    server=_given(options, _SERVER_OPTIONS),
                    grace=options.grace,
                ),
                backend_options={"use_uvloop": find_spec("uvloop") is not None},
            )
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


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0 on, got {text!r}")
    return seconds


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
_SIZE_OPTIONS: dict[str, dict[str, Any]] = {
    "n_batch": {"type": int, "help": "most tokens in one step"},
    "n_ubatch": {"type": int, "help": "most tokens in one forward pass"},
    "n_cells": {"type": int, "help": "KV cells of all sequences together"},
    "snapshot_memory": {"type": int, "help": "MiB for states of prompts that may come again"},
    "draft_model": {"help": "GGUF file of an assistant that drafts"},
}
_SERVING_ENGINE_OPTIONS = _SIZE_OPTIONS | {
    "speculation": {"type": _depth, "help": 'draft depth: 0 off, a number, or "auto"'},
    "max_waiting": {"type": int, "help": "most requests that wait; more are refused with 429"},
    "max_waiting_tokens": {"type": int, "help": "most prompt tokens that wait"},
    "isolation": {"help": 'where the model runs: "none", or in a "process" of its own'},
    "step_timeout": {"type": float, "help": "seconds without a step until that process is killed"},
}
_SERVER_OPTIONS: dict[str, dict[str, Any]] = {
    "model_name": {"help": "what clients call the model; default: the file's name"},
    "api_key": {
        "action": "append",
        "help": "clients must send it; can be repeated, or MTPBATCH_API_KEY holds keys and commas",
    },
    "max_body": {"type": int, "help": "most bytes in the body of a request"},
    "body_timeout": {"type": _seconds, "help": "seconds in which a request's body has to come"},
    "stall_timeout": {"type": _seconds, "help": "seconds a step may take before /health fails"},
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

_OPTIONS = (
    _ENGINE_OPTIONS.keys()
    | _SERVING_ENGINE_OPTIONS.keys()
    | _SERVER_OPTIONS.keys()
    | _REQUEST_OPTIONS.keys()
    | bench.OPTIONS
)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mtpbatch: {message.removeprefix('argument ')}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    _add_options(run, "request", _REQUEST_OPTIONS)
    _add_options(run, "engine", _ENGINE_OPTIONS)
    server = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve one model over OpenAI's HTTP API, until SIGTERM or Ctrl-C.",
    )
    server.add_argument("-m", "--model", metavar="FILE", help="GGUF file; default: packaged model")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    server.add_argument("--port", type=_port, default=8000, metavar="N", help="0: a free one")
    server.add_argument(
        "--grace",
        type=_seconds,
        default=30.0,
        metavar="N",
        help="seconds that requests may take once the server is asked to end",
    )
    _add_options(server, "server", _SERVER_OPTIONS)
    _add_options(server, "engine", _ENGINE_OPTIONS | _SERVING_ENGINE_OPTIONS)
    bench.add_parser(commands, _ENGINE_OPTIONS)
    planned = commands.add_parser(
        "plan",
        help="the memory an engine takes, and what fits",
        description="Print the memory that an engine of these options takes, by part, how much is "
        "available here (within the limits of the control group), and how many sequences of which "
        "length fit into it. Nothing of the weights is read. The exit status is 1 if the engine "
        "does not fit.",
    )
    planned.add_argument("-m", "--model", metavar="FILE", help="GGUF file; default: packaged model")
    _add_options(planned, "engine", _ENGINE_OPTIONS | _SIZE_OPTIONS)
    examined = commands.add_parser(
        "doctor",
        help="whether all is well here, and what to change",
        description="Look at versions, at what llama.cpp was built for, at the CPUs and the memory "
        "that this process really has, and at a model: whether it can be loaded, whether it has "
        "MTP heads that can draft, and whether it fits. Then generate with the packaged model for "
        "some seconds, with drafts and without. The exit status is 1 if something does not work.",
    )
    examined.add_argument(
        "-m", "--model", metavar="FILE", help="GGUF file to look at; default: packaged model"
    )
    return parser


def _add_options(
    parser: argparse.ArgumentParser, title: str, options: dict[str, dict[str, Any]]
) -> None:
    group = parser.add_argument_group(f"{title} options")
    for name, details in options.items():
        if "action" not in details:
            details = details | {"metavar": "N" if "type" in details else "NAME"}
        group.add_argument("--" + name.replace("_", "-"), **details)


def _given(options: argparse.Namespace, names: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The options that were written on the command line."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
