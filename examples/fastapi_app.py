"""A web service of your own, with FastAPI: streams, disconnects, back-pressure, a clean end.

    pip install '.[examples]'       # fastapi and uvicorn
    python examples/fastapi_app.py

Then, from elsewhere:

    curl -N localhost:8000/stream --json '{"prompt": "In the beginning"}'
    curl localhost:8000/generate --json '{"prompt": "In the beginning", "temperature": 0}'
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

import mtpbatch

MODEL = None  # the path of a GGUF file; None is the demo model in the package


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # One engine for the process: it batches what all requests want. Whoever finds the queue full is
    # told so at once, instead of waiting in a line that only grows.
    async with mtpbatch.Engine.open(MODEL, n_seq=8, max_waiting=32, on_full="reject") as engine:
        app.state.engine = engine
        yield
        # uvicorn has let its requests end by now. This is for what else the app generates.
        await engine.drain(timeout=20)


app = FastAPI(lifespan=lifespan)


class Ask(BaseModel):
    # Bounds of your own: what one stranger may cost everybody else.
    prompt: str = Field(max_length=10_000)
    max_tokens: int = Field(200, ge=1, le=2000)
    temperature: float = Field(0.7, ge=0, le=2)


async def submitted(request: Request, ask: Ask) -> AsyncIterator[mtpbatch.Generation]:
    """A request to the engine that lives as long as the HTTP request it is for."""
    engine: mtpbatch.Engine = request.app.state.engine
    # FastAPI enters this before the response begins, so that errors can still become a status, and
    # leaves it after the response, sent or broken off. Leaving the block frees the sequence.
    async with engine.stream(
        ask.prompt, max_tokens=ask.max_tokens, temperature=ask.temperature, timeout=120
    ) as generation:
        yield generation


Submitted = Annotated[mtpbatch.Generation, Depends(submitted)]


@app.post("/stream")
async def stream(generation: Submitted) -> StreamingResponse:
    """Server-sent events. Starlette breaks the response off when the client disconnects."""
    return StreamingResponse(events(generation), media_type="text/event-stream")


async def events(generation: mtpbatch.Generation) -> AsyncIterator[str]:
    try:
        async for delta in generation:
            if delta.text:
                yield f"data: {json.dumps({'text': delta.text})}\n\n"
        yield f"data: {json.dumps({'finish_reason': (await generation).finish_reason})}\n\n"
    except mtpbatch.MtpBatchError as error:  # too late for a status: this one has been sent
        yield f"event: error\ndata: {json.dumps({'error': str(error)})}\n\n"


@app.post("/generate")
async def generate(request: Request, generation: Submitted) -> dict[str, Any]:
    """The whole answer at once. Nobody tells such a handler that its client has left: it asks."""
    watch = asyncio.create_task(cancel_on_disconnect(request, generation))
    try:
        done = await generation
    finally:
        watch.cancel()
    return {"text": done.text, "finish_reason": done.finish_reason}


async def cancel_on_disconnect(request: Request, generation: mtpbatch.Generation) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


@app.get("/health")
async def health(request: Request) -> str:
    request.app.state.engine.check_health()
    return "ok"


@app.exception_handler(mtpbatch.EngineOverloaded)
async def overloaded(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 429, headers={"Retry-After": "1"})


@app.exception_handler(mtpbatch.InvalidRequestError)
async def invalid(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)  # such as a prompt too long, with the figures


@app.exception_handler(mtpbatch.EngineError)
async def unavailable(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 503)  # closed, dead or stalled


if __name__ == "__main__":
    # One process: each further worker would load the model again, and batch by itself.
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
