"""On a local Ray cluster: streams, replicas that die, come and go, and clients that leave."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import openai
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

import mtpbatch
from mtpbatch import SamplingOptions, scaleout
from mtpbatch.scaleout import EngineReplica, Ingress
from ray_replicas import ANSWER, HELD, Board, HoldingReplica, PlainReplica, ScriptedReplica

pytestmark = pytest.mark.anyio

PATIENCE = 200.0  # seconds that anything may take on a busy machine
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 1.0,
    "look_back_period_s": 1.0,
}


@contextlib.contextmanager
def deployed(application: serve.Application, name: str) -> Iterator[DeploymentHandle[Any]]:
    """An application at ``/name``; the handle of its engines."""
    try:
        try:
            serve.run(application, name=name, route_prefix=f"/{name}")
        except RuntimeError as error:
            for deployment in serve.status().applications[name].deployments.values():
                error.add_note(deployment.message)
            raise
        [engines] = serve.status().applications[name].deployments.keys() - {"Ingress"}
        yield serve.get_deployment_handle(engines, name)
    finally:
        serve.delete(name)


def around(replica: type[EngineReplica], *args: Any, **options: Any) -> serve.Application:
    """An application of another class of replicas."""
    options = {"max_ongoing_requests": 100, "graceful_shutdown_wait_loop_s": 0.1, **options}
    deployment: Any = serve.deployment(**options)(replica)
    ingress: Any = serve.deployment(max_ongoing_requests=1000)(Ingress)
    application: serve.Application = ingress.bind(deployment.bind(*args), 1 << 20, 60.0)
    return application


def new_board() -> Any:
    """An actor that is a board."""
    actor: Any = ray.remote(Board)
    return actor.options(num_cpus=0).remote()


async def until(holds: Callable[[], bool]) -> None:
    """Ask again, each time with a call to Ray in between, until it holds."""
    with anyio.fail_after(PATIENCE):
        while not await anyio.to_thread.run_sync(holds):
            pass


def replicas(name: str, deployment: str) -> dict[str, int]:
    """How many replicas are in which state."""
    states = serve.status().applications[name].deployments[deployment].replica_states
    return {str(state): n for state, n in states.items() if n}


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as http:
        yield http


@dataclass
class Stream:
    """What came of a streamed completion."""

    text: str = ""
    replica: str | None = None
    error: dict[str, Any] | None = None
    ended: bool = False
    begun: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)

    async def follow(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Ask, and take in events to the end."""
        with self.scope:
            await self._follow(http, {"model": "mtpbatch", "stream": True, **body})

    async def _follow(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            self.replica = response.headers["x-mtpbatch-replica"]
            async for line in response.aiter_lines():
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    self.ended = True
                elif event:
                    self._take(msgspec.json.decode(event))

    def _take(self, event: dict[str, Any]) -> None:
        self.error = event.get("error")
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            if self.text:
                self.begun.set()


async def test_of_two_hundred_streams_only_those_of_a_killed_replica_notice(
    cluster: str, demo_f32_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them stays in the middle of its answer, however fast the others are."""
    monkeypatch.setattr("mtpbatch.scaleout.application.EngineReplica", HoldingReplica)
    prompts = [HELD, *(f"{i} And it came to pass" for i in range(1, 200))]
    params: SamplingOptions = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    n_seq = 32
    engine: dict[str, Any] = {
        "n_seq": n_seq,
        "n_ctx": 64,
        "kv_type": "f32",
        "n_threads": 1,
        "snapshot_memory": 0,
    }
    async with mtpbatch.Engine.open(demo_f32_path, **engine) as alone:
        done = await alone.generate_many(prompts, **params)
    settings = {
        "model": str(demo_f32_path),
        "engine": engine,
        "deployment": {"num_replicas": 2, "max_ongoing_requests": 128},
    }
    with deployed(scaleout.app(settings), "killed"):
        streams = [Stream() for _ in prompts]
        async with client(f"{cluster}/killed") as http, anyio.create_task_group() as group:
            for stream, prompt in zip(streams, prompts, strict=True):
                group.start_soon(stream.follow, http, {"prompt": prompt, **params})
            await streams[0].begun.wait()
            victim = streams[0].replica
            name = f"SERVE_REPLICA::killed#HoldingReplica#{victim}"
            ray.kill(ray.get_actor(name, namespace="serve"))
            elsewhere = [s for s in streams if s.begun.is_set() and s.replica != victim]
        failed = [stream for stream in streams if stream.error]
        assert {stream.replica for stream in failed} == {victim}
        assert {stream.error["code"] for stream in failed if stream.error} == {"replica_died"}
        assert streams[0] in failed
        assert not any(stream.error for stream in elsewhere)
        for stream, expected in zip(streams, done, strict=True):
            if stream.error:
                assert not stream.ended
                assert expected.text.startswith(stream.text)
            else:
                assert stream.ended
                assert stream.text == expected.text
        # Those that waited there were asked elsewhere: what failed is no more than what ran.
        assert len(failed) <= n_seq
        names = {stream.replica for stream in streams}
        numbers = itertools.count()
        async with client(f"{cluster}/killed") as http:
            with anyio.fail_after(PATIENCE):
                while len(names) < 3:  # until the one that Serve has started in its place answers
                    stream = Stream()
                    await stream.follow(http, {"prompt": f"{next(numbers)} and", "max_tokens": 1})
                    names.add(stream.replica)


async def test_replicas_come_and_go_with_the_load(cluster: str, demo_f32_path: Path) -> None:
    engine: dict[str, Any] = {
        "n_seq": 4,
        "n_ctx": 64,
        "kv_type": "f32",
        "n_threads": 1,
        "snapshot_memory": 0,
    }
    params: SamplingOptions = {"max_tokens": 32, "ignore_eos": True, "temperature": 0}
    prompts = [f"{i} And the LORD said" for i in range(16)]
    async with mtpbatch.Engine.open(demo_f32_path, **engine) as alone:
        expected = [done.text for done in await alone.generate_many(prompts, **params)]
    settings = {
        "model": str(demo_f32_path),
        "engine": engine,
        "deployment": {"autoscaling_config": SCALING},
    }
    with deployed(scaleout.app(settings), "scaled"):
        assert replicas("scaled", "EngineReplica") == {"RUNNING": 1}
        answered_by: Counter[str | None] = Counter()
        goes_on = True

        async def ask(i: int) -> None:
            while goes_on:
                stream = Stream()
                await stream.follow(http, {"prompt": prompts[i], **params})
                assert (stream.text, stream.error) == (expected[i], None)
                answered_by[stream.replica] += 1

        async with client(f"{cluster}/scaled") as http:
            async with anyio.create_task_group() as group:
                for i in range(len(prompts)):
                    group.start_soon(ask, i)
                await until(lambda: len(answered_by) == 2)
                goes_on = False
            assert replicas("scaled", "EngineReplica") == {"RUNNING": 2}
            await until(lambda: replicas("scaled", "EngineReplica") == {"RUNNING": 1})
            goes_on = True
            stream = Stream()
            await stream.follow(http, {"prompt": prompts[0], **params})
            assert stream.text == expected[0]


async def test_a_replica_that_is_taken_away_finishes_what_it_runs(cluster: str) -> None:
    board = new_board()
    options = {"autoscaling_config": {**SCALING, "target_ongoing_requests": 4}}
    with deployed(around(ScriptedReplica, board, 8, 5, **options), "taken"):
        async with client(f"{cluster}/taken") as http, anyio.create_task_group() as group:

            async def one_of(n: int) -> Stream:
                """Of as many streams, one that has begun when a replica holds its sixth step."""
                begun = anyio.Event()
                streams = [Stream(begun=begun) for _ in range(n)]
                for stream in streams:
                    group.start_soon(stream.follow, http, {"prompt": "a", "max_tokens": 26})
                await begun.wait()
                [first, *_] = (stream for stream in streams if stream.text)
                others.extend(stream for stream in streams if stream is not first)
                return first

            others: list[Stream] = []
            kept = [await one_of(8)]
            await until(lambda: replicas("taken", "ScriptedReplica") == {"RUNNING": 2})
            kept.append(await one_of(4))
            assert kept[0].replica != kept[1].replica
            for stream in others:
                stream.scope.cancel()
            await until(
                lambda: replicas("taken", "ScriptedReplica") == {"RUNNING": 1, "STOPPING": 1}
            )
            await board.set.remote("release")
        for stream in kept:
            assert (stream.text, stream.error, stream.ended) == (ANSWER, None, True)
        await until(lambda: replicas("taken", "ScriptedReplica") == {"RUNNING": 1})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_goes_frees_its_sequence_within_a_step(
    cluster: str, stream: bool
) -> None:
    board = new_board()
    with deployed(around(ScriptedReplica, board, 4, 5), f"left-{stream}") as engines:
        async with client(f"{cluster}/left-{stream}") as http, anyio.create_task_group() as group:
            body = {"model": "mtpbatch", "prompt": "a", "max_tokens": 26, "stream": stream}
            group.start_soon(lambda: http.post("/v1/completions", json=body))
            with anyio.fail_after(PATIENCE):
                await board.wait.remote("held")  # in the middle of the sixth step
                group.cancel_scope.cancel()
        with anyio.fail_after(PATIENCE):
            await board.wait.remote("cancelled")
        await board.set.remote("release")
        await until(lambda: engines.stats.remote().result().finished["abort"] == 1)
        stats = await engines.stats.remote()
        assert (stats.running, stats.waiting, stats.free_sequences) == (0, 0, 4)
        assert await engines.n_steps.remote() == 6, "the step under way was the last"


async def test_a_call_that_is_cancelled_frees_its_sequence_within_a_step(cluster: str) -> None:
    board = new_board()
    with deployed(around(ScriptedReplica, board, 4, 5), "called") as engines:
        calls: Any = engines.options(stream=True)
        call = calls.stream.remote("a", max_tokens=26)
        with anyio.fail_after(PATIENCE):
            assert (await anext(call)).text == ANSWER[0]
            await board.wait.remote("held")
            call.cancel()
            await board.wait.remote("cancelled")
        await board.set.remote("release")
        await until(lambda: engines.stats.remote().result().finished["abort"] == 1)
        assert await engines.n_steps.remote() == 6


async def test_who_finds_all_replicas_full_is_told_when_to_come_again(cluster: str) -> None:
    board = new_board()
    application = around(
        ScriptedReplica, board, 1, 5, max_ongoing_requests=1, max_queued_requests=1
    )
    with deployed(application, "full"):
        body = {"model": "mtpbatch", "prompt": "a", "max_tokens": 26}
        answers: list[httpx.Response] = []
        async with client(f"{cluster}/full") as http, anyio.create_task_group() as group:

            async def ask() -> None:
                answers.append(await http.post("/v1/completions", json=body))
                await board.set.remote("release")

            group.start_soon(ask)
            await board.wait.remote("held")
            group.start_soon(ask)
            group.start_soon(ask)
        refused, *answered = answers
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert refused.json()["error"]["code"] == "engine_overloaded"
        assert [answer.json()["choices"][0]["text"] for answer in answered] == [ANSWER] * 2


async def test_a_replica_whose_engine_dies_is_replaced(cluster: str) -> None:
    board = new_board()
    with deployed(around(ScriptedReplica, board, 4, None, 5, num_replicas=2), "dies"):
        async with client(f"{cluster}/dies") as http:
            body = {"model": "mtpbatch", "prompt": "a", "max_tokens": 26}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] in ("engine_dead", "replica_died")
            await until(lambda: replicas("dies", "ScriptedReplica") == {"RUNNING": 2})
            answer = await http.post("/v1/completions", json={**body, "max_tokens": 3})
            assert answer.json()["choices"][0]["text"] == ANSWER[:3]


async def test_a_replica_whose_model_dies_is_left_to_mend_itself(cluster: str) -> None:
    board = new_board()
    with deployed(around(ScriptedReplica, board, 4, None, 5, True), "mends") as engines:
        async with client(f"{cluster}/mends") as http:
            body = {"model": "mtpbatch", "prompt": "a", "max_tokens": 26}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_restarting"
            assert (await http.get("/health")).status_code == 503
            await engines.check_health.remote()  # as Serve does
            await engines.advance.remote(1.0)
            again = await http.post("/v1/completions", json=body)
            assert again.json()["choices"][0]["text"] == ANSWER
            names = {one.headers["x-mtpbatch-replica"] for one in (answer, again)}
            assert len(names) == 1


async def test_prompts_that_begin_alike_go_to_the_same_replica(cluster: str) -> None:
    settings: dict[str, Any] = {
        "engine": {"n_seq": 4, "n_ctx": 512, "n_threads": 1},
        "deployment": {"num_replicas": 2},
    }
    with deployed(scaleout.app(settings), "prefix"):
        answered_by = []
        async with client(f"{cluster}/prefix") as http:
            for i in range(24):  # that all fall to one by chance is as good as impossible
                prompt = f"{i} " + "And it came to pass, when they were gone over, " * 10
                body = {"model": "mtpbatch", "prompt": prompt, "max_tokens": 1}
                answers = [await http.post("/v1/completions", json=body) for _ in range(3)]
                answered_by.append({answer.headers["x-mtpbatch-replica"] for answer in answers})
                # The demo model's state is kept where a second prompt has shown to begin alike.
                usage = answers[-1].json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2
        assert {len(names) for names in answered_by} == {1}
        assert len(set.union(*answered_by)) == 2


async def test_the_official_client_and_handles(cluster: str) -> None:
    engine = {"n_seq": 4, "n_ctx": 128}
    options = {"ray_actor_options": {"num_cpus": 2}}
    with deployed(around(PlainReplica, None, engine, **options), "plain") as engines:
        async with openai.AsyncOpenAI(base_url=f"{cluster}/plain/v1", api_key="-") as api:
            models = await api.models.list()
            assert [model.id for model in models.data] == ["mtpbatch"]
            told = await api.completions.create(
                model="mtpbatch", prompt="In the beginning", max_tokens=8, temperature=0
            )
            with pytest.raises(openai.BadRequestError, match="n_ctx=128"):
                await api.completions.create(model="mtpbatch", prompt="and " * 200)
        done = await engines.generate.remote("In the beginning", max_tokens=8, temperature=0)
        assert isinstance(done, mtpbatch.Completion)
        assert done.text == told.choices[0].text
        calls: Any = engines.options(stream=True)
        answer = calls.stream.remote("In the beginning", max_tokens=8, temperature=0)
        deltas = [delta async for delta in answer]
        assert "".join(delta.text for delta in deltas) == done.text
        found = await engines.embed.remote(["a", "b"])
        assert found.vectors.shape[0] == 2
        with pytest.raises(mtpbatch.InvalidParameterError, match="top_p") as info:
            await engines.generate.remote("a", top_p=0)
        assert info.value.parameter == "top_p"
        assert await engines.n_threads.remote() == 2, "as many as the actor has CPUs"
        async with client(f"{cluster}/plain") as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/metrics")).status_code == 404


async def test_the_example_of_a_configuration_file(cluster: str) -> None:
    text = (Path(__file__).parents[2] / "examples" / "ray_serve.yaml").read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    serve_client: Any = _get_global_client()
    serve_client.deploy_apps(schema)  # as `serve deploy` does, which needs the dashboard
    try:
        async with openai.AsyncOpenAI(base_url=f"{cluster}/v1", api_key="-") as api:
            await until(lambda: serve.status().applications["mtpbatch"].status != "DEPLOYING")
            application = serve.status().applications["mtpbatch"]
            assert application.status == "RUNNING", application.message
            done = await api.completions.create(model="demo", prompt="And", max_tokens=4)
            assert done.usage is not None
            assert done.usage.completion_tokens == 4
    finally:
        serve.delete("mtpbatch")


def test_settings_are_checked_before_anything_is_started() -> None:
    for settings, name in (
        ({"engine": {"n_seqs": 4}}, "n_seqs"),
        ({"engine": {"n_seq": 0}}, "n_seq"),
        ({"server": {"max_body": 0}}, "max_body"),
        ({"routing": "random"}, "routing"),
        ({"modle": "x"}, "modle"),
    ):
        with pytest.raises(mtpbatch.InvalidParameterError, match=name):
            scaleout.app(settings)
