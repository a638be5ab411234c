"""A chat over a websocket, with Starlette: words as they come, and a button to stop them.

    pip install '.[examples]'           # starlette, uvicorn and websockets
    python examples/websocket_chat.py   # then open http://127.0.0.1:8000

The demo model knows nothing of conversations: it answers with the sound of what it has read, the
Bible and Python.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import mtpbatch

MODEL = None  # the path of a GGUF file; None is the demo model in the package
SAMPLING: dict[str, Any] = {"max_tokens": 300, "temperature": 0.7, "top_p": 0.9}

PAGE = """<!doctype html><meta name=viewport content="width=device-width"><title>Chat</title>
<body style="font: 1rem sans-serif; max-width: 40rem; margin: 2rem auto">
<div id=log style="white-space: pre-wrap"></div>
<form>
<input autofocus size=40> <button>Say</button> <button type=button id=stop>Stop</button>
</form>
<script>
const socket = new WebSocket(`ws://${location.host}/chat`);
const log = document.querySelector('#log'), input = document.querySelector('input');
document.querySelector('form').onsubmit = event => {
  event.preventDefault();
  socket.send(input.value);
  log.append(`\\n> ${input.value}\\n`);
  input.value = '';
};
document.querySelector('#stop').onclick = () => socket.send('');
socket.onmessage = event => {
  const { text, error } = JSON.parse(event.data);
  log.append(text ?? (error ? `[${error}]` : '\\n'));
};
</script>"""


async def page(_: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


async def chat(websocket: WebSocket) -> None:
    """One conversation. Texts come in; out go objects with a text, or the end of an answer."""
    await websocket.accept()
    messages: list[Any] = []
    try:
        while True:
            said = await websocket.receive_text()
            if not said:  # a "stop" that came after the end of the answer
                continue
            messages.append({"role": "user", "content": said})
            try:
                messages.append(await answer(websocket, messages))
            except* mtpbatch.MtpBatchError as errors:
                # Such as a conversation that has outgrown n_ctx: the user's turn did not happen.
                messages.pop()
                await websocket.send_json({"error": str(errors.exceptions[0])})
    except* WebSocketDisconnect:
        pass


async def answer(websocket: WebSocket, messages: list[Any]) -> mtpbatch.ChatMessage:
    engine: mtpbatch.Engine = websocket.app.state.engine
    # Each turn asks with the whole conversation. What the engine still has of it is not computed
    # again.
    async with (
        engine.stream_chat(messages, **SAMPLING) as deltas,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(stop_when_told, websocket, deltas)
        async for delta in deltas:
            if delta.content:
                await websocket.send_json({"text": delta.content})
        tasks.cancel_scope.cancel()
    done = await deltas
    await websocket.send_json({"finish_reason": done.finish_reason})
    return done.message


async def stop_when_told(websocket: WebSocket, deltas: mtpbatch.ChatGeneration) -> None:
    # Somebody has to listen while an answer comes. Else a client that leaves is noticed only by the
    # next word that is sent to it, and a request that waits in the queue sends none. Here it raises
    # WebSocketDisconnect: that cancels the task group, and the block's end frees the sequence.
    await websocket.receive_text()
    deltas.cancel()  # what has been said so far stays in the conversation


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    # One for all conversations. Who finds it full is told so, and may say it again.
    async with mtpbatch.Engine.open(MODEL, n_seq=8, max_waiting=64, on_full="reject") as engine:
        app.state.engine = engine
        yield


app = Starlette(routes=[Route("/", page), WebSocketRoute("/chat", chat)], lifespan=lifespan)

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
