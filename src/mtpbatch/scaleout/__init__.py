"""Engines on a Ray Serve cluster, one in each replica, behind one OpenAI-compatible address.

::

    from ray import serve
    from mtpbatch import scaleout

    serve.run(scaleout.app({"model": "/models/model.gguf", "engine": {"n_seq": 16}}))

or ``serve deploy`` a file that names ``mtpbatch.scaleout:app`` (``examples/ray_serve.yaml``).

::

    client ─HTTP─▶ Serve's proxy ─▶ Ingress ─────────▶ EngineReplica: the server's ASGI app
                                      │ routes by        and an engine, in one process
                                      │ PrefixRouter   ▶ EngineReplica
    app on Ray ─ handle ──────────────┴──────────────▶ …

Guarantees:

- A client that goes, and a handle's call that is cancelled, free their sequence: the cancellation
  is passed on at once, and the step under way when it comes is the last. Ray may lose one that is
  asked for in the very moment in which a replica accepts the request.
- If a replica dies, requests of which nothing has been sent yet are asked once more, elsewhere. The
  others end with an error event. Those of other replicas notice nothing.
- A replica whose engine has died ends its process at once. Being least loaded it would draw all
  requests until the next health check.
- A replica that Serve takes away finishes what it runs, then closes its engine.

Needs the extra ``ray``.
"""

from __future__ import annotations

try:
    import ray.serve  # noqa: F401
except ImportError as error:
    raise ModuleNotFoundError(
        "mtpbatch.scaleout needs Ray Serve, which is not installed: pip install 'mtpbatch[ray]'",
        name=error.name,
    ) from error

from mtpbatch.scaleout.application import AppSettings, app
from mtpbatch.scaleout.ingress import Ingress
from mtpbatch.scaleout.replica import EngineReplica
from mtpbatch.scaleout.routing import PrefixRouter

__all__ = ["AppSettings", "EngineReplica", "Ingress", "PrefixRouter", "app"]
