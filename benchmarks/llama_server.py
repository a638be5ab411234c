"""llama-server as one side of :mod:`benchmarks.side_by_side`: building, starting and asking it."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from benchmarks.workload import N_CTX, Answer
from mtpbatch.machine import available_cpus

_START_TIMEOUT = 300
_KEPT_ALIVE = 1  # seconds; the server's own limit is 5


def build(build_dir: Path) -> Path:
    """The llama-server of the llama.cpp in the installed llama-cpp-python's source distribution.

    It is configured through llama-cpp-python's own CMake project, with its build type and with
    ``CMAKE_ARGS`` as pip takes it, so that libllama gets the flags it got from pip. Takes some
    minutes; ``CMAKE_BUILD_PARALLEL_LEVEL`` limits the jobs.
    """
    version = importlib.metadata.version("llama-cpp-python")
    flags = os.environ.get("CMAKE_ARGS", "")
    # Other flags, another build: that of the installed llama-cpp-python has them too.
    key = f"-{zlib.crc32(flags.encode()):08x}" if flags else ""
    source, build = build_dir / f"llama_cpp_python-{version}", build_dir / f"build-{version}{key}"
    program = build / "bin" / "llama-server"
    if program.exists():
        return program
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("llama-server cannot be built without CMake: pip install '.[bench]'")
    if not source.exists():
        _unpack_source(version, build_dir)
    subprocess.run(
        [
            *(cmake, "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DLLAVA_BUILD=OFF"),
            *("-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_OPENSSL=OFF"),
            *("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),  # would be downloaded
            *shlex.split(flags),
        ],
        stdout=sys.stderr,
        check=True,
    )
    subprocess.run(
        [cmake, "--build", build, "--target", "llama-server"],
        env={"CMAKE_BUILD_PARALLEL_LEVEL": str(available_cpus()), **os.environ},
        stdout=sys.stderr,
        check=True,
    )
    return program


def _unpack_source(version: str, build_dir: Path) -> None:
    build_dir.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps"),
            *("--no-binary", "llama-cpp-python", "--dest", build_dir),
            f"llama-cpp-python=={version}",
        ],
        stdout=sys.stderr,
        check=True,
    )
    name = f"llama_cpp_python-{version}"
    with tarfile.open(build_dir / f"{name}.tar.gz") as archive:
        archive.extractall(build_dir / "unpacked", filter="data")
    (build_dir / "unpacked" / name).rename(build_dir / name)  # whole or not at all


def features(program: Path) -> str:
    """The CPU features it was compiled with, as ``llama_print_system_info`` says them."""
    done = subprocess.run(
        [program, "--log-verbosity", "4", "--model", os.devnull], capture_output=True, text=True
    )
    for line in (done.stdout + done.stderr).splitlines():
        if "system_info:" in line:
            return line.split(" | ", 1)[1].strip()
    raise RuntimeError(f"{program} does not tell its system_info:\n{_tail(done.stderr)}")


class LlamaServer:
    """A llama-server that is ready, and how to ask it. Made by :func:`running`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, start_up: float) -> None:
        self.pid = process.pid
        self.start_up = start_up
        self._port = port
        self._idle: list[tuple[http.client.HTTPConnection, float]] = []  # and since when
        self._threads = anyio.CapacityLimiter(1000)  # each client waits on one of its own

    async def generate(self, prompt: str, tokens: int) -> Answer:
        return await anyio.to_thread.run_sync(self._generate, prompt, tokens, limiter=self._threads)

    async def first_token(self, prompt: str, tokens: int) -> float:
        return await anyio.to_thread.run_sync(
            self._first_token, prompt, tokens, limiter=self._threads
        )

    def _generate(self, prompt: str, tokens: int) -> Answer:
        with self._ask(prompt, tokens, stream=False) as response:
            answer = json.loads(response.read())
        timings = answer["timings"]
        return Answer(
            prompt_tokens=answer["tokens_evaluated"],
            tokens=timings["predicted_n"],
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
        )

    def _first_token(self, prompt: str, tokens: int) -> float:
        came = None
        with self._ask(prompt, tokens, stream=True) as response:
            for line in response:
                if came is None and line.startswith(b"data: ") and json.loads(line[6:])["content"]:
                    came = time.perf_counter()
        if came is None:
            raise RuntimeError("llama-server streamed no text")
        return came

    @contextmanager
    def _ask(self, prompt: str, tokens: int, *, stream: bool) -> Iterator[http.client.HTTPResponse]:
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": stream,
            # Greedy, by the shortest chain of samplers there is.
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0,
        }
        connection = self._connection()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {response.read()!r}")
        yield response
        response.read()
        self._idle.append((connection, time.monotonic()))

    def _connection(self) -> http.client.HTTPConnection:
        """A new one, or one that was used a moment ago: the server closes those that are idle."""
        with suppress(IndexError):
            connection, since = self._idle.pop()
            if time.monotonic() - since < _KEPT_ALIVE:
                return connection
            connection.close()
        return http.client.HTTPConnection("127.0.0.1", self._port)

    def close(self) -> None:
        for connection, _ in self._idle:
            connection.close()


@contextmanager
def running(
    program: Path, model: Path, *, n_seq: int, depth: int, kv: str, threads: int, log: Path
) -> Iterator[LlamaServer]:
    """Start a server and stop it at the end. What it logs goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    options: dict[str, Any] = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": port,
        "--parallel": n_seq,
        "--ctx-size": n_seq * N_CTX,
        "--threads": threads,
        "--fit": "off",  # everything is said here: nothing to find out at the start
        # In its favour: it logs no requests, and keeps nothing for prompts that come again.
        "--log-verbosity": 2,
        "--cache-ram": 0,
        "--ctx-checkpoints": 0,
    }
    if depth:
        options |= {"--spec-type": "draft-mtp", "--spec-draft-n-max": depth}
    command = [str(program), *(str(part) for pair in options.items() for part in pair)]
    command.append("--kv-unified" if kv == "unified" else "--no-kv-unified")
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, port, command, log)
        server = LlamaServer(process, port, time.perf_counter() - begin)
        try:
            yield server
        except Exception as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)  # a server that crashes closes its connections before it has ended
                raise RuntimeError(_died(process, command, log)) from error
            raise
        finally:
            server.close()
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, command: list[str], log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        if process.poll() is not None:
            raise RuntimeError(_died(process, command, log))
        if time.monotonic() > deadline:
            raise RuntimeError(f"llama-server is not ready after {_START_TIMEOUT} s; see {log}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # it does not listen yet
        finally:
            connection.close()
        time.sleep(0.01)


def _died(process: subprocess.Popen[bytes], command: list[str], log: Path) -> str:
    return (
        f"llama-server ended with {process.returncode}: {shlex.join(command)}\n"
        f"{_tail(log.read_text(errors='replace'))}"
    )


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-30:])
