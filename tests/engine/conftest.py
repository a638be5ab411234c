"""What tests of the engine on real models share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    """Where the model runs. A test that is about one way parametrises this by that alone."""
    way: str = request.param
    return way
