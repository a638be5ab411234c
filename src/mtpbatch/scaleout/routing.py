"""Which replica answers: one that has computed how the prompt begins, unless it has too much to do.

A replica keeps the states of prompts' beginnings (``snapshot_memory``). Requests that begin alike
therefore go to the same one: to that which comes first when all are ranked by a hash of the
beginning and their name (rendezvous hashing). So every router makes the same choice without asking
anybody, and when replicas come or go, only their share of the beginnings moves. Replicas with more
than 1.25 times the mean of requests are passed over (consistent hashing with bounded loads), so
that a beginning that everybody has does not go to one replica alone.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mtpbatch.scaleout.passing import HttpRequest

_LOAD_BOUND: Final = 1.25
_BEGINNING: Final = 1024  # characters, or tokens, of a prompt that is no conversation


class _Body(msgspec.Struct):
    messages: Any = None
    prompt: Any = None


def beginning(body: bytes) -> bytes:
    """A digest of how the prompt begins that a request's body asks to go on with; or b"".

    Of a conversation, that is all up to the first message of the user, which stays the same from
    turn to turn; of a text or of tokens, the first 1,024.
    """
    try:
        asked = msgspec.json.decode(body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return b""  # whatever it is, the server is to answer it
    if asked.messages:
        return beginning_of(asked.messages)
    return beginning_of(asked.prompt)


def beginning_of(prompt: object) -> bytes:
    """The same of messages, a text, tokens, or a list of texts, of which the first one counts."""
    match prompt:
        case str():
            part: Any = prompt[:_BEGINNING]
        case [str() as first, *_]:
            part = first[:_BEGINNING]
        case [Mapping(), *_]:
            part = _first_turn(prompt)
        case [_, *_]:
            part = prompt[:_BEGINNING]
        case _:
            return b""
    try:
        return hashlib.blake2b(msgspec.json.encode(part), digest_size=16).digest()
    except (TypeError, UnicodeEncodeError):  # no messages that anybody can read
        return b""


def _first_turn(messages: Sequence[Any]) -> Sequence[Any]:
    for end, message in enumerate(messages, 1):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return messages[:end]
    return messages


def in_order(key: bytes, loads: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The replicas in the order in which a beginning is to try them, and those that have too much.

    ``loads`` says how many requests each replica has, by its name.
    """

    def weight(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), key=key, digest_size=8).digest()

    bound = math.ceil(_LOAD_BOUND * (sum(loads.values()) + 1) / len(loads))
    ranked = sorted(loads, key=weight)
    return (
        [name for name in ranked if loads[name] < bound],
        [name for name in ranked if loads[name] >= bound],
    )


class PrefixRouter(RequestRouter):
    """Routes prompts that begin alike to the same replica; others to the less loaded one of two.

    For ``request_router_config`` of a deployment whose methods take a prompt, messages or an
    :class:`HttpRequest` first.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in ranks; of each rank the least loaded one that has room is taken."""
        key = b""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if none of them has room
            key = _key(pending_request)
        if not candidate_replicas:
            return []
        if not key:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        first, busy = in_order(key, loads)
        return [*([by_name[name]] for name in first), [by_name[name] for name in busy]]


def _key(request: PendingRequest) -> bytes:
    match request.args:
        case [HttpRequest() as asked, *_]:
            return asked.beginning
        case [prompt, *_]:
            return beginning_of(prompt)
        case _:
            return b""
