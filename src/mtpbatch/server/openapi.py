"""The description at ``/openapi.json``, made of the types that requests and answers are."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Final

import msgspec
from msgspec import Struct

from mtpbatch.server.errors import ErrorBody
from mtpbatch.server.protocol import (
    ChatAnswer,
    ChatChunk,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    Health,
    ModelCard,
    ModelList,
)

_STATUSES: Final = {
    "400": "Something in the request is wrong; `param` names it.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not declared to be JSON.",
    "429": "Too many requests wait; `Retry-After` says when to try again.",
    "500": "The server failed.",
    "501": "The model cannot do this.",
    "503": "The engine is shutting down, has died, or stands still.",
}
_POSTS: Final[dict[str, tuple[str, type[Struct], type[Struct], type[Struct] | None]]] = {
    "/v1/completions": ("Continue texts.", CompletionRequest, CompletionAnswer, CompletionAnswer),
    "/v1/chat/completions": ("Answer a conversation.", ChatRequest, ChatAnswer, ChatChunk),
    "/v1/embeddings": ("Embed texts.", EmbeddingRequest, EmbeddingAnswer, None),
}
_GETS: Final[dict[str, tuple[str, type[Struct]]]] = {
    "/v1/models": ("The model, in a list.", ModelList),
    "/v1/models/{model}": ("The model, by its name.", ModelCard),
    "/health": ("Whether the engine works.", Health),
}


def description(*, has_keys: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document; with ``has_keys`` it says that requests need one."""
    posts = [kind for _, *kinds in _POSTS.values() for kind in kinds if kind is not None]
    gets = [kind for _, kind in _GETS.values()]
    kinds = list(dict.fromkeys([*posts, *gets, ErrorBody]))
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    by_kind = dict(zip(kinds, schemas, strict=True))

    def told(status: str) -> dict[str, Any]:
        error = {"application/json": {"schema": by_kind[ErrorBody]}}
        return {"description": _STATUSES[status], "content": error}

    def stream(event: type[Struct]) -> dict[str, Any]:
        said = {"anyOf": [by_kind[event], by_kind[ErrorBody]]}
        json = {"contentMediaType": "application/json", "contentSchema": said}
        data = {"type": "string", "anyOf": [json, {"const": "[DONE]"}]}
        # OpenAPI has this word from 3.2 on. It is what readers of 3.1 look for as well, and few of
        # them take a document that calls itself 3.2.
        item = {"type": "object", "required": ["data"], "properties": {"data": data}}
        return {"itemSchema": item}

    def answers(kind: type[Struct], event: type[Struct] | None, *errors: str) -> dict[str, Any]:
        content: dict[str, Any] = {"application/json": {"schema": by_kind[kind]}}
        if event is not None:
            content["text/event-stream"] = stream(event)
        return {
            "200": {"description": "The answer.", "content": content},
            **{status: told(status) for status in errors},
        }

    paths: dict[str, Any] = {}
    for path, (summary, asked, answered, event) in _POSTS.items():
        body = {"application/json": {"schema": by_kind[asked]}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": body},
                "responses": answers(answered, event, *_STATUSES),
            }
        }
    for path, (summary, answered) in _GETS.items():
        operation: dict[str, Any] = {"summary": summary}
        errors = ["503"] if path == "/health" else ["401", "503"]
        if "{model}" in path:
            errors.append("404")
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        operation["responses"] = answers(answered, None, *errors)
        if path == "/health":
            operation["security"] = []
        paths[path] = {"get": operation}
    paths["/metrics"] = {
        "get": {
            "summary": "Metrics for Prometheus.",
            "responses": {
                "200": {
                    "description": "In the format and compression that was asked for.",
                    "content": {"text/plain": {"schema": {"type": "string"}}},
                },
                "401": told("401"),
            },
        }
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mtpbatch", "version": importlib.metadata.version("mtpbatch")},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
