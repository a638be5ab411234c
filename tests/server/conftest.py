"""What tests of the server share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import mtpbatch
from api_server import serving
from mtpbatch.server import create_app


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Those event loops that uvicorn runs on."""
    return request.param


@pytest.fixture
async def demo_url(demo_path: Path) -> AsyncIterator[str]:
    """A server on the demo model."""
    async with (
        mtpbatch.Engine.open(demo_path, n_seq=4, n_ctx=512, n_threads=1) as engine,
        serving(create_app(engine, model_name="demo")) as url,
    ):
        yield url
