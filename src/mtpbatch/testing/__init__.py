"""Test an app that uses mtpbatch without a model: a scripted one in its place.

::

    from mtpbatch.testing import ScriptedBackend, open_scripted_engine

    async def test_my_handler():
        backend = ScriptedBackend(lambda prompt: f"You said: {prompt}")
        async with open_scripted_engine(backend) as engine:
            assert (await my_handler(engine, "hello")) == "You said: hello"

The engine is the real one, with its thread and its scheduler; only the model is played. What
it answers, how many drafts are accepted and how long steps take is written down beforehand, so
every run is the same. A step can be held (:meth:`ScriptedBackend.hold_step`) to cancel or close
at exactly that moment, and can be made to fail (:meth:`ScriptedBackend.fail_step`).
"""

from __future__ import annotations

from mtpbatch.testing.scripted import (
    ScriptedBackend,
    StepGate,
    VirtualClock,
    open_scripted_engine,
)

__all__ = ["ScriptedBackend", "StepGate", "VirtualClock", "open_scripted_engine"]
