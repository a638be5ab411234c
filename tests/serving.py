"""A real server for ASGI apps, beside the test that speaks to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve on a free port, from a thread with an event loop of its own; gives ``host:port``.

    Leaving the block has the server end its requests, and then the app.
    """
    listening = socket.create_server(("127.0.0.1", 0))  # connections wait here until it is ready
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        host, port = listening.getsockname()
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
