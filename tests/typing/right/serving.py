"""The server's app, mounted and alone."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

import mtpbatch
from mtpbatch.metrics import EngineMetrics
from mtpbatch.server import create_app

alone: Starlette = create_app(
    mtpbatch.EngineConfig(n_seq=4), "model.gguf", model_name="tiny", api_keys=["secret"]
)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
    async with mtpbatch.Engine.open("model.gguf", isolation="process") as engine:
        with EngineMetrics(engine, model_name="tiny"):
            app.mount("/llm", create_app(engine))
            yield
        await engine.drain(timeout=30)


app = Starlette(lifespan=lifespan)
