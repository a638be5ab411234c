"""Docstrings of public names: each has an example, every example runs, every field is explained."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

import mtpbatch
import mtpbatch.native
import mtpbatch.testing
from mtpbatch.metrics import EngineMetrics
from mtpbatch.server import ServerConfig, create_app
from mtpbatch.server.page import routes
from mtpbatch.tracing import RequestSpans

PACKAGES = (mtpbatch, mtpbatch.native, mtpbatch.testing)
METHODS_OF = (mtpbatch.Engine, mtpbatch.Generation, mtpbatch.ChatGeneration)
OF_EXTRAS = (create_app, ServerConfig, routes, EngineMetrics, RequestSpans)
OPTIONS = (mtpbatch.SamplingOptions, mtpbatch.EngineOptions)  # explained where the structs are


def blocks(thing: object) -> list[str]:
    """The examples of a docstring: what is indented after two colons."""
    text = inspect.getdoc(thing) or ""
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", f"{text}\n")
    return [textwrap.dedent(block) for block in found]


def documented() -> Iterator[tuple[str, object]]:
    """Public names, and the public methods of what apps hold in their hands."""
    for package in PACKAGES:
        yield package.__name__, package
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{package.__name__}.{name}", thing
    for thing in OF_EXTRAS:
        yield f"{thing.__module__}.{thing.__name__}", thing
    for kind in METHODS_OF:
        for name in vars(kind):
            member = getattr(kind, name)
            if not name.startswith("_") and callable(member):
                yield f"mtpbatch.{kind.__name__}.{name}", member


EXAMPLES = [
    pytest.param(block, id=f"{name}-{number}")
    for name, thing in documented()
    for number, block in enumerate(blocks(thing))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(
    example: str, demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is printed, with an open engine and a conversation, beside the files it names.

    The names of the native and the testing package count as imported. A test in it runs as well.
    """
    for name in ("model.gguf", "uploaded.gguf"):
        (tmp_path / name).symlink_to(demo_path)
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("mtpbatch")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])
    monkeypatch.setattr(logger, "level", logger.level)
    code = compile(example, "<example>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def run() -> None:
        async with mtpbatch.Engine.open(n_seq=4, n_ctx=512, n_threads=1) as engine:
            scope: dict[str, Any] = {
                **{
                    name: getattr(package, name)
                    for package in PACKAGES[1:]
                    for name in package.__all__
                },
                "mtpbatch": mtpbatch,
                "anyio": anyio,
                "msgspec": msgspec,
                "engine": engine,
                "messages": [{"role": "user", "content": "In the beginning"}],
            }
            waiting = eval(code, scope)
            if inspect.iscoroutine(waiting):
                await waiting
            for name in [name for name in scope if name.startswith("test_")]:
                await scope[name]()

    anyio.run(run)


def test_every_public_name_has_an_example() -> None:
    """But for those whose base has one for all."""
    for name, thing in documented():
        if inspect.isclass(thing) and mtpbatch.MtpSessionError in thing.__mro__[1:]:
            thing = mtpbatch.MtpSessionError
        assert blocks(thing), f"the docstring of {name} has no example"


def test_every_public_field_is_explained() -> None:
    """By the text that follows it in the source."""
    for name, thing in documented():
        if not inspect.isclass(thing) or thing in OPTIONS:
            continue
        (declared,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        assert isinstance(declared, ast.ClassDef)
        for field, after in zip(declared.body, [*declared.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained, f"{name}.{ast.unparse(field.target)} is not explained"
