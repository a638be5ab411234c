"""What every request passes, and what is said when something goes wrong, over real HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api_server import scripted, serving
from mtpbatch import Engine
from mtpbatch.server import create_app
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from patience import until

pytestmark = pytest.mark.anyio

ASK: dict[str, Any] = {"prompt": "Is it raining?", "max_tokens": 20}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Is it raining?"}]}
EMBED: dict[str, Any] = {"input": "Is it raining?"}
POSTS = {"/v1/completions": ASK, "/v1/chat/completions": CHAT, "/v1/embeddings": EMBED}
GETS = ("/v1/models", "/v1/models/mtpbatch", "/openapi.json", "/metrics", "/health")


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Its error object, of the one form that all have."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


def events(text: str) -> list[Any]:
    """What a stream holds, "[DONE]" included."""
    found = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in found)
    data = [event.removeprefix("data: ") for event in found]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


# ------------------------------------------------------------------ clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_who_disconnects_takes_part_in_no_step_after_the_one_under_way(
    path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A raw socket asks for 200 tokens and is closed while step 5 is held: no step 6 begins."""
    caplog.set_level(logging.INFO, "mtpbatch")
    backend = ScriptedBackend(lambda _: "a" * 300, n_ctx=512, mtp=False)
    gate = backend.hold_step(5)
    async with open_scripted_engine(backend) as engine, serving(create_app(engine)) as url:
        body = json.dumps(POSTS[path] | {"max_tokens": 200, "stream": stream}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client = await anyio.connect_tcp("127.0.0.1", int(url.rpartition(":")[2]))
        await client.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await gate.reached()
        await anyio.aclose_forcefully(client)
        await until(lambda: "http.request" in caplog.text)  # the server is done with it
        assert "http.client_gone" in caplog.text
        gate.release()
        await until(lambda: engine.stats().finished["abort"] == 1)
        await until(lambda: engine.stats().free_sequences == engine.config.n_seq)
        assert backend.n_steps == 6


async def test_who_disconnects_in_the_queue_or_in_the_middle_of_a_body_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mtpbatch")
    backend = ScriptedBackend(n_seq=1)
    gate = backend.hold_step(0)
    async with scripted(backend) as (engine, client), anyio.create_task_group() as group:
        group.start_soon(lambda: client.post("/v1/completions", json=ASK))
        await gate.reached()
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json=ASK, timeout=0.2)
        await until(lambda: caplog.text.count("http.request") == 1)

        async def half() -> AsyncIterator[bytes]:
            yield b'{"prompt": '
            raise ConnectionAbortedError

        headers = {"content-type": "application/json"}
        with pytest.raises(ConnectionAbortedError):
            await client.post("/v1/completions", content=half(), headers=headers)
        await until(lambda: caplog.text.count("http.request") == 2)
        assert caplog.text.count("http.client_gone") == 2
        gate.release()
        await until(lambda: engine.stats().finished["abort"] == 1)


async def test_who_stays_is_not_said_to_have_gone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mtpbatch")
    async with scripted(ScriptedBackend()) as (_, client):
        for path, body in POSTS.items():
            for more in ({}, {"stream": True}) if body is not EMBED else ({},):
                response = await client.post(path, json=body | more)
                assert response.status_code == 200
        await until(lambda: caplog.text.count("http.request") == 5)
    assert "http.client_gone" not in caplog.text


# ---------------------------------------------------------------------------- overload


@pytest.mark.parametrize("on_full", ["wait", "reject"])
async def test_a_full_queue_is_429_and_says_when_to_try_again(on_full: Any) -> None:
    backend = ScriptedBackend(n_seq=1, max_waiting=1, on_full=on_full)
    gate = backend.hold_step(0)
    async with scripted(backend) as (_, client), anyio.create_task_group() as group:
        statuses = []

        async def ask() -> None:
            statuses.append((await client.post("/v1/completions", json=ASK)).status_code)

        group.start_soon(ask)
        await gate.reached()
        group.start_soon(ask)
        while (await client.get("/health")).json()["waiting"] < 1:
            pass
        for path in ("/v1/completions", "/v1/chat/completions"):
            for stream in (False, True):
                refused = await client.post(path, json=POSTS[path] | {"stream": stream})
                assert refused.status_code == 429
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                error = error_of(refused)
                assert error["code"] == "engine_overloaded"
                assert "1 requests run and 1 wait" in error["message"]
        gate.release()
    assert statuses == [200, 200]


async def test_of_several_answers_all_or_none_are_begun() -> None:
    """Of three that are asked for, one finds no room: the other two end as well."""
    backend = ScriptedBackend(n_seq=1, max_waiting=2)
    gate = backend.hold_step(0)
    async with scripted(backend) as (engine, client):
        runs = engine.submit("a", max_tokens=1)
        refused = await client.post("/v1/completions", json=ASK | {"n": 3})
        assert refused.status_code == 429
        gate.release()
        await runs
        await until(lambda: engine.stats().finished["abort"] == 2)
        await until(lambda: engine.stats().free_sequences == 1)
        assert sum(engine.stats().finished.values()) == 3
        assert (await client.post("/v1/completions", json=ASK | {"n": 2})).status_code == 200


async def test_more_answers_than_ever_find_room_are_400_and_not_429() -> None:
    """Who is told to try again would do so for ever."""
    async with scripted(ScriptedBackend(n_seq=2, max_waiting=1)) as (_, client):
        for more, field in (({"n": 4}, "n"), ({"prompt": ["a"] * 4}, "prompt")):
            refused = await client.post("/v1/completions", json=ASK | more)
            assert (refused.status_code, error_of(refused)["param"]) == (400, field)
            assert "there is room for 3" in error_of(refused)["message"]
        assert (await client.post("/v1/completions", json=ASK | {"n": 3})).status_code == 200


@pytest.mark.parametrize("text", ["word ", "w"])
async def test_too_long_a_prompt_is_400_with_the_figures(text: str) -> None:
    """Long texts are tokenised elsewhere, and found too long later than short ones."""
    async with scripted(ScriptedBackend(n_ctx=64)) as (_, client):
        long = text * (500 if text == "word " else 100)
        chat = {"messages": [{"role": "user", "content": long}]}
        for path, asked, field in (
            ("/v1/completions", {"prompt": long}, "prompt"),
            ("/v1/chat/completions", chat, "messages"),
        ):
            for stream in (False, True):
                response = await client.post(path, json=asked | {"stream": stream})
                assert response.status_code == 400
                error = error_of(response)
                assert (error["param"], error["code"]) == (field, "context_length_exceeded")
                assert error["message"].startswith(f"{field}: has ")
                assert "n_ctx=64" in error["message"]


async def test_too_large_a_body_is_413_whether_it_says_so_beforehand_or_not() -> None:
    async with scripted(ScriptedBackend(), max_body=100) as (_, client):
        large = json.dumps(ASK | {"prompt": "a" * 200}).encode()

        async def in_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 10):
                yield large[start : start + 10]

        for content in (large, in_pieces()):
            headers = {"content-type": "application/json"}
            response = await client.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert "more than 100 bytes" in error_of(response)["message"]
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200


HALF = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"prompt": '
)
"""A request whose body does not all come."""


async def all_of(client: anyio.abc.ByteStream) -> tuple[bytes, Any]:
    """What a server sends until it closes the connection: its head, and its error's code."""
    answer = b"".join([part async for part in client])
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, json.loads(body)["error"]["code"]


async def test_a_body_that_does_not_come_is_408_and_the_connection_is_closed() -> None:
    # Long enough for a body that is sent at once, on a busy machine too.
    async with scripted(ScriptedBackend(), body_timeout=1.0) as (_, http):
        port = http.base_url.port
        assert port is not None
        async with await anyio.connect_tcp("127.0.0.1", port) as client:
            await client.send(HALF)
            with anyio.fail_after(30):
                head, code = await all_of(client)
        assert head.startswith(b"HTTP/1.1 408 ")
        assert code == "body_too_slow"
        assert (await http.post("/v1/completions", json=ASK)).status_code == 200


# ---------------------------------------------------------------------- how engines end


@pytest.mark.parametrize("dies", [False, True], ids=["closed", "dead"])
async def test_an_engine_that_ends_waits_for_no_body(dies: bool) -> None:
    backend = ScriptedBackend()
    gate = backend.hold_step(0)
    if dies:
        backend.fail_step(0, RuntimeError())
    async with scripted(backend) as (engine, http), anyio.create_task_group() as group:
        port = http.base_url.port
        assert port is not None
        group.start_soon(lambda: http.post("/v1/completions", json=ASK))
        await gate.reached()
        async with await anyio.connect_tcp("127.0.0.1", port) as client:
            await client.send(HALF)
            assert (await http.get("/v1/models")).status_code == 200  # the other one is in by now
            gate.release()
            if not dies:
                await engine.drain()
                await engine.aclose()
            with anyio.fail_after(30):
                answer = await client.receive()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert (b"engine_dead" if dies else b"engine_closed") in answer


async def test_while_the_engine_drains_new_requests_are_503_and_old_ones_end() -> None:
    backend = ScriptedBackend(lambda _: "abc")
    gate = backend.hold_step(0)
    async with scripted(backend) as (engine, client), anyio.create_task_group() as group:
        answers = []

        async def ask() -> None:
            answers.append(await client.post("/v1/completions", json=ASK))

        group.start_soon(ask)
        await gate.reached()
        group.start_soon(engine.drain)
        await until(lambda: engine.draining)
        for path, body in POSTS.items():
            response = await client.post(path, json=body)
            assert response.status_code == 503
            assert error_of(response)["code"] == "engine_closed"
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/v1/models")).status_code == 200
        gate.release()
    assert answers[0].json()["choices"][0]["text"] == "abc"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_draining_cuts_off_is_no_answer(stream: bool) -> None:
    backend = ScriptedBackend(lambda _: "abc" * 9, mtp=False)
    gate = backend.hold_step(3)
    async with scripted(backend) as (engine, client), anyio.create_task_group() as group:

        async def drain() -> None:
            await gate.reached()
            await engine.drain(timeout=0)
            gate.release()

        group.start_soon(drain)
        response = await client.post("/v1/completions", json=ASK | {"stream": stream})
        if stream:
            assert response.status_code == 200
            assert events(response.text)[-1]["error"]["code"] == "engine_closed"
        else:
            assert response.status_code == 503
            assert error_of(response)["code"] == "engine_closed"


async def test_when_the_engine_dies_all_endpoints_but_its_metrics_are_503() -> None:
    backend = ScriptedBackend(lambda _: "abc" * 9, mtp=False)
    backend.fail_step(3, RuntimeError("secret"))
    async with scripted(backend) as (_, client):
        response = await client.post("/v1/completions", json=ASK)
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_dead"
        later = [await client.post(path, json=body) for path, body in POSTS.items()]
        later += [await client.get(path) for path in GETS if path != "/metrics"]
        assert [response.status_code for response in later] == [503] * 7
        assert "secret" not in "".join(response.text for response in later)
        assert await ups(client) == ["0.0"]


async def test_metrics_say_that_the_engine_is_closed() -> None:
    async with scripted(ScriptedBackend()) as (engine, client):
        assert await ups(client) == ["1.0"]
        await engine.aclose()
        assert await ups(client) == ["0.0"]


async def ups(client: Any) -> list[str]:
    """Whether the engine is up, by its metrics."""
    scraped = await client.get("/metrics")
    assert scraped.status_code == 200
    lines = scraped.text.splitlines()
    return [line.split()[-1] for line in lines if line.startswith("mtpbatch_engine_up{")]


async def test_a_request_under_which_the_model_dies_is_to_be_sent_again() -> None:
    backend = ScriptedBackend(lambda _: "abc" * 9, mtp=False)
    backend.die_in_step(3)
    async with scripted(backend) as (_, client):
        response = await client.post("/v1/completions", json=ASK)
        health = await client.get("/health")
        for one in (response, health):
            assert one.status_code == 503
            assert error_of(one)["code"] == "engine_restarting"
            assert one.headers["retry-after"] == "1"
        backend.clock.advance(1.0)
        response = await client.post("/v1/completions", json=ASK)
        assert response.status_code == 200, "it waits, if need be"
        assert (await client.get("/health")).status_code == 200


async def test_health_says_when_no_step_ends() -> None:
    backend = ScriptedBackend()
    gate = backend.hold_step(0)
    async with scripted(backend, stall_timeout=5) as (_, client):
        assert (await client.get("/health")).json() == {"status": "ok", "running": 0, "waiting": 0}
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/v1/completions", json=ASK))
            await gate.reached()
            backend.clock.advance(6)
            response = await client.get("/health")
            assert response.status_code == 503
            assert error_of(response)["code"] == "engine_stalled"
            assert (await client.get("/v1/models")).status_code == 200
            gate.release()
        assert (await client.get("/health")).status_code == 200


# ------------------------------------------------------------------- errors, told and untold


async def test_a_failure_in_a_stream_is_an_event_and_its_end() -> None:
    backend = ScriptedBackend(lambda _: "abc" * 9, mtp=False)
    backend.fail_step(3)
    async with scripted(backend) as (_, client):
        response = await client.post("/v1/completions", json=ASK | {"stream": True})
        assert response.status_code == 200
        *parts, last = events(response.text)
        assert "".join(part["choices"][0]["text"] for part in parts) == "abc" * 3
        assert last["error"]["code"] == "internal_error"
        assert response.headers["x-request-id"] in last["error"]["message"]
        backend.fail_step(backend.n_steps + 1)
        response = await client.post("/v1/completions", json=ASK)
        assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")


async def test_what_nobody_foresaw_is_told_as_an_id_and_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Engine, "submit_n", broken)  # within an endpoint that reads a body
    monkeypatch.setattr(Engine, "draining", property(broken))  # and in one that does not
    async with scripted(ScriptedBackend()) as (_, client):
        given = {"x-request-id": "mine-1"}
        for response in (
            await client.post("/v1/completions", json=ASK, headers=given),
            await client.get("/health", headers=given),
        ):
            assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
            assert "secret" not in response.text
            assert "mine-1" in error_of(response)["message"]
    failures = [record for record in caplog.records if "http.failed" in record.message]
    assert len(failures) == 2
    for failed in failures:
        assert "http_request_id='mine-1'" in failed.message
        assert failed.exc_info is not None
        assert str(failed.exc_info[1]) == "secret"


async def test_a_request_id_is_taken_over_comes_back_and_stands_in_the_engines_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "mtpbatch")
    async with scripted(ScriptedBackend()) as (_, client):
        given = {"x-request-id": "order-7/a"}
        response = await client.post("/v1/completions", json=ASK, headers=given)
        assert response.headers["x-request-id"] == "order-7/a"
        for event in ("request.submitted", "request.ended", "http.request"):
            [line] = [r.message for r in caplog.records if r.message.startswith(event)]
            assert "http_request_id='order-7/a'" in line
        for strange in ("two words", "a" * 200, "new%0Aline'"):
            response = await client.get("/health", headers={"x-request-id": strange})
            assert response.headers["x-request-id"] != strange
            assert len(response.headers["x-request-id"]) == 24


async def test_keys_are_asked_for_everywhere_but_for_health_and_the_description() -> None:
    async with scripted(ScriptedBackend(), api_keys=["one", "two"]) as (_, client):
        for header in (None, "Bearer three", "Bearer", "Bearer onetwo", "Basic one", "one"):
            headers: dict[str, str] = {} if header is None else {"authorization": header}
            answers = [await client.post(p, json=b, headers=headers) for p, b in POSTS.items()]
            answers += [
                await client.get(p, headers=headers) for p in ("/v1/models", "/metrics", "/nothing")
            ]
            for response in answers:
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["code"] == "invalid_api_key"
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            for path, body in POSTS.items():
                assert (await client.post(path, json=body, headers=headers)).status_code == 200
        for path in ("/health", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_metrics_count_what_was_answered() -> None:
    async with scripted(ScriptedBackend(lambda _: "abc" * 30), model_name="mine") as (_, client):
        for tokens in (3, 4):
            asked = ASK | {"max_tokens": tokens}
            assert (await client.post("/v1/completions", json=asked)).status_code == 200
        scraped = await client.get("/metrics")
    assert scraped.headers["content-type"].startswith("text/plain")
    values = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(scraped.text)
        for sample in family.samples
        if sample.labels["model_name"] == "mine"
    }
    assert values["mtpbatch_request_success_total", "length"] == 2
    assert values["mtpbatch_generation_tokens_total", None] == 7
    assert values["mtpbatch_e2e_request_latency_seconds_count", None] == 2


async def test_the_live_page_is_there_and_its_events_ask_for_a_key() -> None:
    async with scripted(ScriptedBackend(), api_keys=["key"]) as (_, client):
        assert "<html" in (await client.get("/")).text
        assert error_of(await client.get("/live/events"))["code"] == "invalid_api_key"
        headers = {"authorization": "Bearer key"}
        async with client.stream("GET", "/live/events", headers=headers) as events:
            assert events.status_code == 200
            assert (await anext(events.aiter_lines())).startswith("data: ")


async def test_paths_and_methods_that_are_none() -> None:
    async with scripted(ScriptedBackend()) as (_, client):
        for response, status, words in (
            (await client.get("/v1/nothing"), 404, "GET /v1/nothing: Not Found"),
            (await client.get("/v1/completions"), 405, "Method Not Allowed"),
            (await client.post("/health"), 405, "Method Not Allowed"),
            (await client.post("/metrics"), 405, "Method Not Allowed"),
            (await client.get("/v1/models/other"), 404, "there is no 'other'"),
            (await client.post("/v1/completions", content=b"{}"), 415, "Content-Type"),
        ):
            assert response.status_code == status
            assert words in error_of(response)["message"]


HOSTILE = {
    "not JSON": b"{",
    "no object": b"[1]",
    "deep": b'{"messages": ' + b"[" * 100_000,
    "deep inside": b'{"messages": [{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
    "not UTF-8": b'{"prompt": "\xff"}',
    "half a character": b'{"prompt": "\\ud800", "messages": [{"role": "\\ud800"}]}',
    "large number": b'{"prompt": "a", "messages": [], "input": "a", "seed": 1e400}',
    "empty": b"",
}


@pytest.mark.parametrize("path", POSTS)
async def test_bodies_that_are_no_requests_are_400(path: str) -> None:
    async with scripted(ScriptedBackend()) as (_, client):
        for body in HOSTILE.values():
            headers = {"content-type": "application/json"}
            response = await client.post(path, content=body, headers=headers)
            assert response.status_code == 400, body[:50]
            error_of(response)


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/completions", {"max_tokens": "9"}, "max_tokens", "must be int"),
    ("/v1/completions", {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("/v1/completions", {"max_token": 9}, "max_token", "is not known"),
    ("/v1/completions", {"prompt": ["a", [1]]}, "prompt", "not both"),
    ("/v1/completions", {"prompt": []}, "prompt", "length >= 1"),
    ("/v1/completions", {"prompt": [9999]}, "prompt", "out of range"),
    ("/v1/completions", {"prompt": ""}, "prompt", "is empty"),
    ("/v1/completions", {"best_of": 2}, "best_of", "must be n=1"),
    ("/v1/completions", {"suffix": "a"}, "suffix", "enum value 'a'"),
    ("/v1/completions", {"n": 0}, "n", ">= 1"),
    ("/v1/completions", {"speculation": 9}, "speculation", "deeper"),
    ("/v1/completions", {"min_tokens": 99}, "min_tokens", "at most max_tokens=20"),
    ("/v1/completions", {"logit_bias": {"9999": 1}}, "logit_bias", "out of range"),
    ("/v1/completions", {"logit_bias": {"a": 1}}, "logit_bias", "must be int, got str"),
    ("/v1/completions", {"logprobs": 21}, "logprobs", "<= 20"),
    ("/v1/completions", {"structured_outputs": {}}, "structured_outputs", "is empty"),
    (
        "/v1/completions",
        {"structured_outputs": {"choice": []}},
        "structured_outputs.choice",
        "length >= 1",
    ),
    (
        "/v1/completions",
        {"stream": True, "echo": True, "logprobs": 1},
        "echo",
        "cannot be combined",
    ),
    (
        "/v1/completions",
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs.choice",
        "cannot be combined",
    ),
    ("/v1/completions", {"stream_options": {}}, "stream_options", "needs stream"),
    ("/v1/chat/completions", {"stream_options": {}}, "stream_options", "needs stream"),
    ("/v1/chat/completions", {"messages": []}, "messages", "length >= 1"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "only text parts",
    ),
    ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice", "needs tools"),
    ("/v1/chat/completions", {"tools": [{"type": "x"}]}, "tools", "tool 0"),
    (
        "/v1/chat/completions",
        {
            "tools": [
                {"function": {"name": name, "parameters": {"$defs": [1]}}} for name in ("f", "g")
            ],
            "tool_choice": "required",
        },
        "tools",
        "$defs of 'f' must be an object",
    ),
    ("/v1/chat/completions", {"store": True}, "store", ""),
    ("/v1/chat/completions", {"model": "other"}, "model", "there is no 'other'"),
    (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "is missing",
    ),
    (
        "/v1/chat/completions",
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "xml",
    ),
    (
        "/v1/chat/completions",
        {"max_tokens": 3, "max_completion_tokens": 3},
        "max_tokens",
        "cannot be combined",
    ),
    (
        "/v1/chat/completions",
        {"max_completion_tokens": 3, "min_tokens": 4},
        "min_tokens",
        "at most",
    ),
    ("/v1/embeddings", {"dimensions": 3}, "dimensions", "must be 8"),
    ("/v1/embeddings", {"input": ""}, "input", "the text at index 0 is empty"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "at most 2048"),
    ("/v1/embeddings", {"encoding_format": "hex"}, "encoding_format", "hex"),
]


async def test_a_wrong_value_is_told_by_the_name_of_its_field() -> None:
    async with scripted(ScriptedBackend()) as (_, client):
        for path, more, field, words in WRONG:
            response = await client.post(path, json=POSTS[path] | more)
            assert response.status_code == (404 if field == "model" else 400), more
            error = error_of(response)
            assert error["param"] == field, more
            assert error["message"].startswith(f"{field}: "), error
            assert words in error["message"], error
