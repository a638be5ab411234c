"""The Serve application: an ingress and replicas, set up from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import Struct
from ray import serve

from mtpbatch.scaleout.ingress import Ingress
from mtpbatch.scaleout.replica import EngineReplica
from mtpbatch.server import ServerConfig
from mtpbatch.types import EngineConfig, parse

_PREFIX_ROUTER: Final = "mtpbatch.scaleout.routing:PrefixRouter"
# How long requests may take when what serves them is taken away, and how often that is looked at.
_ENDING: Final[dict[str, Any]] = {
    "graceful_shutdown_timeout_s": 300.0,
    "graceful_shutdown_wait_loop_s": 0.5,
}


class AppSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an application is made of; ``args`` in Serve's configuration files."""

    model: str | None = None
    """GGUF file, at the same path on each node. None: the demo model in the package."""
    engine: dict[str, Any] = {}
    """Fields of :class:`~mtpbatch.EngineConfig`, for each replica's engine."""
    server: dict[str, Any] = {}
    """Fields of :class:`~mtpbatch.server.ServerConfig`."""
    routing: Literal["prefix", "least_loaded"] = "prefix"
    """"prefix": prompts that begin alike go to the same replica while its load allows.
    "least_loaded": each request to the less loaded of two replicas."""
    deployment: dict[str, Any] = {}
    """Serve's options for the replicas, such as ``num_replicas``, ``autoscaling_config`` or
    ``ray_actor_options``. A configuration file may give them under ``deployments`` instead."""


def app(args: Mapping[str, Any]) -> serve.Application:
    """An application of these settings, for ``serve.run`` or a file's ``import_path``.

    What ``deployment`` does not say: a replica takes twice ``n_seq`` requests, of which half wait
    in its engine, where priorities count, and further ones wait in the ingress, at most
    ``max_waiting``; autoscaling aims at ``n_seq`` requests; the actor has ``n_threads`` CPUs, or
    one; health is checked every 5 seconds, and requests have 5 minutes to end when the replica is
    taken away.

    Raises :class:`~mtpbatch.InvalidParameterError`.
    """
    settings = parse(AppSettings, args)
    engine = parse(EngineConfig, settings.engine)
    server = parse(ServerConfig, settings.server)
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * engine.n_seq,
        "max_queued_requests": -1 if engine.max_waiting is None else engine.max_waiting,
        "ray_actor_options": {"num_cpus": engine.n_threads or 1},
        "health_check_period_s": 5.0,
        **_ENDING,
        **settings.deployment,
    }
    scaling = options.get("autoscaling_config")
    if isinstance(scaling, dict):
        options["autoscaling_config"] = {"target_ongoing_requests": engine.n_seq, **scaling}
    if settings.routing == "prefix":
        options.setdefault("request_router_config", {"request_router_class": _PREFIX_ROUTER})
    replica: Any = serve.deployment(**options)(EngineReplica)
    replicas = replica.bind(settings.model, settings.engine, settings.server)
    # The ingress lets everybody in: it is the replicas that have limits.
    ingress: Any = serve.deployment(max_ongoing_requests=100_000, **_ENDING)(Ingress)
    application: serve.Application = ingress.bind(replicas, server.max_body, server.body_timeout)
    return application
