"""Clients that know nothing of mtpbatch: OpenAI's own, curl, and llm, on the demo model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import fastapi
import httpx
import numpy as np
import openai
import pydantic
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import mtpbatch
from api_server import serving
from mtpbatch import Engine, EngineConfig
from mtpbatch.server import create_app
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from patience import until

pytestmark = pytest.mark.anyio

PROMPT = "And Moses said unto the children of Israel,"
MESSAGES: Any = [{"role": "user", "content": "In the beginning"}]
SETTINGS: dict[str, Any] = {"n_seq": 4, "n_ctx": 512, "n_threads": 1, "kv_type": "f32"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Genf"]}, "day": {"$ref": "#/$defs/day"}},
            "required": ["city", "day"],
            "additionalProperties": False,
            "$defs": {"day": {"enum": ["today", "tomorrow"]}},
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}

_Result = TypeVar("_Result")


@pytest.fixture
async def engine(demo_f32_path: Path) -> AsyncIterator[Engine]:
    async with Engine.open(demo_f32_path, **SETTINGS) as engine:
        yield engine


@pytest.fixture
async def url(engine: Engine) -> AsyncIterator[str]:
    async with serving(create_app(engine, model_name="demo", api_keys=["key"])) as url:
        yield f"{url}/v1"


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
        yield client


async def with_sync_client(url: str, work: Callable[[openai.OpenAI], _Result]) -> _Result:
    """What the client that blocks gives, in a thread."""

    def run() -> _Result:
        with openai.OpenAI(base_url=url, api_key="key", max_retries=0) as client:
            return work(client)

    return await anyio.to_thread.run_sync(run)


# ------------------------------------------------------------------------ OpenAI's client


async def test_completions_are_the_engines_own(
    engine: Engine, client: openai.AsyncOpenAI, url: str
) -> None:
    """With drafts over HTTP and without them in the process, whole and in a stream."""
    wanted = await engine.generate(PROMPT, max_tokens=30, logprobs=2, speculation=0)
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    done = await client.completions.create(**asked, logprobs=2, extra_body={"speculation": 3})
    [choice] = done.choices
    assert (choice.text, choice.finish_reason) == (wanted.text, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == wanted.text
    assert wanted.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(
        [told.logprob for told in wanted.logprobs], abs=1e-4
    )
    assert choice.logprobs.text_offset is not None
    assert [wanted.text[i:][:1] for i in choice.logprobs.text_offset] == [
        token[:1] for token in choice.logprobs.tokens
    ]
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert done.usage.completion_tokens == 30
    assert done.usage.completion_tokens_details is not None
    assert done.usage.completion_tokens_details.accepted_prediction_tokens > 0

    def blocking(sync: openai.OpenAI) -> str:
        return str(sync.completions.create(**asked).choices[0].text)

    assert await with_sync_client(url, blocking) == wanted.text
    stream = await client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, logprobs=2
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == wanted.text
    tokens = [
        t
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for t in c.choices[0].logprobs.tokens or ()
    ]
    assert tokens == choice.logprobs.tokens
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("n", [1, 2])
async def test_events_tell_the_usage_so_far_as_vllm_has_it(
    engine: Engine, client: openai.AsyncOpenAI, n: int
) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    shared: dict[str, Any] = {"model": "demo", "max_tokens": 12, "n": n, "stream": True}
    shared |= {"extra_body": {"ignore_eos": True}, "stream_options": options}
    text = "In the beginning"
    prompt = await engine.chat_prompt([{"role": "user", "content": text}])
    streams: list[tuple[Any, list[int]]] = [
        (
            await client.completions.create(prompt=text, logprobs=0, **shared),
            await engine.tokenize(text),
        ),
        (
            await client.chat.completions.create(
                messages=[{"role": "user", "content": text}], logprobs=True, **shared
            ),
            await engine.tokenize(prompt.text, add_special=False),
        ),
    ]
    for stream, token_ids in streams:
        *chunks, last = [chunk async for chunk in stream]
        for index in range(n):
            told = 0
            for chunk in [chunk for chunk in chunks if chunk.choices[0].index == index]:
                logprobs = chunk.choices[0].logprobs
                if logprobs is not None:
                    told += len(getattr(logprobs, "content", None) or logprobs.tokens)
                assert chunk.usage.prompt_tokens == len(token_ids)
                assert chunk.usage.total_tokens == len(token_ids) + chunk.usage.completion_tokens
                assert chunk.usage.completion_tokens == told
            assert told == 12
        assert last.choices == []
        assert last.usage.completion_tokens == 12 * n


async def test_many_prompts_and_many_answers_come_in_order(
    engine: Engine, client: openai.AsyncOpenAI
) -> None:
    prompts = ["In the", "def main(", "And"]
    asked: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 8,
        "temperature": 0.8,
        "seed": 7,
        "n": 2,
    }
    wanted = [
        done.text
        for prompt in prompts
        for done in await engine.generate_n(prompt, 2, max_tokens=8, temperature=0.8, seed=7)
    ]
    done = await client.completions.create(prompt=prompts, **asked)
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [choice.text for choice in done.choices] == wanted
    assert done.usage is not None
    token_ids = [await engine.tokenize(prompt) for prompt in prompts]
    assert done.usage.prompt_tokens == sum(map(len, token_ids))
    as_ids = await client.completions.create(prompt=token_ids, **asked)
    assert [choice.text for choice in as_ids.choices] == wanted
    texts = [""] * 6
    async for chunk in await client.completions.create(prompt=prompts, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == wanted


async def test_echo_tells_how_probable_the_prompt_is(
    engine: Engine, client: openai.AsyncOpenAI
) -> None:
    """As evaluation harnesses ask: nothing is generated, and each token of the prompt is told."""
    wanted = await engine.generate(PROMPT, max_tokens=1, prompt_logprobs=1)
    assert wanted.prompt_logprobs is not None
    alone = await client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
    )
    [choice] = alone.choices
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [told.logprob for told in wanted.prompt_logprobs], abs=1e-4
    )
    more = await client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=3, echo=True, temperature=0
    )
    assert more.choices[0].text.startswith(PROMPT)
    assert len(more.choices[0].text) > len(PROMPT)


async def test_a_chat_is_the_engines_own(
    engine: Engine, client: openai.AsyncOpenAI, url: str
) -> None:
    wanted = await engine.chat(MESSAGES, max_tokens=20, ignore_eos=True, speculation=0)
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": MESSAGES,
        "max_completion_tokens": 20,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    done = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    [choice] = done.choices
    assert (choice.message.content, choice.message.role) == (wanted.content, "assistant")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    said = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert said.decode() == wanted.completion.text
    for token in choice.logprobs.content:
        assert token.logprob <= token.top_logprobs[0].logprob + 1e-6

    def blocking(sync: openai.OpenAI) -> list[str | None]:
        return [
            chunk.choices[0].delta.content
            for chunk in sync.chat.completions.create(**asked, stream=True)
        ]

    pieces = await with_sync_client(url, blocking)
    assert len(pieces) > 2
    assert "".join(piece or "" for piece in pieces) == wanted.content
    # The conversation goes on with the message as the client has it.
    more = [*MESSAGES, choice.message.model_dump(), {"role": "user", "content": "Go on."}]
    again = await client.chat.completions.create(model="demo", messages=more, max_tokens=4)
    assert again.usage is not None
    assert again.usage.prompt_tokens > (done.usage.prompt_tokens if done.usage else 0)


async def test_a_streamed_chat_tells_of_each_token_once(client: openai.AsyncOpenAI) -> None:
    texts, told = ["", ""], [b"", b""]
    async for chunk in await client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=20, logprobs=True, n=2, seed=3, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for token in (choice.logprobs.content or ()) if choice.logprobs else ():
                told[choice.index] += bytes(token.bytes or ())
    assert [part.decode() for part in told] == texts
    assert texts[0] != texts[1]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    age: int = pydantic.Field(ge=0, le=99)


async def test_parse_gives_what_the_type_says(client: openai.AsyncOpenAI, url: str) -> None:
    for n in (1, 2):
        done = await client.chat.completions.parse(
            model="demo", messages=MESSAGES, response_format=Person, max_tokens=200, n=n, seed=1
        )
        for choice in done.choices:
            assert isinstance(choice.message.parsed, Person)

    def blocking(sync: openai.OpenAI) -> object:
        return (
            sync.chat.completions.parse(
                model="demo", messages=MESSAGES, response_format=Person, max_tokens=200, seed=1
            )
            .choices[0]
            .message.parsed
        )

    assert isinstance(await with_sync_client(url, blocking), Person)
    one_of = await client.completions.create(
        model="demo",
        prompt=PROMPT,
        extra_body={"structured_outputs": {"choice": ["good", "bad"]}},
    )
    assert one_of.choices[0].text in ("good", "bad")
    # An object of any kind may not end by itself: what comes begins one.
    anything = await client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=20
    )
    assert (anything.choices[0].message.content or "").startswith("{")


async def test_calls_that_are_insisted_on_come_and_fit(client: openai.AsyncOpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice, names in ((named, {"weather"}), ("required", {"weather", "clock"})):
        asked: dict[str, Any] = {
            "model": "demo",
            "messages": MESSAGES,
            "tools": [WEATHER, CLOCK],
            "tool_choice": choice,
            "max_tokens": 100,
            "seed": 1,
        }
        done = await client.chat.completions.create(**asked)
        answer = done.choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        async with client.chat.completions.stream(**asked) as stream:
            streamed = (await stream.get_final_completion()).choices[0]
        for message in (answer.message, streamed.message):
            assert message.tool_calls is not None
            [call] = message.tool_calls
            assert call.type == "function"
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                assert arguments.keys() == {"city", "day"}
                assert arguments["day"] in ("today", "tomorrow")
            else:
                assert arguments == {}
    cut_off = await client.chat.completions.create(**{**asked, "max_tokens": 2})
    assert cut_off.choices[0].finish_reason == "length"
    assert cut_off.choices[0].message.tool_calls is None


async def test_a_call_and_its_result_can_be_sent_back(client: openai.AsyncOpenAI) -> None:
    """The demo model's template reads every message's content; a call has none."""
    asked: Any = {"model": "demo", "tools": [CLOCK], "max_tokens": 40, "seed": 1}
    called = await client.chat.completions.create(
        messages=MESSAGES, tool_choice="required", **asked
    )
    message = called.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "noon"}
    said: Any = {**message.to_dict(), "content": ""}
    answers = [
        await client.chat.completions.create(messages=[*MESSAGES, each, result], **asked)
        for each in (message, said)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage is not None
    assert answers[1].usage is not None
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens


HERMES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools }}{% endif %}assistant: {# <think> </think> <tool_call> #}"
)
CALLS = (
    "<think>Hm.</think>One moment."
    '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
)


async def test_calls_that_the_model_makes_by_itself_are_found() -> None:
    backend = ScriptedBackend(
        lambda prompt: CALLS if "weather" in prompt else "No.", chat_template=HERMES, n_ctx=2048
    )
    async with (
        open_scripted_engine(backend) as engine,
        serving(create_app(engine)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        asked: dict[str, Any] = {
            "model": "mtpbatch",
            "messages": MESSAGES,
            "tools": [WEATHER, CLOCK],
        }
        whole = (await client.chat.completions.create(**asked)).choices[0]
        async with client.chat.completions.stream(**asked, logprobs=True) as stream:
            streamed = (await stream.get_final_completion()).choices[0]
        for choice in (whole, streamed):
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "One moment.")
            calls = choice.message.tool_calls or []
            assert [call.type for call in calls] == ["function"] * 2
            functions = [call.function for call in calls if call.type == "function"]
            assert [function.name for function in functions] == ["weather", "clock"]
            assert json.loads(functions[0].arguments) == {"city": "Bern"}
            assert len({call.id for call in calls}) == 2
        assert (whole.message.model_extra or {})["reasoning_content"] == "Hm."
        assert streamed.logprobs is not None
        told = b"".join(bytes(t.bytes or ()) for t in streamed.logprobs.content or ())
        assert told.decode() == CALLS
        one = await client.chat.completions.create(**asked, parallel_tool_calls=False)
        assert len(one.choices[0].message.tool_calls or ()) == 1
        none = await client.chat.completions.create(**asked, tool_choice="none")
        assert (none.choices[0].message.content, none.choices[0].finish_reason) == ("No.", "stop")


async def test_embeddings_are_the_engines_own(
    engine: Engine, client: openai.AsyncOpenAI, url: str
) -> None:
    """The client asks for base64 unless it is told otherwise, and decodes it itself."""
    texts = ["Is it raining?", "Regnet es?"]
    wanted = await engine.embed(texts)
    for encoding in (openai.omit, "float"):
        found = await client.embeddings.create(
            model="demo",
            input=texts,
            encoding_format=encoding,
        )
        vectors = np.array([item.embedding for item in found.data], np.float32)
        assert np.allclose(vectors, wanted.vectors, atol=1e-5)
        assert found.usage.prompt_tokens == wanted.prompt_tokens

    def blocking(sync: openai.OpenAI) -> list[float]:
        return sync.embeddings.create(model="demo", input=texts[0]).data[0].embedding

    alone = np.array(await with_sync_client(url, blocking))
    assert np.allclose(alone, wanted.vectors[0], atol=1e-5)


async def test_models_are_listed(client: openai.AsyncOpenAI, url: str) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).owned_by == "mtpbatch"
    assert await with_sync_client(url, lambda sync: [m.id for m in sync.models.list()]) == ["demo"]


async def test_errors_are_those_classes_that_the_client_has_for_them(url: str) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 4}
    long = [{"role": "user", "content": "word " * 1000}]
    async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(**asked, top_p=7)
        assert (wrong.value.param, wrong.value.code) == ("top_p", "invalid_value")
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.chat.completions.create(**{**asked, "messages": long})
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**asked, "model": "other"})
        stranger = client.with_options(api_key="other")
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(**asked)
    backend = ScriptedBackend(n_seq=1, max_waiting=0, mtp=False)
    backend.fail_step(3)
    gate = backend.hold_step(2)
    async with (
        open_scripted_engine(backend) as engine,
        serving(create_app(engine)) as scripted,
        openai.AsyncOpenAI(base_url=f"{scripted}/v1", api_key="any", max_retries=0) as client,
    ):
        asked = {"model": "mtpbatch", "prompt": "a", "extra_body": {"min_tokens": 9}}
        stream = await client.completions.create(**asked, stream=True)
        await gate.reached()
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(**asked)
        assert int(full.value.response.headers["retry-after"]) >= 1
        gate.release()
        with pytest.raises(openai.APIError) as failed:
            async for _ in stream:
                pass
        assert failed.value.code == "internal_error"
        await engine.drain()
        with pytest.raises(openai.InternalServerError) as draining:
            await client.completions.create(**asked)
        assert draining.value.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_the_client_frees_the_sequence(
    engine: Engine, client: openai.AsyncOpenAI, stream: bool
) -> None:
    async def ask() -> None:
        answer: Any = await client.completions.create(
            model="demo",
            prompt=PROMPT,
            max_tokens=400,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        async for _ in answer:
            pass

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await until(lambda: engine.stats().generated_tokens > 0)
        group.cancel_scope.cancel()
    await until(lambda: sum(engine.stats().finished.values()) == 1)
    assert engine.stats().finished["abort"] == 1
    await until(lambda: engine.stats().free_sequences == 4)
    assert engine.stats().generated_tokens < 400


# ------------------------------------------------------------------------- other clients


async def test_curl(url: str) -> None:
    base = ["curl", "--silent", "--no-buffer", "--fail-with-body", "--max-time", "60"]
    base += ["-H", "Authorization: Bearer key", "-H", "Content-Type: application/json"]
    body = json.dumps({"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
    done = await anyio.run_process([*base, f"{url}/completions", "-d", body])
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 5
    body = json.dumps({"messages": MESSAGES, "max_tokens": 5, "ignore_eos": True, "stream": True})
    done = await anyio.run_process([*base, f"{url}/chat/completions", "-d", body])
    events = done.stdout.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    refused = await anyio.run_process([*base, f"{url}/completions", "-d", "{"], check=False)
    assert refused.returncode == 22
    assert json.loads(refused.stdout)["error"]["type"] == "invalid_request_error"


async def test_llm(engine: Engine, url: str, tmp_path: Path) -> None:
    """Simon Willison's command-line tool, with the model in its extra-openai-models.yaml."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- model_id: local\n  model_name: demo\n  api_base: "{url}"\n  api_key_name: local\n'
    )
    (tmp_path / "keys.json").write_text('{"local": "key"}')
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    wanted = await engine.chat(MESSAGES, max_tokens=9)
    assert wanted.content.strip()
    llm = [sys.executable, "-m", "llm"]
    options = ["-m", "local", "-o", "max_tokens", "9", "-o", "temperature", "0"]
    for stream in ([], ["--no-stream"]):
        done = await anyio.run_process(
            [*llm, "prompt", *options, *stream, "In the beginning"], env=environment
        )
        assert done.stdout.decode().strip() == wanted.content.strip()
    listed = await anyio.run_process([*llm, "logs", "list", "--json"], env=environment)
    runs = json.loads(listed.stdout)
    assert [run["prompt"] for run in runs] == ["In the beginning"] * 2


# ---------------------------------------------------------------------------- within apps


async def test_mounted_in_fastapi_beside_routes_of_its_own() -> None:
    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        async with mtpbatch.Engine.open(n_seq=2, n_ctx=256, n_threads=1) as engine:
            app.state.engine = engine
            app.mount("/llm", create_app(engine, model_name="demo", api_keys=["key"]))
            yield

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.get("/running")
    async def running() -> int:
        engine: Engine = app.state.engine
        return engine.stats().running

    async with (
        serving(app) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as plain,
        openai.AsyncOpenAI(base_url=f"{url}/llm/v1", api_key="key", max_retries=0) as client,
    ):
        assert (await plain.get("/running")).json() == 0
        assert (await plain.get("/llm/health")).json()["status"] == "ok"
        assert (await plain.get("/llm/v1/models")).status_code == 401
        headers = {"authorization": "Bearer key"}
        assert "mtpbatch_" in (await plain.get("/llm/metrics", headers=headers)).text
        assert (await plain.get("/health")).status_code == 404
        done = await client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert done.usage is not None
        assert done.usage.completion_tokens == 4


async def test_alone_it_opens_its_engine_when_it_starts_and_closes_it_when_it_ends(
    demo_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mtpbatch")
    app = create_app(EngineConfig(n_seq=2, n_ctx=256, n_threads=1), demo_path)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        assert (await client.get("/health")).status_code == 200
        body = {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}
        done = await client.post("/v1/completions", json=body)
        assert done.json()["usage"]["completion_tokens"] == 2
    events = [record.message.split()[0] for record in caplog.records]
    assert (events[0], events[-1]) == ("engine.opened", "engine.closed")


async def test_alone_it_can_be_started_again(demo_path: Path) -> None:
    app = create_app(EngineConfig(n_seq=1, n_ctx=64, n_threads=1), demo_path)
    for _ in range(2):
        async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            assert (await client.get("/health")).status_code == 200


async def test_alone_it_makes_spans_where_the_process_has_configured_them(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    config = EngineConfig(n_seq=1, n_ctx=64, n_threads=1)
    app = create_app(config, demo_path, model_name="tiny")
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3})
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.model"] == "tiny"
    assert span.attributes["gen_ai.usage.output_tokens"] == 3


def test_a_wrong_setting_is_named() -> None:
    engine: Any = "model.gguf"
    with pytest.raises(mtpbatch.InvalidParameterError, match=r"^engine: must be an Engine"):
        create_app(engine)
    wrong: list[dict[str, Any]] = [{"api_key": "key"}, {"max_body": 0}, {"api_keys": [""]}]
    for setting in wrong:
        [name] = setting
        with pytest.raises(mtpbatch.InvalidParameterError, match=f"^{name}: "):
            create_app(EngineConfig(), **setting)
