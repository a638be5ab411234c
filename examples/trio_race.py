"""mtpbatch on trio: a stream with a time limit, and a race whose losers are cancelled.

    pip install '.[examples]'       # trio
    python examples/trio_race.py

Nothing in here is peculiar to mtpbatch: cancel scopes and nurseries do to its requests what they do
to all that waits.
"""

import trio

import mtpbatch

MODEL = None  # the path of a GGUF file; None is the demo model in the package


async def tell(engine: mtpbatch.Engine) -> None:
    """Print a text for at most two seconds. What has come by then is printed, the rest given up."""
    with trio.move_on_after(2) as limit:
        async with engine.stream("In the beginning", max_tokens=100) as deltas:
            async for delta in deltas:
                print(delta.text, end="", flush=True)
    print("\n[out of time]" if limit.cancelled_caught else "\n[the end]")


async def race(engine: mtpbatch.Engine, prompts: list[str]) -> mtpbatch.Completion:
    """The first answer that is complete. Cancelling the nursery frees the others' sequences."""
    winners: list[mtpbatch.Completion] = []

    async def run(prompt: str) -> None:
        winners.append(await engine.generate(prompt, stop=".", max_tokens=300))
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(run, prompt)
    return winners[0]


async def main() -> None:
    async with mtpbatch.Engine.open(MODEL, n_seq=4) as engine:
        await tell(engine)
        winner = await race(engine, ["And God said", "def main():", "Now the sons of", "import"])
        print(f"The race went to: {winner.text!r}")
        # Each request ends, however it ends: this waits until the losers have.
        await engine.drain()
        print(f"Ended: {engine.stats().finished}")


if __name__ == "__main__":
    trio.run(main)
