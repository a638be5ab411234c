"""The screenshots of the live page in ``docs/images``: the demo model under a load, in Chromium.

    python tools/screenshots.py

Needs the extras ``server`` and ``browser``, and Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import time
from pathlib import Path

from starlette.applications import Starlette
from uvicorn import Config, Server

import mtpbatch
from browsing import open_browser, picture, set_screen
from mtpbatch.server.page import routes

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SECONDS = 24  # of load before a picture: more than the page shows
SCREENS = (("desktop", 1280, 800, 1.0), ("phone", 390, 844, 1.5))

PROMPTS = [
    "In the beginning",
    "The old tower stood by the sea, and",
    "She opened the letter and read:",
    "It was a dark night. " * 20,
    "The captain looked at the map, then at the storm. " * 30,
]


async def ask(engine: mtpbatch.Engine, seed: int) -> None:
    """A client that asks, leaves early now and then, and thinks before it asks again."""
    chance = random.Random(seed)
    while True:
        prompt = f"{chance.randrange(1000)} {chance.choice(PROMPTS)}"
        temperature = chance.choice([0.0, 0.0, 0.8])
        max_tokens = chance.choice([30, 100, 300, 800])
        async with engine.stream(
            prompt, temperature=temperature, max_tokens=max_tokens, ignore_eos=True
        ) as deltas:
            async for _ in deltas:
                if chance.random() < 0.001:
                    break
        await asyncio.sleep(chance.expovariate(1.0))


def take(address: str, directory: Path) -> None:
    with open_browser() as browser:
        for name, width, height, scale in SCREENS:
            set_screen(browser, width, height, scale=scale)
            browser.get(address)
            time.sleep(SECONDS)
            for scheme in ("light", "dark"):
                set_screen(browser, width, height, scheme=scheme, scale=scale)
                time.sleep(1.0)
                path = directory / f"live-{name}-{scheme}.png"
                path.write_bytes(picture(browser))
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=IMAGES)
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    arguments.directory.mkdir(exist_ok=True)
    n_seq = arguments.sequences
    async with mtpbatch.Engine.open(n_seq=n_seq, n_ctx=2048, speculation=3) as engine:
        server = Server(Config(Starlette(routes=routes(engine)), log_level="warning"))
        listening = socket.create_server(("127.0.0.1", 0))
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve([listening]))
            clients = [group.create_task(ask(engine, seed)) for seed in range(n_seq + 4)]
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            await asyncio.to_thread(take, address, arguments.directory)
            for client in clients:
                client.cancel()
            server.should_exit = True
            await serving


if __name__ == "__main__":
    asyncio.run(main())
