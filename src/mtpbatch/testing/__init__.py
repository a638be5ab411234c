"""Test an app that uses mtpbatch without a model: a scripted one in its place.

::

    from mtpbatch.testing import ScriptedBackend, open_scripted_engine

    async def my_handler(engine, text):  # what the app has
        return (await engine.generate(text)).text

    async def test_my_handler():
        backend = ScriptedBackend(lambda prompt: f"You said: {prompt}")
        async with open_scripted_engine(backend) as engine:
            assert (await my_handler(engine, "hello")) == "You said: hello"

The engine is the real one, with its thread and its scheduler; only the model is played. What
it answers, how many drafts are accepted and how long steps take is written down beforehand, so
every run is the same. A step can be held (:meth:`ScriptedBackend.hold_step`) to cancel or close
at exactly that moment, and can be made to fail (:meth:`ScriptedBackend.fail_step`).

Or find out what an engine would do under a load, without a model and without waiting for it
(:func:`simulate`)::

    from mtpbatch.testing import Fixed, OpenLoop, RequestKind, StepCost, simulate, steady

    kind = RequestKind(prompt=Fixed(200), answer=Fixed(100))
    cost = StepCost(target_pass=0.02, target_row=0.001, draft_decode=0.002, draft_row=0.0001)
    report = simulate(OpenLoop(steady(2.0)), [kind], engine.model, cost, n_requests=500)
    print(report.throughput, report.first_token.p99)
"""

from __future__ import annotations

from mtpbatch.testing.scripted import (
    ScriptedBackend,
    StepGate,
    VirtualClock,
    open_scripted_engine,
)
from mtpbatch.testing.simulated import CostModel, StepCost
from mtpbatch.testing.simulation import Sample, SimulationReport, Summary, simulate
from mtpbatch.testing.workload import (
    ClosedLoop,
    Drafts,
    Fixed,
    Lengths,
    LogNormal,
    OpenLoop,
    Profile,
    RequestKind,
    Uniform,
    ramp,
    square_wave,
    steady,
)

__all__ = [
    "ClosedLoop",
    "CostModel",
    "Drafts",
    "Fixed",
    "Lengths",
    "LogNormal",
    "OpenLoop",
    "Profile",
    "RequestKind",
    "Sample",
    "ScriptedBackend",
    "SimulationReport",
    "StepCost",
    "StepGate",
    "Summary",
    "Uniform",
    "VirtualClock",
    "open_scripted_engine",
    "ramp",
    "simulate",
    "square_wave",
    "steady",
]
