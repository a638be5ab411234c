"""What the server says of itself is true."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

import mtpbatch
from api_server import scripted
from mtpbatch.testing import ScriptedBackend

pytestmark = pytest.mark.anyio

ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "max_tokens": 3, "stop": "q"},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        "logit_bias": {"3": -1.5},
    },
    "/v1/embeddings": {"input": [[65, 66]], "encoding_format": "base64"},
}
WRONG: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [{"n": 0}, {"top_p": 0}, {"no": 1}, {"max_tokens": 1.5}, {"prompt": {}}],
    "/v1/chat/completions": [{"messages": "a"}, {"tool_choice": "maybe"}, {"logprobs": 3}],
    "/v1/embeddings": [{"input": None}, {"encoding_format": "hex"}],
}


def valid(document: dict[str, Any], schema: dict[str, Any], value: object) -> bool:
    whole = {**schema, "components": document["components"]}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(value))


async def test_requests_and_answers_are_as_the_description_has_them() -> None:
    async with scripted(ScriptedBackend(lambda _: '{"a": 1}'), api_keys=["key"]) as (_, client):
        client.headers["authorization"] = "Bearer key"
        document = (await client.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert document["security"] == [{"key": []}]
        for path, body in ASKED.items():
            operation = document["paths"][path]["post"]
            asked = operation["requestBody"]["content"]["application/json"]["schema"]
            responses = operation["responses"]
            assert valid(document, asked, body)
            response = await client.post(path, json=body)
            schema = responses["200"]["content"]["application/json"]["schema"]
            assert response.status_code == 200
            assert valid(document, schema, response.json())
            assert not valid(document, schema, {})
            for wrong in WRONG[path]:
                assert not valid(document, asked, body | wrong), wrong
                response = await client.post(path, json=body | wrong)
                assert response.status_code == 400
                schema = responses["400"]["content"]["application/json"]["schema"]
                assert valid(document, schema, response.json())
            if "text/event-stream" in responses["200"]["content"]:
                stream = await client.post(path, json=body | {"stream": True})
                assert stream.headers["content-type"] == "text/event-stream"
                item = responses["200"]["content"]["text/event-stream"]["itemSchema"]
                told, end = item["properties"]["data"]["anyOf"]
                *events, last, nothing = stream.text.split("\n\n")
                assert (last.removeprefix("data: "), nothing) == (end["const"], "")
                assert len(events) > 2
                for event in events:
                    value = json.loads(event.removeprefix("data: "))
                    assert valid(document, told["contentSchema"], value)
                    assert not valid(document, told["contentSchema"], value | {"choices": "a"})
        for path in ("/v1/models", "/v1/models/{model}", "/health"):
            response = await client.get(path.format(model="mtpbatch"))
            content = document["paths"][path]["get"]["responses"]["200"]["content"]
            assert valid(document, content["application/json"]["schema"], response.json())
        scraped = document["paths"]["/metrics"]["get"]["responses"]
        assert scraped.keys() == {"200", "401"}
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith(*scraped["200"]["content"])


async def test_every_parameter_of_the_engines_can_be_asked_for() -> None:
    """By its own name, but those that OpenAI's API or vLLM has another one for."""
    renamed = {"json_schema", "regex", "choice", "grammar", "prompt_logprobs"}
    engines = {field.name for field in msgspec.structs.fields(mtpbatch.SamplingParams)}
    async with scripted(ScriptedBackend()) as (_, client):
        schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for kind in ("CompletionRequest", "ChatRequest"):
        assert engines - schemas[kind]["properties"].keys() == renamed
        assert schemas[kind]["additionalProperties"] is False
    assert schemas["StructuredOutputs"]["properties"].keys() == {
        "json",
        "regex",
        "choice",
        "grammar",
    }
