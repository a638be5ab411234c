"""``mtpbatch serve``: an OpenAI-compatible server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

API_KEY_VARIABLE = "MTPBATCH_API_KEY"


async def serve(
    host: str,
    port: int,
    model: str | None,
    *,
    engine: dict[str, Any],
    server: dict[str, Any],
    grace: float,
) -> int:
    """Serve until it is told to end; the exit status."""
    try:
        from mtpbatch.server import run
    except ImportError as error:
        print(f"mtpbatch: {error}", file=sys.stderr)
        return 1
    keys = [*server.pop("api_key", ()), *os.environ.get(API_KEY_VARIABLE, "").split(",")]
    server["api_keys"] = [key.strip() for key in keys if key.strip()]
    name = server.setdefault("model_name", "demo" if model is None else Path(model).stem)
    return await run.serve(
        host,
        port,
        model,
        engine=engine,
        server=server,
        grace=grace,
        ready=lambda url: print(f"mtpbatch: serving {name} at {url}/v1", flush=True),
    )
