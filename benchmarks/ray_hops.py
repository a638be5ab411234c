"""What the way through Ray Serve costs: processor time of each process, per streamed event.

    python -m benchmarks.ray_hops --rounds 3      # pip install '.[ray,test]'

The same streams of the demo model come from ``mtpbatch serve`` and from one replica behind an
ingress, in turn. Processor time, because the machine's load does not change it much.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import ray
from ray import serve

from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch import scaleout

_N_SEQ = 32
_TOKENS = 64
_TICK = os.sysconf("SC_CLK_TCK")
_PARTS = ("EngineReplica", "Ingress", "Proxy")


async def _stream(client: httpx.AsyncClient, i: int) -> int:
    """The events of one stream."""
    body = {"prompt": f"{i} And it came to pass", "max_tokens": _TOKENS, "ignore_eos": True}
    n = 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            n += line.startswith("data: {")
    return n


async def _load(url: str) -> int:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
        return sum(await asyncio.gather(*(_stream(client, i) for i in range(2 * _N_SEQ))))


def _processor_time() -> dict[str, float]:
    """Seconds that this process's descendants have used, by what they are."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[12])) / _TICK
    used: defaultdict[str, float] = defaultdict(float)
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() != pid:
            used[_part(pid)] += seconds[pid]
    return used


def _part(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "the rest of Ray"
    if "mtpbatch" in command and "serve\0" in command:
        return "mtpbatch serve"
    return next((part for part in _PARTS if part in command), "the rest of Ray")


@contextmanager
def _server() -> Iterator[str]:
    options = ("--port", "0", "--n-seq", str(_N_SEQ), "--n-ctx", "128", "--n-threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "mtpbatch", "serve", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://\S+?:\d+", line):
                yield found[0]
                break
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _cluster() -> Iterator[str]:
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 18_777})
        engine = {"n_seq": _N_SEQ, "n_ctx": 128, "n_threads": 1}
        serve.run(scaleout.app({"engine": engine}))
        yield "http://127.0.0.1:18777"
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    costs: dict[str, list[float]] = {}
    with _server() as alone, _cluster() as cluster:
        for url in (alone, cluster):
            asyncio.run(_load(url))  # to be warm
        for _ in range(rounds):
            for url, parts in (
                (alone, ("mtpbatch serve",)),
                (cluster, (*_PARTS, "the rest of Ray")),
            ):
                before, began = _processor_time(), time.monotonic()
                n_events = asyncio.run(_load(url))
                seconds = time.monotonic() - began
                after = _processor_time()
                for part in parts:
                    used = after[part] - before[part]
                    costs.setdefault(part, []).append(used / n_events * 1e6)
                print(f"{url}: {n_events} events in {seconds:.1f} s", file=sys.stderr)
    facts = command_line.conditions() | {"ray": ray.__version__}
    print(f"{2 * _N_SEQ} streams of {_TOKENS} tokens. {command_line.in_one_line(facts)}\n")
    print(
        table(("process", "µs of a CPU per event"), [(p, spread(c, 0)) for p, c in costs.items()])
    )


if __name__ == "__main__":
    main()
