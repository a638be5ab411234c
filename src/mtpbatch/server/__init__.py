"""An OpenAI-compatible server over an engine: an ASGI app, to be mounted or run alone.

::

    async with mtpbatch.Engine.open("model.gguf") as engine:
        app.mount("/llm", create_app(engine))        # in a Starlette or FastAPI app of yours

    mtpbatch serve -m model.gguf                      # alone

Needs the extra ``server``.
"""

from __future__ import annotations

try:
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ModuleNotFoundError(
        f"mtpbatch.server needs {error.name}, which is not installed: "
        "pip install 'mtpbatch[server]'",
        name=error.name,
    ) from error

from mtpbatch.server.app import create_app
from mtpbatch.server.config import ServerConfig

__all__ = ["ServerConfig", "create_app"]
