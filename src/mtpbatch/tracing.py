"""A span of OpenTelemetry's for each request, if the app wants them.

::

    with engine.watch(RequestSpans()):
        ...

A span is a child of the one in which its request was submitted, lasts from there to its end, and
has the attributes that vLLM's have: the GenAI semantic conventions', and latencies beside these.
``docs/metrics.md`` lists them. Where spans go is for the app to configure; until it does, they go
nowhere. Needs the extra ``otel``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final, TypeAlias

from mtpbatch.watching import RequestEnded, Watcher

try:
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, get_tracer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "spans need opentelemetry-api: pip install 'mtpbatch[otel]'", name=error.name
    ) from None

_Attribute: TypeAlias = tuple[str, str | int | float | tuple[str, ...]]
_OPERATION: Final = "text_completion"


class RequestSpans(Watcher):
    """Makes a span of each request when it ends, as all is known then.

    ``model_name`` is told as the request's model; ``tracer_provider`` is the app's own if left out.
    A request that ends by an error has the status ERROR and says which; one that was cancelled, or
    ran out of time, has the finish reason "abort" or "timeout". One that failed before it could
    start takes no time. Span processors are called on the engine's thread: use one that hands spans
    over, such as the SDK's BatchSpanProcessor.

    ::

        from mtpbatch.tracing import RequestSpans

        with engine.watch(RequestSpans(model_name="demo")):
            await engine.generate("def fib(n):")
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, *, model_name: str | None = None
    ) -> None:
        self._tracer = get_tracer("mtpbatch", tracer_provider=tracer_provider)
        self._model_name = model_name

    def ended(self, request: RequestEnded) -> None:
        """Make the request's span, in the context of whoever submitted it."""
        end = time.time_ns()
        completion, error = request.completion, request.error
        seconds = 0.0 if completion is None else completion.timings.total
        span = self._tracer.start_span(
            " ".join(filter(None, (_OPERATION, self._model_name))),
            kind=SpanKind.INTERNAL,
            attributes=dict(self._attributes(request)),
            start_time=end - int(seconds * 1e9),
        )
        if error is not None:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end(end)

    def _attributes(self, request: RequestEnded) -> Iterator[_Attribute]:
        params, completion = request.params, request.completion
        yield "gen_ai.operation.name", _OPERATION
        yield "gen_ai.provider.name", "mtpbatch"
        if self._model_name is not None:
            yield "gen_ai.request.model", self._model_name
            yield "gen_ai.response.model", self._model_name
        yield "gen_ai.request.id", request.request_id
        yield "gen_ai.request.max_tokens", params.max_tokens
        yield "gen_ai.request.temperature", params.temperature
        yield "gen_ai.request.top_p", params.top_p
        if params.seed is not None:
            yield "gen_ai.request.seed", params.seed
        if completion is None:
            return
        usage, timings = completion.usage, completion.timings
        yield "gen_ai.response.finish_reasons", (completion.finish_reason,)
        yield "gen_ai.usage.input_tokens", usage.prompt_tokens
        yield "gen_ai.usage.output_tokens", usage.completion_tokens
        yield "gen_ai.usage.cache_read.input_tokens", usage.cached_tokens
        # vLLM's names, for what the conventions call otherwise, or not at all.
        yield "gen_ai.usage.prompt_tokens", usage.prompt_tokens
        yield "gen_ai.usage.completion_tokens", usage.completion_tokens
        yield "gen_ai.latency.time_in_queue", timings.queued
        yield "gen_ai.latency.e2e", timings.total
        if completion.token_ids:
            yield "gen_ai.latency.time_to_first_token", timings.first_token
            yield "gen_ai.latency.time_in_model_prefill", timings.prefill
            yield "gen_ai.latency.time_in_model_decode", timings.decode
            yield "gen_ai.latency.time_in_model_inference", timings.prefill + timings.decode
