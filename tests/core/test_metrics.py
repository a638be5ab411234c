"""Metrics, as Prometheus would read them, against what requests themselves say."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families

from mtpbatch import (
    DecodeError,
    EngineClosedError,
    EngineOverloaded,
    InvalidParameterError,
    PromptTooLongError,
)
from mtpbatch.metrics import EngineMetrics
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from patience import until

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parent.parent.parent

VLLM = {
    "e2e_request_latency_seconds_bucket",
    "generation_tokens_total",
    "inter_token_latency_seconds_bucket",
    "iteration_tokens_total_bucket",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "num_requests_running",
    "num_requests_waiting",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "request_decode_time_seconds_bucket",
    "request_generation_tokens_bucket",
    "request_inference_time_seconds_bucket",
    "request_max_num_generation_tokens_bucket",
    "request_params_max_tokens_bucket",
    "request_prefill_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_queue_time_seconds_bucket",
    "request_success_total",
    "request_time_per_output_token_seconds_bucket",
    "spec_decode_num_accepted_tokens_per_pos_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_drafts_total",
    "time_to_first_token_seconds_bucket",
}
"""What vLLM's dashboards ask for, after ``vllm:``."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(registry: CollectorRegistry) -> Samples:
    """All samples, by name and by the labels beside the model's name."""
    samples: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            key = sample.name, tuple(labels.items())
            assert key not in samples
            samples[key] = sample.value
    return samples


def bucket(samples: Samples, name: str, bound: float) -> float:
    [value] = [
        value
        for (of, labels), value in samples.items()
        if of == f"mtpbatch_{name}_bucket" and float(dict(labels)["le"]) == bound
    ]
    return value


async def test_the_exposition_says_what_the_completions_say() -> None:
    backend = ScriptedBackend(n_seq=4, n_batch=32, acceptance=0.6, step_time=0.05)
    registry = CollectorRegistry()
    prompts = [f"{i % 5} once upon a time " * (1 + i % 4) for i in range(20)]
    async with open_scripted_engine(backend) as engine:
        with EngineMetrics(engine, registry):
            done = await engine.generate_many(prompts, max_tokens=30, ignore_eos=True, stop="ower")
            done += [await engine.generate("y" * 150, max_tokens=1) for _ in range(2)]
            samples = scrape(registry)
            stats = engine.stats()

    def plain(name: str) -> float:
        return samples["mtpbatch_" + name, ()]

    def histogram(name: str, values: list[float]) -> None:
        assert plain(name + "_count") == len(values)
        assert plain(name + "_sum") == pytest.approx(sum(values))
        bounds = [
            float(dict(labels)["le"]) for (of, labels) in samples if of == f"mtpbatch_{name}_bucket"
        ]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")
        for bound in bounds:
            assert bucket(samples, name, bound) == sum(value <= bound for value in values)

    for reason, count in Counter(completion.finish_reason for completion in done).items():
        assert samples["mtpbatch_request_success_total", (("finished_reason", reason),)] == count
    timings = [completion.timings for completion in done]
    n_tokens = [len(completion.token_ids) for completion in done]
    histogram("e2e_request_latency_seconds", [t.total for t in timings])
    histogram("request_queue_time_seconds", [t.queued for t in timings])
    histogram("time_to_first_token_seconds", [t.first_token for t in timings])
    histogram("request_prefill_time_seconds", [t.prefill for t in timings])
    histogram("request_decode_time_seconds", [t.decode for t in timings])
    histogram("request_inference_time_seconds", [t.decode + t.prefill for t in timings])
    histogram("request_prompt_tokens", [float(c.usage.prompt_tokens) for c in done])
    histogram("request_generation_tokens", [float(n) for n in n_tokens])
    histogram("request_max_num_generation_tokens", [float(n) for n in n_tokens])
    histogram("request_params_max_tokens", [30.0] * 20 + [1.0] * 2)
    histogram(
        "request_time_per_output_token_seconds",
        [t.decode / (n - 1) for t, n in zip(timings, n_tokens, strict=True) if n > 1],
    )
    # Each step takes as long as the other, and a sequence that generates takes part in all.
    latencies = [0.05] * sum(completion.steps - 1 for completion in done)
    assert plain("inter_token_latency_seconds_count") == len(latencies)
    assert plain("inter_token_latency_seconds_sum") == pytest.approx(sum(latencies))
    assert plain("inter_token_latency_seconds_sum") == pytest.approx(sum(t.decode for t in timings))

    cached = sum(completion.usage.cached_tokens for completion in done)
    fed = sum(completion.usage.prompt_tokens for completion in done) - cached
    assert plain("prompt_tokens_total") == fed
    assert plain("generation_tokens_total") == sum(n_tokens)
    assert plain("prefix_cache_hits_total") == cached > 0
    assert plain("prefix_cache_queries_total") == fed + cached
    assert plain("iteration_tokens_total_sum") == fed + sum(n_tokens)
    assert plain("iteration_tokens_total_count") == plain("steps_total") == backend.n_steps
    assert plain("spec_decode_num_draft_tokens_total") == sum(c.drafted for c in done)
    assert plain("spec_decode_num_accepted_tokens_total") == sum(c.accepted for c in done)
    for position in range(3):
        labels = (("position", str(position)),)
        assert samples["mtpbatch_spec_decode_num_accepted_tokens_per_pos_total", labels] == sum(
            completion.accepted_by_depth[position] for completion in done
        )
        drafted = samples["mtpbatch_spec_decode_num_draft_tokens_per_pos_total", labels]
        assert drafted == stats.drafted_by_depth[position]
        if position == 0:
            assert plain("spec_decode_num_drafts_total") == drafted > 0
    target = samples["mtpbatch_step_time_seconds_total", (("part", "target"),)]
    assert target == pytest.approx(0.05 * backend.n_steps)
    assert plain("num_requests_running") == plain("num_requests_waiting") == 0
    assert plain("kv_cache_usage_perc") == 0
    assert plain("engine_up") == 1


async def test_a_pause_is_part_of_the_latency_between_tokens() -> None:
    backend = ScriptedBackend(
        lambda _: "y" * 60, n_seq=3, n_ctx=64, n_cells=80, n_draft_max=0, snapshot_memory=0
    )
    gate = backend.hold_step(0)
    registry = CollectorRegistry()
    async with open_scripted_engine(backend) as engine:
        with EngineMetrics(engine, registry):
            generations = [engine.submit(prompt, max_tokens=50) for prompt in "abc"]
            gate.release()
            done = [await generation for generation in generations]
            samples = scrape(registry)
    assert samples["mtpbatch_num_preemptions_total", ()] > 0
    assert samples["mtpbatch_inter_token_latency_seconds_count", ()] == 3 * 49
    decode = sum(completion.timings.decode for completion in done)
    assert samples["mtpbatch_inter_token_latency_seconds_sum", ()] == pytest.approx(decode)


async def test_gauges_say_who_runs_waits_and_holds_cells() -> None:
    backend = ScriptedBackend(lambda _: "y" * 60, n_seq=2, n_ctx=100, n_draft_max=0)
    begin, gate = backend.hold_step(0), backend.hold_step(9)
    registry = CollectorRegistry()
    async with open_scripted_engine(backend) as engine:
        with EngineMetrics(engine, registry):
            generations = [engine.submit("x" * 10) for _ in range(5)]
            begin.release()
            await gate.reached()
            samples = scrape(registry)
            gate.release()
            for generation in generations:
                await generation
    assert samples["mtpbatch_num_requests_running", ()] == 2
    assert samples["mtpbatch_num_requests_waiting", ()] == 3
    assert 0.1 < samples["mtpbatch_kv_cache_usage_perc", ()] <= 0.2


async def test_failures_are_counted_by_their_errors_and_rejections_apart() -> None:
    backend = ScriptedBackend(lambda _: "y" * 60, n_seq=1, max_waiting=0)
    backend.fail_step(2, DecodeError("no memory"))
    gate = backend.hold_step(0)
    registry = CollectorRegistry()
    async with open_scripted_engine(backend) as engine:
        metrics = EngineMetrics(engine, registry)
        generation = engine.submit("x")
        for _ in range(3):
            with pytest.raises(EngineOverloaded):
                engine.submit("x")
        gate.release()
        with pytest.raises(DecodeError):
            await generation
        with pytest.raises(PromptTooLongError):
            await engine.submit("x" * 5000)
        samples = scrape(registry)
        metrics.close()
    failures = {
        dict(labels)["error"]: value
        for (name, labels), value in samples.items()
        if name == "mtpbatch_request_failures_total"
    }
    assert failures == {"DecodeError": 1, "PromptTooLongError": 1}
    assert samples["mtpbatch_requests_rejected_total", ()] == 3
    assert samples["mtpbatch_request_success_total", (("finished_reason", "error"),)] == 1


async def test_every_name_of_vllms_is_there_with_another_prefix() -> None:
    registry = CollectorRegistry()
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with EngineMetrics(engine, registry, model_name="m"):
            await engine.generate("x", max_tokens=20, ignore_eos=True)
            samples = scrape(registry)
            labels = {
                tuple(sample.labels.items())[:2]
                for family in registry.collect()
                for sample in family.samples
            }
    assert {"mtpbatch_" + name for name in VLLM} <= {name for name, _ in samples}
    assert labels == {(("model_name", "m"), ("engine", "0"))}


async def test_engines_share_a_registry_until_their_metrics_are_closed() -> None:
    registry = CollectorRegistry()

    def series() -> dict[tuple[str, str], float]:
        name = "mtpbatch_generation_tokens"
        families = text_string_to_metric_families(generate_latest(registry).decode())
        samples = [sample for f in families if f.name == name for sample in f.samples]
        return {(s.labels["model_name"], s.labels["engine"]): s.value for s in samples}

    async with (
        open_scripted_engine(ScriptedBackend(lambda _: "y" * 9)) as one,
        open_scripted_engine(ScriptedBackend(lambda _: "y" * 19)) as two,
    ):
        first = EngineMetrics(one, registry, model_name="m")
        second = EngineMetrics(two, registry)
        await one.generate("x")
        await two.generate("x")
        assert series() == {("m", "0"): 10, ("scripted model", "1"): 20}
        first.close()
        assert series() == {("scripted model", "1"): 20}
        third = EngineMetrics(one, registry, model_name="again")
        first.close()
        assert series() == {("scripted model", "1"): 20, ("again", "0"): 10}
        second.close()
        third.close()
        assert series() == {}
        assert not one._watchers
        await one.aclose()
        with pytest.raises(EngineClosedError):
            EngineMetrics(one, registry)


async def test_what_was_counted_can_be_scraped_after_the_end() -> None:
    registry = CollectorRegistry()
    backend = ScriptedBackend(lambda _: "y" * 9)
    async with open_scripted_engine(backend) as engine:
        metrics = EngineMetrics(engine, registry)
        await engine.generate("x")
        before = scrape(registry)
        backend.fail_step(backend.n_steps, RuntimeError("a bug"))
        with pytest.raises(Exception, match="bug"):
            await engine.generate("x")
    after = scrape(registry)
    metrics.close()
    assert before["mtpbatch_engine_up", ()] == 1
    assert after["mtpbatch_engine_up", ()] == 0
    assert after["mtpbatch_generation_tokens_total", ()] == 10
    assert after["mtpbatch_request_failures_total", (("error", "EngineDeadError"),)] == 1


async def test_metrics_that_nobody_closes_go_with_their_engine_and_registry() -> None:
    registry = CollectorRegistry()
    async with open_scripted_engine(ScriptedBackend()) as engine:
        metrics = EngineMetrics(engine, registry)
        await engine.generate("x")
    left = weakref.ref(metrics)
    del engine, metrics, registry
    await until(lambda: (bool(gc.collect()) and left() is None) or left() is None)


async def test_the_registry_is_the_processs_own_unless_another_is_given() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with EngineMetrics(engine) as metrics:
            assert metrics.registry is REGISTRY
            assert "mtpbatch_engine_up" in generate_latest(REGISTRY).decode()
    assert "mtpbatch_engine_up" not in generate_latest(REGISTRY).decode()


async def test_wrong_arguments_are_named() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with pytest.raises(InvalidParameterError, match=r"^registry: .*CollectorRegistry.*'m'"):
            EngineMetrics(engine, "m")  # type: ignore[arg-type]
        with pytest.raises(InvalidParameterError, match=r"^model_name: .*text.*7"):
            EngineMetrics(engine, CollectorRegistry(), model_name=7)  # type: ignore[arg-type]
        assert not engine._watchers


async def get(app: Callable[..., Any], accept: str) -> tuple[str, str]:
    """What an ASGI app answers to a GET: content type and body."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"accept", accept.encode())]
    await app({"type": "http", "method": "GET", "headers": headers}, receive, send)
    start, body = sent
    assert start["status"] == 200
    [kind] = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return kind.decode(), body["body"].decode()


async def test_the_app_answers_in_the_format_that_is_asked_for() -> None:
    registry = CollectorRegistry()
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with EngineMetrics(engine, registry) as metrics:
            await engine.generate("x")
            app = metrics.asgi_app()
            plain_type, plain = await get(app, "*/*")
            open_type, opened = await get(app, "application/openmetrics-text; version=1.0.0")
    assert plain_type.startswith("text/plain")
    assert open_type.startswith("application/openmetrics-text")
    old = {family.name for family in text_string_to_metric_families(plain)}
    new = {family.name for family in open_families(opened)}  # type: ignore[no-untyped-call]
    assert old == new
    assert {name for name in old if not name.startswith("mtpbatch_")} == set()


async def families() -> dict[str, str]:
    """Metrics as they are queried, without the suffixes of histograms, and their types."""
    registry = CollectorRegistry()
    async with open_scripted_engine(ScriptedBackend()) as engine:
        with EngineMetrics(engine, registry):
            found = text_string_to_metric_families(generate_latest(registry).decode())
            return {f.name + "_total" * (f.type == "counter"): f.type for f in found}


async def test_the_documented_metrics_are_those_there_are() -> None:
    rows = re.findall(
        r"^\| `(mtpbatch_\w+)` \| (\w+) \| .+ \| (?:`vllm:(\w+)`|\S) \|$",
        (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert {name: kind for name, kind, _ in rows} == await families()
    documented = [vllm for _, _, vllm in rows if vllm]
    assert documented == [name.removeprefix("mtpbatch_") for name, _, vllm in rows if vllm]
    assert set(documented) == {name.removesuffix("_bucket") for name in VLLM}


async def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    there = await families()
    histograms = {name for name, kind in there.items() if kind == "histogram"}
    names = there.keys() - histograms
    names |= {name + suffix for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    used = {name for query in asked for name in re.findall(r"\bmtpbatch_\w+", query)}
    assert used <= names
    for part in (
        *("generation_tokens_total", "time_to_first_token_seconds_bucket"),
        *("inter_token_latency_seconds_bucket", "num_requests_waiting", "kv_cache_usage_perc"),
        *("spec_decode_num_accepted_tokens_per_pos_total", "spec_decode_num_drafts_total"),
        *("num_preemptions_total", "prefix_cache_hits_total", "request_failures_total"),
    ):
        assert f"mtpbatch_{part}" in used
    assert all("mtpbatch_" in query for query in asked)
