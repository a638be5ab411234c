"""Spans of requests, as an exporter of the app's would get them."""

from __future__ import annotations

import anyio
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mtpbatch import DecodeError, PromptTooLongError, SamplingOptions
from mtpbatch.testing import ScriptedBackend, open_scripted_engine
from mtpbatch.tracing import RequestSpans

pytestmark = pytest.mark.anyio


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def by_request(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = {}
    for span in exporter.get_finished_spans():
        assert span.attributes is not None
        if "gen_ai.request.id" in span.attributes:
            found[str(span.attributes["gen_ai.request.id"])] = span
    return found


async def test_a_request_is_a_child_of_the_span_it_was_submitted_in(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    tracer = provider.get_tracer("app")
    parents: dict[str, int] = {}

    async def handler(name: str, prompt: str) -> None:
        with tracer.start_as_current_span(name) as span:
            completion = await engine.generate(prompt)
            parents[completion.request_id] = span.get_span_context().span_id

    async with open_scripted_engine(ScriptedBackend(n_ctx=8192)) as engine:
        with engine.watch(RequestSpans(provider)):
            async with anyio.create_task_group() as group:
                group.start_soon(handler, "one", "x")
                group.start_soon(handler, "two", "y" * 5000)  # tokenised on a thread
            alone = await engine.generate("z")
        await engine.generate("not watched")
    spans = by_request(exporter)
    assert spans.keys() == {*parents, alone.request_id}
    for request_id, parent in parents.items():
        context = spans[request_id].parent
        assert context is not None
        assert context.span_id == parent
    assert spans[alone.request_id].parent is None


async def test_a_span_says_what_was_asked_for_and_what_it_took(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1, step_time=0.25)
    params: SamplingOptions = {"max_tokens": 20, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    async with open_scripted_engine(backend) as engine:
        with engine.watch(RequestSpans(provider, model_name="tiny")):
            done = await engine.generate_many(["a" * 10, "b" * 10], **params)
    for completion in done:
        span = by_request(exporter)[completion.request_id]
        timings = completion.timings
        assert (span.name, span.kind) == ("text_completion tiny", SpanKind.INTERNAL)
        assert span.status.status_code is StatusCode.UNSET
        assert span.start_time is not None
        assert span.end_time is not None
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(timings.total)
        assert dict(span.attributes or {}) == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "mtpbatch",
            "gen_ai.request.model": "tiny",
            "gen_ai.response.model": "tiny",
            "gen_ai.request.id": completion.request_id,
            "gen_ai.request.max_tokens": 20,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.seed": 7,
            "gen_ai.response.finish_reasons": ("length",),
            "gen_ai.usage.input_tokens": 10,
            "gen_ai.usage.output_tokens": 20,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "gen_ai.usage.prompt_tokens": 10,
            "gen_ai.usage.completion_tokens": 20,
            "gen_ai.latency.time_in_queue": timings.queued,
            "gen_ai.latency.e2e": timings.total,
            "gen_ai.latency.time_to_first_token": timings.first_token,
            "gen_ai.latency.time_in_model_prefill": timings.prefill,
            "gen_ai.latency.time_in_model_decode": timings.decode,
            "gen_ai.latency.time_in_model_inference": timings.prefill + timings.decode,
        }
    assert done[1].timings.queued > 0


async def test_failures_are_errors_and_cancellations_are_not(
    exporter: InMemorySpanExporter, provider: TracerProvider
) -> None:
    backend = ScriptedBackend(lambda _: "y" * 40, n_seq=1, n_draft_max=0)
    backend.fail_step(2, DecodeError("no memory"))
    async with open_scripted_engine(backend) as engine:
        with engine.watch(RequestSpans(provider)):
            failed = engine.submit("x")
            with pytest.raises(DecodeError):
                await failed
            refused = engine.submit("x" * 5000)
            with pytest.raises(PromptTooLongError):
                await refused
            gate = backend.hold_step(backend.n_steps)
            cancelled, waiting = engine.submit("x"), engine.submit("x")
            await gate.reached()
            cancelled.cancel()
            waiting.cancel()
            gate.release()
            for generation in (cancelled, waiting):
                assert (await generation).finish_reason == "abort"
    spans = by_request(exporter)
    of_failed, of_refused, of_cancelled, of_waiting = (
        spans[generation.request_id] for generation in (failed, refused, cancelled, waiting)
    )
    for span, kind, words in (
        (of_failed, "DecodeError", "no memory"),
        (of_refused, "PromptTooLongError", "5000"),
    ):
        assert span.status.status_code is StatusCode.ERROR
        assert words in (span.status.description or "")
        assert (span.attributes or {})["error.type"] == kind
    assert (of_failed.attributes or {})["gen_ai.response.finish_reasons"] == ("error",)
    assert (of_failed.attributes or {})["gen_ai.usage.output_tokens"] == 2
    assert "gen_ai.usage.output_tokens" not in (of_refused.attributes or {})
    for span in (of_cancelled, of_waiting):
        assert span.status.status_code is StatusCode.UNSET
        assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
    assert "gen_ai.latency.time_to_first_token" not in (of_waiting.attributes or {})


async def test_until_the_app_configures_tracing_spans_go_nowhere() -> None:
    async with open_scripted_engine(ScriptedBackend(lambda _: "answer")) as engine:
        with engine.watch(RequestSpans()):
            assert (await engine.generate("x")).text == "answer"
            assert engine._watchers
