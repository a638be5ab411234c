"""Text as it comes, with an end of one's own."""

import sys

import anyio

import mtpbatch


async def tell(engine: mtpbatch.Engine, prompt: str) -> mtpbatch.Completion | None:
    n_accepted = 0
    async with engine.stream(prompt, max_tokens=200, logprobs=3) as deltas:
        async for delta in deltas:
            sys.stdout.write(delta.text)
            n_accepted += delta.n_accepted
            if delta.logprobs is not None and delta.logprobs[0].rank > 100:
                break
    print(n_accepted, deltas.request_id)
    return deltas.completion


async def main() -> None:
    async with mtpbatch.Engine.open() as engine:
        done = await tell(engine, "Once upon a time")
        reason: mtpbatch.FinishReason | None = done.finish_reason if done else None
        print(reason)


anyio.run(main)
