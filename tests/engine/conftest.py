"""What tests of the engine on real models share."""

from __future__ import annotations

import pytest

from mtpbatch.types import Isolation


@pytest.fixture(params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    """Where the model runs. A test that is about one way parametrises this by that alone."""
    way: Isolation = request.param
    return way
