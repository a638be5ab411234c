"""What the ingress makes of replicas that die, are full, or are not wanted any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.types import Message, Scope

from mtpbatch.scaleout.ingress import PassOn
from mtpbatch.scaleout.passing import HttpRequest

pytestmark = pytest.mark.anyio

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
START: Message = {"type": "http.response.start", "status": 200, "headers": [EVENTS]}
DEAD = ActorDiedError()


def part(text: str, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Script:
    """An answer written down beforehand; an exception is raised, an event is waited for."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[list[Message]]:
        for item in self.items:
            match item:
                case Exception():
                    raise item
                case anyio.Event():
                    await item.wait()
                case list():
                    yield item
                case _:
                    yield [item]

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    def __init__(self, *scripts: Script) -> None:
        self.scripts = scripts
        self.asked: list[HttpRequest] = []

    def ask(self, request: HttpRequest) -> Script:
        self.asked.append(request)
        return self.scripts[len(self.asked) - 1]


async def post(replicas: Replicas, body: bytes = b"{}") -> httpx.Response:
    transport = httpx.ASGITransport(PassOn(replicas.ask, max_body=1000, body_timeout=60))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
        return await client.post("/v1/completions?x=1", content=body)


async def run(ask: Callable[[HttpRequest], Script], gone: anyio.Event) -> list[Message]:
    """What is sent to a client that goes once nothing more can happen, if ``gone`` is set."""
    request: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if request:
            return request.pop()
        await gone.wait()
        await anyio.wait_all_tasks_blocked()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [],
    }
    await PassOn(ask, 1000, 60)(scope, receive, send)
    return sent


def error_of(body: bytes) -> Any:
    return msgspec.json.decode(body)["error"]


async def test_an_answer_comes_as_the_replica_sends_it() -> None:
    replicas = Replicas(Script([START, part("a")], [part("b"), part("c")], part("", more=False)))
    response = await post(replicas, b'{"prompt": "x"}')
    assert (response.status_code, response.text) == (200, "abc")
    [request] = replicas.asked
    assert (request.method, request.path) == ("POST", "/v1/completions")
    assert (request.query_string, request.body) == (b"x=1", b'{"prompt": "x"}')
    assert request.beginning
    assert replicas.scripts[0].cancelled  # harmless, as it has ended


@pytest.mark.parametrize("sent", [(), (START,), (START, part(""))])
async def test_a_replica_that_dies_before_anything_was_sent_is_made_up_for(
    sent: tuple[Message, ...],
) -> None:
    replicas = Replicas(Script(*sent, DEAD), Script(START, part("all of it", more=False)))
    response = await post(replicas)
    assert (response.status_code, response.text) == (200, "all of it")
    assert replicas.asked[0] == replicas.asked[1]


async def test_after_that_the_answer_ends_with_an_error_event() -> None:
    replicas = Replicas(Script(START, part("data: 1\n\n"), DEAD))
    response = await post(replicas)
    *events, last, rest = response.text.split("\n\n")
    assert (response.status_code, events, rest) == (200, ["data: 1"], "")
    error = error_of(last.removeprefix("data: ").encode())
    assert (error["code"], "send the request again" in error["message"]) == ("replica_died", True)


async def test_an_answer_of_another_kind_has_no_end_then() -> None:
    start: Message = {**START, "headers": [(b"content-type", b"application/json")]}
    half = part('{"half":')
    sent = await run(Replicas(Script(start, half, DEAD)).ask, anyio.Event())
    assert sent == [start, half]


async def test_a_request_that_replicas_die_of_takes_two_of_them() -> None:
    replicas = Replicas(Script(DEAD), Script(START, DEAD), Script(START))
    response = await post(replicas)
    assert (response.status_code, len(replicas.asked)) == (503, 2)
    assert response.headers["retry-after"]
    assert error_of(response.content)["code"] == "replica_died"


async def test_full_replicas_are_a_429() -> None:
    response = await post(Replicas(Script(BackPressureError(9, 8))))
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")
    assert error_of(response.content)["code"] == "engine_overloaded"


async def test_a_bug_in_a_replica_is_a_500_that_tells_nothing_of_it() -> None:
    failure = RayTaskError("answer", "Traceback: secret", ValueError("secret"))
    response = await post(Replicas(Script(failure)))
    assert response.status_code == 500
    assert "secret" not in response.text


async def test_an_error_after_the_end_of_an_answer_changes_nothing() -> None:
    failure = RayTaskError("answer", "Traceback", ValueError())
    response = await post(Replicas(Script(START, part("done", more=False), failure)))
    assert (response.status_code, response.text) == (200, "done")


async def test_too_large_a_body_is_refused_here() -> None:
    replicas = Replicas()
    response = await post(replicas, b"x" * 1001)
    assert (response.status_code, replicas.asked) == (413, [])
    assert "1000 bytes" in error_of(response.content)["message"]


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    with anyio.fail_after(30):
        await PassOn(Replicas().ask, 1000, 0.01)({"type": "http"}, receive, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert error_of(sent[1]["body"])["code"] == "body_too_slow"


@pytest.mark.parametrize("before", [(), (START, part("a"))])
async def test_a_client_that_goes_cancels_the_call(before: tuple[Message, ...]) -> None:
    script = Script(*before, anyio.Event())
    gone = anyio.Event()

    def ask(request: HttpRequest) -> Script:
        gone.set()
        return script

    assert await run(ask, gone) == [*before]
    assert script.cancelled


async def test_a_client_that_goes_while_it_sends_is_not_answered() -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError

    await PassOn(Replicas().ask, 1000, 60)({"type": "http"}, receive, send)
