"""The code blocks of the documentation, and what a reader does with them."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import CO_COROUTINE
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import mtpbatch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NOT_TESTED = "not tested: "
SERVERS = ("mtpbatch serve", "uvicorn ")  # commands that run until they are told to end
PORT = "8000"  # which the pages name; here every page has another one


@dataclass(frozen=True)
class Block:
    """A fenced block. Its title says that it is a file to save, from an example, or not tested."""

    page: Path
    line: int
    language: str
    title: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[1], found[2] or "", found[3])
        for found in BLOCK.finditer(text)
    ]


def installs(command: str) -> bool:
    """Whether a command only prepares an environment. Such commands are checked, not run."""
    words = shlex.split(command, comments=True)
    return "pip" in words or "venv" in words or ".venv/bin/activate" in words


def check_installation(command: str) -> None:
    """What pip is to install has a name, and extras that this project has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = shlex.split(command, comments=True)
    if "pip" not in words:
        assert words in (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"])
        return
    wanted = [word for word in words[words.index("pip") + 2 :] if not word.startswith("-")]
    for word in wanted:
        package = Requirement(re.sub(r"^\.", "mtpbatch", word))
        if package.name == "mtpbatch":
            assert package.extras <= project["optional-dependencies"].keys(), command


@dataclass
class Reader:
    """Goes through a page from top to bottom, in an empty folder that holds ``model.gguf``."""

    folder: Path
    engine: mtpbatch.Engine
    port: int = field(default_factory=lambda: _free_port())
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    output: str = ""

    def __post_init__(self) -> None:
        self.names: dict[str, Any] = {
            "__name__": "__main__",
            "asyncio": asyncio,
            "mtpbatch": mtpbatch,
            "engine": self.engine,
            "prompt": "In the beginning",
        }

    async def read(self, block: Block) -> None:
        code = block.code.replace(PORT, str(self.port))
        if block.language == "python" and block.title:
            (self.folder / block.title).write_text(code, encoding="utf-8")
        elif block.language == "python":
            await self.run_python(block, code)
        else:
            await asyncio.to_thread(self.run_shell, block, code)

    async def run_python(self, block: Block, code: str) -> None:
        source = "\n" * (block.line - 1) + code  # so that tracebacks name the page's line
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compiled = compile(source, str(block.page), "exec", flags, dont_inherit=True)
        if compiled.co_flags & CO_COROUTINE:
            await eval(compiled, self.names)
        else:  # on a thread without an event loop, as a program that may start one
            await asyncio.to_thread(exec, compiled, self.names)

    def run_shell(self, block: Block, code: str) -> None:
        lines = code.replace("\\\n", "").splitlines()
        commands = [command for line in lines for command in line.split(" && ")]
        for command in [line for line in commands if installs(line)]:
            check_installation(command)
        # The whole suite is what runs this.
        to_run = "\n".join(c for c in commands if not installs(c) and not c.startswith("pytest"))
        if to_run.startswith(SERVERS):
            self.start_server(to_run)
        elif to_run.strip():
            done = subprocess.run(
                ["bash", "-eu", "-c", to_run],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.output += done.stdout
            assert done.returncode == 0, f"{block.place}: {done.stdout}"

    def start_server(self, command: str) -> None:
        server = subprocess.Popen(
            [*shlex.split(command), "--port", str(self.port)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.servers.append(server)
        assert server.stdout is not None
        lines: Iterator[str] = (line.decode() for line in server.stdout)
        said = next(line for line in lines if f"http://127.0.0.1:{self.port}" in line)
        self.output += said

    def stop_servers(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            server.communicate()

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        # Threads that spin while they wait take the machine from the others that a page starts.
        return {"OMP_WAIT_POLICY": "passive", **os.environ, "PATH": path, "NO_COLOR": "1"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
