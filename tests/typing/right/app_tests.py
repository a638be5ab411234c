"""An app's own tests, with a scripted engine."""

import mtpbatch
from mtpbatch.testing import (
    Fixed,
    OpenLoop,
    RequestKind,
    ScriptedBackend,
    SimulationReport,
    StepCost,
    VirtualClock,
    open_scripted_engine,
    simulate,
    steady,
)


async def handler(engine: mtpbatch.Engine, text: str) -> str:
    return (await engine.generate(text, max_tokens=10)).text


async def test_it_says_what_the_model_says() -> None:
    backend = ScriptedBackend(lambda prompt: f"You said: {prompt}", step_time=0.1)
    gate = backend.hold_step(1)
    async with open_scripted_engine(backend) as engine:
        clock: VirtualClock = backend.clock
        clock.advance(60)
        generation = engine.submit("hello")
        await gate.reached()
        generation.cancel()
        gate.release()
        done = await generation
        assert done.finish_reason == "abort"
        assert await handler(engine, "again")


def throughput(model: mtpbatch.ModelFacts) -> float:
    kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
    cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
    report: SimulationReport = simulate(OpenLoop(steady(2.0)), [kind], model, cost, n_requests=10)
    return report.throughput
