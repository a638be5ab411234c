"""The work that every benchmark gives to whoever is measured: prompts, closed loop, arrivals.

Whoever is measured is two callables: ``Generate`` serves one request to its end, ``FirstToken``
serves one as well and says when its first token came.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import anyio
from msgspec import Struct

N_CTX = 512
"""Tokens per sequence, prompt and answer together."""

PROMPTS = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus, that "
    "all the world should be taxed. And all went to be taxed, every one into his own city.",
    "And the LORD said unto Moses, Go in unto Pharaoh, and tell him, Thus saith the LORD God of "
    "the Hebrews, Let my people go, that they may serve me. And if thou refuse",
    "In the beginning God created the heaven and the earth. And the earth was without form, and "
    "void; and darkness was upon the face of the deep. And the Spirit of God",
    "Then spake Solomon, The LORD said that he would dwell in the thick darkness. And the king "
    "turned his face about, and blessed all the congregation of Israel:",
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n"
    "        self.queue = []\n\n    def put(self, item):\n        ",
    "import os\nimport sys\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv\n"
    "    for name in argv[1:]:\n        path = os.path.join(",
    "    def test_read(self):\n        with open(self.name, 'rb') as f:\n"
    "            data = f.read()\n        self.assertEqual(len(data), 10)\n        ",
    "def parse(text):\n    lines = text.split('\\n')\n    result = {}\n    for line in lines:\n"
    "        if not line:\n            continue\n        key, value = ",
)

REFRAIN = "And the LORD spake unto Moses, saying, Speak unto the children of Israel. "
"""What a text that repeats itself repeats."""


class Answer(Struct, frozen=True):
    """What one request came to."""

    prompt_tokens: int
    tokens: int
    drafted: int
    accepted: int


class Load(Struct, frozen=True):
    """What a number of concurrent clients got."""

    tokens: int
    seconds: float
    drafted: int
    accepted: int
    parts: dict[str, float] = {}
    """Of the seconds, those spent in what; as far as it is known."""

    @property
    def speed(self) -> float:
        """Tokens per second, of all clients together."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Every decode of the model gives a sequence one token that was not drafted."""
        return self.tokens / (self.tokens - self.accepted)


Generate: TypeAlias = Callable[[str, int], Awaitable[Answer]]
"""Serves a prompt and a number of tokens."""
FirstToken: TypeAlias = Callable[[str, int], Awaitable[float]]
"""The same; returns ``time.perf_counter()`` at the first token."""
Parts: TypeAlias = Callable[[], dict[str, float]]
"""Seconds spent in what so far."""


def turns(clients: int) -> int:
    """Requests of each client: at least two, and enough for every prompt to have its turn."""
    return max(2, -(-len(PROMPTS) // clients))


async def closed_loop(generate: Generate, clients: int, tokens: int, parts: Parts = dict) -> Load:
    """Let each client send its next request when its last one has ended."""
    answers: list[Answer] = []

    async def client(number: int) -> None:
        for turn in range(turns(clients)):
            prompt = PROMPTS[(turn * clients + number) % len(PROMPTS)]
            answers.append(await generate(prompt, tokens))

    before = parts()
    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(clients):
            group.start_soon(client, number)
    seconds = time.perf_counter() - begin
    if any(answer.tokens != tokens for answer in answers):
        raise RuntimeError(f"not every answer has {tokens} tokens: {answers}")
    return Load(
        tokens=sum(answer.tokens for answer in answers),
        seconds=seconds,
        drafted=sum(answer.drafted for answer in answers),
        accepted=sum(answer.accepted for answer in answers),
        parts={name: spent - before[name] for name, spent in parts().items()},
    )


async def arrivals(first_token: FirstToken, clients: int, tokens: int) -> list[float]:
    """Seconds until each of ``clients`` requests that come at once has its first token."""
    waits: list[float] = []

    async def client(prompt: str) -> None:
        waits.append(await first_token(prompt, tokens) - begin)

    begin = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(clients):
            group.start_soon(client, PROMPTS[number % len(PROMPTS)])
    return sorted(waits)


class Measured(Struct, frozen=True):
    """What a running process was measured at."""

    loads: dict[int, Load]
    """By the number of clients."""
    first_token: list[float]
    """Seconds, of as many requests at once as the most clients."""


async def measure(
    generate: Generate,
    first_token: FirstToken,
    concurrency: Sequence[int],
    tokens: int,
    parts: Parts = dict,
) -> Measured:
    """Everything a process is measured at, after a warm-up at its largest batches."""
    await closed_loop(generate, max(concurrency), min(tokens, 8))
    loads = {
        clients: await closed_loop(generate, clients, tokens, parts) for clients in concurrency
    }
    return Measured(loads, await arrivals(first_token, max(concurrency), min(tokens, 16)))


def peak_memory(pid: int) -> float:
    """Most memory the process has had resident, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has ended")
