"""What Serve is told of a replica's health."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mtpbatch import EngineDeadError, EngineStalledError, NativeDiedError
from mtpbatch.scaleout import EngineReplica
from mtpbatch.server import ServerConfig
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

pytestmark = pytest.mark.anyio


async def test_a_replica_whose_engine_begins_anew_is_not_replaced() -> None:
    """Requests wait in it; Serve would end them, and load the model no sooner."""
    backend = ScriptedBackend(n_seq=1)
    backend.die_in_step(0)
    async with open_scripted_engine(backend) as engine:
        replica: Any = SimpleNamespace(_engine=engine, _server=ServerConfig(stall_timeout=60.0))
        with pytest.raises(NativeDiedError):
            await engine.generate("x")
        with pytest.raises(NativeDiedError):
            engine.check_health()
        await EngineReplica.check_health(replica)

        backend.clock.advance(1.0)
        held = backend.hold_step(backend.n_steps)
        waiting = engine.submit("x")
        await held.reached()
        backend.clock.advance(61.0)
        with pytest.raises(EngineStalledError):
            await EngineReplica.check_health(replica)
        held.release()
        await waiting

        backend.fail_step(backend.n_steps, RuntimeError("scripted crash"))
        with pytest.raises(EngineDeadError):
            await engine.generate("x")
        with pytest.raises(EngineDeadError):
            await EngineReplica.check_health(replica)
