"""Start a hundred generations, cancel half of them at random moments, await all."""

import asyncio
import random
from collections import Counter

import mtpbatch


async def main() -> None:
    async with mtpbatch.Engine.open(n_seq=16, n_ctx=256) as engine:
        generations = [
            engine.submit(f"{i} And it came to pass", max_tokens=100, ignore_eos=True)
            for i in range(100)
        ]
        for generation in generations[::2]:
            asyncio.get_running_loop().call_later(random.uniform(0, 2), generation.cancel)
        completions = await asyncio.gather(*generations)
        print(dict(Counter(done.finish_reason for done in completions)), engine)
        stats = engine.stats()
        assert sum(stats.finished.values()) == 100
        assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 16)


asyncio.run(main())
