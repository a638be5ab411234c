"""How a server is set up, besides its engine."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server tells and asks of its clients: keyword arguments of ``create_app``.

    ::

        from mtpbatch.server import create_app

        app = create_app(engine, model_name="demo", api_keys=("secret",), max_body=1 << 20)
    """

    model_name: Annotated[str, Meta(min_length=1)] = "mtpbatch"
    """What clients call the model."""
    api_keys: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Who asks sends one of these as ``Authorization: Bearer KEY``. None: anybody may ask."""
    max_body: Annotated[int, Meta(ge=1)] = 16 * 2**20
    """Most bytes in the body of a request."""
    body_timeout: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds in which all of a body has to come."""
    stall_timeout: Annotated[float, Meta(ge=0)] = 60.0
    """Seconds that a step may take before ``/health`` says that the engine does not work."""
