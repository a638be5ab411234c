"""Metrics of engines for Prometheus, with the names and labels that vLLM's have.

::

    async with mtpbatch.Engine.open("model.gguf") as engine:
        with EngineMetrics(engine) as metrics:
            app.mount("/metrics", metrics.asgi_app())

What an engine counts by itself, in :class:`~mtpbatch.EngineStats`, is read when somebody scrapes.
Only histograms take time while it runs, and these not much: a step in which 64 sequences gain
tokens at equal distances is one observation of 64.

``docs/metrics.md`` lists them all. Needs the extra ``server``.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple
from weakref import WeakKeyDictionary, ref

from mtpbatch.engine import Engine
from mtpbatch.exceptions import (
    EngineDeadError,
    EngineOverloaded,
    InvalidParameterError,
)
from mtpbatch.types import Completion, EngineStats, SamplingParams, StepReport
from mtpbatch.watching import RequestEnded, Watcher

try:
    from prometheus_client import REGISTRY, CollectorRegistry, make_asgi_app
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
    from prometheus_client.utils import floatToGoString
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "metrics need prometheus-client: pip install 'mtpbatch[server]'", name=error.name
    ) from None

_PREFIX: Final = "mtpbatch_"
_LABELS: Final = ("model_name", "engine")


class EngineMetrics(Watcher):
    """The metrics of one engine, in a registry of prometheus_client's, until they are closed.

    ``registry``: the process's own if left out. ``model_name`` is the label by which models are
    told apart: by default the engine's own description of its model. Several engines may share a
    registry; the label ``engine`` numbers them, from 0.

    A :class:`~mtpbatch.Watcher`, which the engine calls; scrapes come from any thread. What was
    counted stays to be scraped after the engine has been closed.

    Raises :class:`~mtpbatch.InvalidParameterError`, or :class:`~mtpbatch.EngineClosedError` or
    :class:`~mtpbatch.EngineDeadError` if there is nothing to watch any more.

    ::

        from prometheus_client import CollectorRegistry, generate_latest

        from mtpbatch.metrics import EngineMetrics

        with EngineMetrics(engine, CollectorRegistry(), model_name="demo") as metrics:
            await engine.generate("def fib(n):")
            assert b"mtpbatch_generation_tokens_total" in generate_latest(metrics.registry)
    """

    # State: ``_clock`` and ``_gained`` are for who has the engine's turn alone. ``_failures`` and
    # ``_histograms`` change in that turn and are copied by scrapes, both under ``_lock``, which is
    # held for microseconds. ``_stats`` is what a scrape found last.

    def __init__(
        self,
        engine: Engine,
        registry: CollectorRegistry | None = None,
        *,
        model_name: str | None = None,
    ) -> None:
        if not isinstance(registry, CollectorRegistry | None):
            raise InvalidParameterError(
                "registry", f"must be a CollectorRegistry of prometheus_client, got {registry!r}"
            )
        if not isinstance(model_name, str | None):
            raise InvalidParameterError("model_name", f"must be a text, got {model_name!r}")
        self.registry = REGISTRY if registry is None else registry
        self.model_name = engine.description if model_name is None else model_name
        self._engine = engine
        self._stats = engine.stats()
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        self._histograms = _histograms(engine.model.n_ctx)
        self._clock = 0.0  # time in which steps ran, or could have
        self._gained: dict[str, float] = {}  # when a request gained tokens last, by that clock
        self._watching = engine.watch(self)
        self._shelf = _Shelf.of(self.registry)
        self._shelf.add(self)

    def asgi_app(self) -> Callable[..., Any]:
        """An ASGI app that gives the registry's metrics to whoever scrapes, in the format and
        compression that it accepts. To be mounted at ``/metrics``."""
        return make_asgi_app(self.registry)

    def close(self) -> None:
        """Watch the engine no longer, and take its metrics out of the registry. Harmless twice."""
        self._watching.close()
        self._shelf.remove(self)

    def __enter__(self) -> EngineMetrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------- what the engine tells

    def stepped(self, report: StepReport) -> None:
        """Count a step's tokens, and how long each sequence waited for its own.

        That is not asked of the clock: results of several steps may come together.
        """
        before = self._clock
        now = before + report.gap_time + report.draft_time + report.target_time + report.sample_time
        gained = self._gained
        n_tokens = n_since_last_step = 0
        with self._lock:
            latency = self._histograms["inter_token_latency_seconds"]
            self._clock = now
            for part in report.sequences:
                n_tokens += part.n_prompt + part.n_generated
                if part.n_generated:
                    since = gained.get(part.request_id)
                    gained[part.request_id] = now
                    if since == before:
                        n_since_last_step += 1
                    elif since is not None:
                        latency.observe(now - since)
            if n_since_last_step:
                latency.observe(now - before, n_since_last_step)
            if n_tokens:
                self._histograms["iteration_tokens_total"].observe(n_tokens)

    def ended(self, request: RequestEnded) -> None:
        """Count how long a request took, and each of its parts that it came to."""
        error = request.error
        with self._lock:
            self._gained.pop(request.request_id, None)
            if error is not None and not isinstance(error, EngineOverloaded):
                self._failures[type(error).__name__] += 1
            if request.completion is None:
                return
            for name, value in _measured(request.params, request.completion):
                self._histograms[name].observe(value)

    # ------------------------------------------------------------------ what is scraped

    def _snapshot(self, number: int) -> _Snapshot:
        with suppress(EngineDeadError):  # then it is what was known of it last
            self._stats = self._engine.stats()
        with self._lock:
            return _Snapshot(
                (self.model_name, str(number)),
                self._stats,
                not self._engine.closed,
                dict(self._failures),
                {name: histogram.copy() for name, histogram in self._histograms.items()},
            )


def _measured(params: SamplingParams, completion: Completion) -> Iterator[tuple[str, float]]:
    """What a request adds to which histogram."""
    timings, n_tokens = completion.timings, len(completion.token_ids)
    yield "e2e_request_latency_seconds", timings.total
    yield "request_queue_time_seconds", timings.queued
    yield "request_prompt_tokens", completion.usage.prompt_tokens
    yield "request_generation_tokens", n_tokens
    yield "request_max_num_generation_tokens", n_tokens
    yield "request_params_max_tokens", params.max_tokens
    if n_tokens:
        yield "time_to_first_token_seconds", timings.first_token
        yield "request_prefill_time_seconds", timings.prefill
        yield "request_decode_time_seconds", timings.decode
        yield "request_inference_time_seconds", timings.prefill + timings.decode
    if n_tokens > 1:
        yield "request_time_per_output_token_seconds", timings.decode / (n_tokens - 1)


# ----------------------------------------------------------------------------- histograms


class _Histogram:
    """Values counted by the first of the bounds that they do not exceed."""

    # prometheus_client's own would look its labels up, and lock, once for each value.

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def copy(self) -> _Histogram:
        other = _Histogram(self.bounds)
        other.counts, other.sum = self.counts.copy(), self.sum
        return other

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        names = map(floatToGoString, (*self.bounds, float("inf")))
        family.add_metric(labels, list(zip(names, accumulate(self.counts), strict=True)), self.sum)


# The bounds are vLLM's as well, so that quantiles of both are equally coarse.
_LATENCY: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_STEP_TOKENS: Final = (1.0, *(float(2**n) for n in range(3, 15)))

# The bounds; None: one, two and five times each power of ten, up to what a context holds.
_HISTOGRAMS: Final[dict[str, tuple[str, tuple[float, ...] | None]]] = {
    "time_to_first_token_seconds": ("From submission to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": (
        "From a step that gave a sequence tokens to the next one that did.",
        _PER_TOKEN,
    ),
    "request_time_per_output_token_seconds": (
        "A request's time per token after its first.",
        _PER_TOKEN,
    ),
    "e2e_request_latency_seconds": ("From submission to the end.", _LATENCY),
    "request_queue_time_seconds": ("From submission until a sequence took it.", _LATENCY),
    "request_prefill_time_seconds": ("From then to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the end.", _LATENCY),
    "request_inference_time_seconds": ("From when a sequence took it to the end.", _LATENCY),
    "request_prompt_tokens": ("Tokens of a request's prompt.", None),
    "request_generation_tokens": ("Tokens of a request's answer.", None),
    "request_max_num_generation_tokens": (
        "Tokens of the longest answer to a request, which has one.",
        None,
    ),
    "request_params_max_tokens": ("The max_tokens that a request asked for.", None),
    "iteration_tokens_total": ("Tokens of a step: of prompts, and generated.", _STEP_TOKENS),
}


def _histograms(n_ctx: int) -> dict[str, _Histogram]:
    sizes = tuple(float(m * 10**n) for n in range(10) for m in (1, 2, 5) if m * 10**n <= n_ctx)
    return {name: _Histogram(bounds or sizes) for name, (_, bounds) in _HISTOGRAMS.items()}


# ------------------------------------------------------------------- counters and gauges


class _Snapshot(NamedTuple):
    """One engine at the moment of a scrape."""

    labels: tuple[str, str]
    stats: EngineStats
    up: bool
    failures: Mapping[str, int]
    histograms: Mapping[str, _Histogram]


class _Figure(NamedTuple):
    """A counter or gauge. With a label of its own it has a value for each of that."""

    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    words: str
    values: Callable[[_Snapshot], float | Mapping[str, float]]
    label: str | None = None

    def family(self, snapshots: Iterable[_Snapshot]) -> Metric:
        own = () if self.label is None else (self.label,)
        family = self.kind(_PREFIX + self.name, self.words, labels=(*_LABELS, *own))
        for snapshot in snapshots:
            values = self.values(snapshot)
            if isinstance(values, Mapping):
                for name, value in values.items():
                    family.add_metric((*snapshot.labels, name), value)
            else:
                family.add_metric(snapshot.labels, values)
        return family


def _by_position(counts: Iterable[int]) -> dict[str, float]:
    return {str(position): count for position, count in enumerate(counts)}


_FIGURES: Final = (
    _Figure(
        GaugeMetricFamily, "num_requests_running", "Requests that run.", lambda s: s.stats.running
    ),
    _Figure(
        GaugeMetricFamily, "num_requests_waiting", "Requests that wait.", lambda s: s.stats.waiting
    ),
    _Figure(
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Share of the KV cells that requests that run hold, from 0 to 1.",
        lambda s: s.stats.kv_cache_usage,
    ),
    _Figure(
        CounterMetricFamily,
        "prefix_cache_queries",
        "Prompt tokens of requests that have ended and may reuse what was computed earlier.",
        lambda s: s.stats.prefix_queries,
    ),
    _Figure(
        CounterMetricFamily,
        "prefix_cache_hits",
        "Of those, the ones that did not have to be computed.",
        lambda s: s.stats.prefix_hits,
    ),
    _Figure(
        CounterMetricFamily,
        "prompt_tokens",
        "Prompt tokens that were computed, once more after a pause.",
        lambda s: s.stats.prompt_tokens,
    ),
    _Figure(
        CounterMetricFamily,
        "generation_tokens",
        "Tokens generated.",
        lambda s: s.stats.generated_tokens,
    ),
    _Figure(
        CounterMetricFamily,
        "request_success",
        "Requests that have ended, by how; the errors of those with error are in request_failures.",
        lambda s: dict[str, float](s.stats.finished.items()),
        "finished_reason",
    ),
    _Figure(
        CounterMetricFamily,
        "num_preemptions",
        "How often a request paused because others needed its cells.",
        lambda s: s.stats.preemptions,
    ),
    _Figure(
        CounterMetricFamily,
        "engine_restarts",
        "How often the process that runs the model died, so that another one was needed.",
        lambda s: s.stats.restarts,
    ),
    _Figure(
        CounterMetricFamily,
        "spec_decode_num_drafts",
        "How often a sequence drafted.",
        lambda s: s.stats.drafted_by_depth[0] if s.stats.drafted_by_depth else 0,
    ),
    _Figure(
        CounterMetricFamily,
        "spec_decode_num_draft_tokens",
        "Tokens drafted.",
        lambda s: s.stats.drafted,
    ),
    _Figure(
        CounterMetricFamily,
        "spec_decode_num_accepted_tokens",
        "Drafted tokens that were accepted.",
        lambda s: s.stats.accepted,
    ),
    _Figure(
        CounterMetricFamily,
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens that were accepted, by their place in the draft, from 0.",
        lambda s: _by_position(s.stats.accepted_by_depth),
        "position",
    ),
    _Figure(
        CounterMetricFamily,
        "spec_decode_num_draft_tokens_per_pos",
        "Tokens drafted, by their place in the draft, from 0: drafts differ in length.",
        lambda s: _by_position(s.stats.drafted_by_depth),
        "position",
    ),
    _Figure(
        GaugeMetricFamily,
        "spec_decode_draft_depth",
        "Most tokens that requests draft per step for which the engine chooses.",
        lambda s: s.stats.draft_depth,
    ),
    _Figure(CounterMetricFamily, "steps", "Steps.", lambda s: s.stats.steps),
    _Figure(
        CounterMetricFamily,
        "step_time_seconds",
        "Time of steps by part: draft, target and sample, and gap, in which none ran though there "
        "was work.",
        lambda s: {
            "draft": s.stats.draft_time,
            "target": s.stats.target_time,
            "sample": s.stats.sample_time,
            "gap": s.stats.gap_time,
        },
        "part",
    ),
    _Figure(
        GaugeMetricFamily,
        "snapshot_bytes",
        "Host memory that states of sequences take.",
        lambda s: s.stats.snapshot_bytes,
    ),
    _Figure(
        CounterMetricFamily,
        "requests_rejected",
        "Requests refused because too many waited.",
        lambda s: s.stats.rejected,
    ),
    _Figure(
        CounterMetricFamily,
        "request_failures",
        "Requests that ended by an error, by its class; but those rejected.",
        lambda s: s.failures,
        "error",
    ),
    _Figure(
        GaugeMetricFamily, "engine_up", "1; 0 once the engine is closed or dead.", lambda s: s.up
    ),
)


class _Shelf(Collector):
    """The engines of one registry: metrics that several have are one family with several labels."""

    # A registry keeps its shelf, and nothing else does: engines refer to their registries.
    _shelves: ClassVar[WeakKeyDictionary[CollectorRegistry, ref[_Shelf]]] = WeakKeyDictionary()
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._engines: dict[int, EngineMetrics] = {}

    @classmethod
    def of(cls, registry: CollectorRegistry) -> _Shelf:
        """That of a registry; it is made where there is none."""
        with cls._lock:
            known = cls._shelves.get(registry)
            shelf = None if known is None else known()
            if shelf is None:
                shelf = cls()
                registry.register(shelf)
                cls._shelves[registry] = ref(shelf)
        return shelf

    def add(self, metrics: EngineMetrics) -> None:
        """Another engine, by the lowest number that is free."""
        with self._lock:
            number = next(n for n in range(len(self._engines) + 1) if n not in self._engines)
            self._engines = {**self._engines, number: metrics}

    def remove(self, metrics: EngineMetrics) -> None:
        """An engine, if it is there."""
        with self._lock:
            self._engines = {n: m for n, m in self._engines.items() if m is not metrics}

    def collect(self) -> Iterator[Metric]:
        """What a scrape gets."""
        snapshots = [metrics._snapshot(number) for number, metrics in self._engines.items()]
        if not snapshots:
            return
        for figure in _FIGURES:
            yield figure.family(snapshots)
        for name, (words, _) in _HISTOGRAMS.items():
            family = HistogramMetricFamily(_PREFIX + name, words, labels=_LABELS)
            for snapshot in snapshots:
                snapshot.histograms[name].add_to(family, snapshot.labels)
            yield family
