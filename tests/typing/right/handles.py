"""Requests that are submitted, awaited in any order, cancelled and timed out."""

import anyio

from mtpbatch import Completion, Engine, EngineOverloaded, Generation, MtpBatchError


async def race(engine: Engine, prompts: list[str]) -> Completion:
    generations: list[Generation] = [engine.submit(p, followed=False) for p in prompts]
    winner: Completion | None = None

    async def wait(generation: Generation) -> None:
        nonlocal winner
        winner = winner or await generation
        for other in generations:
            other.cancel()

    async with anyio.create_task_group() as tasks:
        for generation in generations:
            tasks.start_soon(wait, generation)
    assert winner is not None
    return winner


async def within(engine: Engine, prompt: str, seconds: float) -> str:
    try:
        with anyio.fail_after(seconds):
            return (await engine.generate(prompt, timeout=seconds, priority=-5)).text
    except EngineOverloaded as error:
        return f"{error.waiting} of {error.max_waiting} wait"
    except MtpBatchError as error:
        return error.completion.text if error.completion else str(error)
