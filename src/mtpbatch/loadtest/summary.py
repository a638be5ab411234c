"""The figures of a run, worked out from its records. Pure.

What counts. A run has a window, the steady state between ramp-up and drain.

- What happens at a moment counts if the moment lies in the window, whichever request it belongs
  to: a chunk and its tokens, the gap before it, a request's end. Rates and gaps are of these.
- What a request is as a whole counts if the request was sent in the window, however late it ended:
  its outcome, TTFT, TPOT, end-to-end latency, lengths, acceptance, and whether it kept the SLO.
  Latencies and lengths are those of the requests that ended well.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from mtpbatch.loadtest.records import ClientOverhead, RequestRecord, RunRecord, Slo, SweepRecord

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

LATENCIES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "icl": "ICL",
    "e2e": "End to end",
}
"""What is measured of requests and gaps, and what each is called."""

N_GROUPS = 4  # by acceptance, of equally many requests


# --------------------------------------------------------------------------- one request


def ttft(request: RequestRecord) -> float | None:
    """Seconds from sending to the first chunk with content."""
    return request.chunks[0][0] - request.sent if request.chunks else None


def tpot(request: RequestRecord) -> float | None:
    """Mean seconds per token after the first, from the first chunk to the last."""
    if not request.chunks or request.output_tokens < 2:
        return None
    return (request.chunks[-1][0] - request.chunks[0][0]) / (request.output_tokens - 1)


def e2e(request: RequestRecord) -> float:
    """Seconds from sending to the end."""
    return request.ended - request.sent


def steps(request: RequestRecord) -> int | None:
    """Decodes that gave it tokens. Each gives one more than it accepts, if nobody counted them."""
    if request.steps is None and request.accepted is not None:
        return request.output_tokens - request.accepted
    return request.steps


def acceptance_length(request: RequestRecord) -> float | None:
    """Mean tokens per step."""
    n = steps(request)
    return request.output_tokens / n if n and request.output_tokens else None


def meets(request: RequestRecord, slo: Slo) -> bool:
    """Whether a request ended well and within all limits.

    One without a token keeps no limit on the first, and one of a single token any per token.
    """
    if request.outcome != "ok":
        return False
    first, each = ttft(request), tpot(request)
    for name, limit in slo.items():
        if name == "ttft" and (first is None or first > limit):
            return False
        if name == "tpot" and each is not None and each > limit:
            return False
        if name == "e2e" and e2e(request) > limit:
            return False
    return True


# -------------------------------------------------------------------------- distributions


class Distribution(Struct, frozen=True, kw_only=True):
    """Of seconds or tokens. Percentiles are interpolated, as numpy does by default."""

    n: float
    """How many values."""
    mean: float
    std: float
    minimum: float
    median: float
    p90: float
    p99: float
    maximum: float


class Weighted(Struct, frozen=True):
    """Values in ascending order, each counted so many times; with fractions as well."""

    values: Floats
    upto: Floats
    """The weights summed up, each value's own included."""

    @classmethod
    def of(cls, values: Floats, weights: Floats | None = None) -> Weighted:
        """Sort values; without weights each counts once, and a weight of 0 leaves one out."""
        if weights is None:
            weights = np.ones(len(values))
        values, weights = values[weights > 0], weights[weights > 0]
        order = np.argsort(values, kind="stable")
        return cls(values[order], np.cumsum(weights[order]))

    def quantile(self, share: float) -> float:
        """As of values repeated by their weights, with linear interpolation."""
        place = share * max(self.upto[-1] - 1, 0)
        below = np.floor(place)
        low, high = np.searchsorted(self.upto, [below, below + 1], side="right")
        last = len(self.values) - 1
        left, right = self.values[min(low, last)], self.values[min(high, last)]
        return float(left + (right - left) * (place - below))

    @property
    def weights(self) -> Floats:
        return np.diff(self.upto, prepend=0.0)

    def mean(self) -> float:
        return float(np.average(self.values, weights=self.weights))


def distribution(values: Floats, weights: Floats | None = None) -> Distribution | None:
    """None of nothing."""
    weighted = Weighted.of(values, weights)
    if not len(weighted.values):
        return None
    mean = weighted.mean()
    return Distribution(
        n=float(weighted.upto[-1]),
        mean=mean,
        std=float(np.sqrt(np.average((weighted.values - mean) ** 2, weights=weighted.weights))),
        minimum=float(weighted.values[0]),
        median=weighted.quantile(0.5),
        p90=weighted.quantile(0.9),
        p99=weighted.quantile(0.99),
        maximum=float(weighted.values[-1]),
    )


# ------------------------------------------------------------------------------- one run


class Samples(Struct, frozen=True):
    """Values, at which moment each counts, and how often."""

    values: Floats
    at: Floats
    weights: Floats | None = None

    def distribution(self) -> Distribution | None:
        return distribution(self.values, self.weights)


class Counted:
    """A run's records as arrays: what counts in its window, each with its moment.

    ``latencies`` holds "ttft", "tpot", "itl", "icl" and "e2e". The moment of a request is that at
    which it was sent. ``chunk_times``, ``chunk_tokens`` and ``owners``, the index of each one's
    request, are of all chunks, inside the window and outside.
    """

    def __init__(self, run: RunRecord) -> None:
        self.begin, self.end = run.window
        self.sent = [r for r in run.requests if self.inside(r.sent)]
        self.ok = [r for r in self.sent if r.outcome == "ok"]
        self.chunk_times, self.chunk_tokens, self.owners = _chunks(run.requests)
        self.latencies = {
            "ttft": self._of_requests([ttft(r) for r in self.ok]),
            "tpot": self._of_requests([tpot(r) for r in self.ok]),
            "itl": self._gaps(per_token=True),
            "icl": self._gaps(per_token=False),
            "e2e": self._of_requests([e2e(r) for r in self.ok]),
        }

    @property
    def seconds(self) -> float:
        return max(self.end - self.begin, 0.0)

    def events(self, times: Floats) -> npt.NDArray[np.bool_]:
        """Which moments lie in the window."""
        return (times >= self.begin) & (times <= self.end)

    def inside(self, time: float) -> bool:
        return self.begin <= time <= self.end

    def _of_requests(self, values: list[float | None]) -> Samples:
        known = [(v, r.sent) for v, r in zip(values, self.ok, strict=True) if v is not None]
        both = np.array(known, dtype=np.float64).reshape(-1, 2)
        return Samples(both[:, 0], both[:, 1])

    def _gaps(self, *, per_token: bool) -> Samples:
        """Seconds between chunks; or between tokens, where a chunk's share its gap equally."""
        times, tokens, owners = self.chunk_times, self.chunk_tokens, self.owners
        if per_token:
            some = tokens > 0
            times, tokens, owners = times[some], tokens[some], owners[some]
        counts = (owners[1:] == owners[:-1]) & self.events(times[1:])
        gaps, at = np.diff(times)[counts], times[1:][counts]
        if not per_token:
            return Samples(gaps, at)
        each = tokens[1:][counts]
        return Samples(gaps / each, at, each)


def _chunks(requests: Sequence[RequestRecord]) -> tuple[Floats, Floats, Ints]:
    """Times and tokens of all chunks, and the index of each one's request.

    Where a request has another number of tokens than its chunks have together, as its server
    does not tell how many tokens a chunk has, they are spread over its chunks.
    """
    counts = [len(r.chunks) for r in requests]
    chunks = itertools.chain.from_iterable(r.chunks for r in requests)
    numbers = itertools.chain.from_iterable(chunks)
    flat = np.fromiter(numbers, dtype=np.float64, count=2 * sum(counts)).reshape(-1, 2)
    owners: Ints = np.repeat(np.arange(len(requests)), counts)
    together = np.bincount(owners, flat[:, 1], minlength=len(requests))
    received = np.array([r.output_tokens for r in requests], dtype=np.float64)
    scale = np.divide(received, together, out=np.zeros_like(received), where=together > 0)
    return flat[:, 0], flat[:, 1] * scale[owners], owners


class AcceptanceGroup(Struct, frozen=True, kw_only=True):
    """Requests of similar acceptance length, and their latencies (seconds, medians)."""

    least: float
    most: float
    n: int
    tpot: float | None
    icl: float | None
    e2e: float


class Summary(Struct, frozen=True, kw_only=True):
    """What a run amounts to in its window. Seconds, and tokens or requests per second."""

    seconds: float
    """Of the window."""
    sent: int
    """Requests sent in it, of ``requests`` in the whole run."""
    requests: int
    ok: int
    cancelled: int
    failed: int
    errors: dict[str, int]
    """Requests by the kind of their error."""
    finish_reasons: dict[str, int]
    """Of those that ended well."""
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    icl: Distribution | None
    e2e: Distribution | None
    prompt_tokens: Distribution | None
    output_tokens: Distribution | None
    request_rate: float | None
    """Requests that ended well."""
    input_rate: float | None
    """Prompt tokens of the requests whose first chunk came."""
    output_rate: float | None
    goodput_requests: float | None
    """Those of ``request_rate`` that kept the SLO. None, for all three: there is no SLO."""
    goodput_tokens: float | None
    """Those of ``output_rate`` whose request kept it."""
    slo_share: float | None
    """Of the requests sent that were not cancelled, how many kept it; errors did not."""
    peak_concurrency: int
    """Most requests under way at once."""
    mean_concurrency: float | None
    acceptance_length: float | None
    """Mean tokens per step. None, for both: the target tells nothing of it."""
    acceptance_rate: float | None
    """Accepted / drafted tokens."""
    by_acceptance: tuple[AcceptanceGroup, ...]
    cached_share: float | None
    """Of the prompt tokens, where that is known."""
    overhead: ClientOverhead | None


def summarize(run: RunRecord, counted: Counted | None = None) -> Summary:
    """Work out the figures of a run."""
    seen = counted or Counted(run)
    outcomes = collections.Counter(r.outcome for r in seen.sent)
    good = np.array([bool(run.slo) and meets(r, run.slo) for r in run.requests], dtype=bool)
    ends = np.array([r.ended for r in run.requests], dtype=np.float64)
    ended = np.array([r.outcome == "ok" for r in run.requests], dtype=bool) & seen.events(ends)
    chunks = seen.events(seen.chunk_times)
    begun = [r for r in run.requests if r.chunks and seen.inside(r.chunks[0][0])]
    prompts = [r.prompt_tokens for r in begun if r.prompt_tokens is not None]
    judged = [r for r in seen.sent if r.outcome != "cancelled"]
    peak, mean = _concurrency(run, seen)

    def rate(amount: float) -> float | None:
        return amount / seen.seconds if seen.seconds > 0 else None

    return Summary(
        seconds=seen.seconds,
        sent=len(seen.sent),
        requests=len(run.requests),
        ok=outcomes["ok"],
        cancelled=outcomes["cancelled"],
        failed=outcomes["error"],
        errors=_counts([r.error or "unknown" for r in seen.sent if r.outcome == "error"]),
        finish_reasons=_counts([r.finish_reason or "unknown" for r in seen.ok]),
        ttft=seen.latencies["ttft"].distribution(),
        tpot=seen.latencies["tpot"].distribution(),
        itl=seen.latencies["itl"].distribution(),
        icl=seen.latencies["icl"].distribution(),
        e2e=seen.latencies["e2e"].distribution(),
        prompt_tokens=_lengths([r.prompt_tokens for r in seen.ok]),
        output_tokens=_lengths([r.output_tokens for r in seen.ok]),
        request_rate=rate(float(ended.sum())),
        input_rate=rate(sum(prompts)) if prompts or not begun else None,
        output_rate=rate(float(seen.chunk_tokens[chunks].sum())),
        goodput_requests=rate(float((ended & good).sum())) if run.slo else None,
        goodput_tokens=(
            rate(float(seen.chunk_tokens[chunks & good[seen.owners]].sum())) if run.slo else None
        ),
        slo_share=(
            sum(meets(r, run.slo) for r in judged) / len(judged) if run.slo and judged else None
        ),
        peak_concurrency=peak,
        mean_concurrency=mean,
        acceptance_length=_acceptance_length(seen.ok),
        acceptance_rate=_share([(r.accepted, r.drafted) for r in seen.ok]),
        by_acceptance=_by_acceptance(seen.ok),
        cached_share=_share([(r.cached_tokens, r.prompt_tokens) for r in seen.ok]),
        overhead=run.overhead,
    )


def summarize_sweep(sweep: SweepRecord) -> tuple[tuple[float, ...], tuple[Summary, ...]]:
    """The values of a sweep's parameter in ascending order, and the figures at each."""
    runs = sorted(sweep.runs, key=lambda each: each[0])
    return tuple(value for value, _ in runs), tuple(summarize(run) for _, run in runs)


def _counts(kinds: list[str]) -> dict[str, int]:
    return dict(collections.Counter(kinds).most_common())


def _lengths(tokens: list[int] | list[int | None]) -> Distribution | None:
    return distribution(np.array([n for n in tokens if n is not None], dtype=np.float64))


def concurrency(requests: tuple[RequestRecord, ...]) -> tuple[Floats, Ints]:
    """How many requests were under way from each moment on at which that changed."""
    spans = [(r.sent, r.ended) for r in requests if r.ended > r.sent]
    times = np.array(spans, dtype=np.float64).reshape(-1)
    changes = np.array([1, -1] * len(spans), dtype=np.int64)
    order = np.lexsort((changes, times))  # who ends at a moment makes room for who begins then
    return times[order], np.cumsum(changes[order])


def _concurrency(run: RunRecord, seen: Counted) -> tuple[int, float | None]:
    times, levels = concurrency(run.requests)
    lengths = np.array(
        [min(r.ended, seen.end) - max(r.sent, seen.begin) for r in run.requests], dtype=np.float64
    )
    inside = seen.events(times)
    at_begin = sum(r.sent < seen.begin < r.ended for r in run.requests)
    peak = max(int(levels[inside].max(initial=0)), at_begin)
    mean = float(lengths.clip(min=0).sum()) / seen.seconds if seen.seconds > 0 else None
    return peak, mean


def _acceptance_length(requests: list[RequestRecord]) -> float | None:
    counted = [(r.output_tokens, n) for r in requests if (n := steps(r)) is not None]
    n_steps = sum(n for _, n in counted)
    return sum(n for n, _ in counted) / n_steps if n_steps else None


def _share(counts: list[tuple[int | None, int | None]]) -> float | None:
    """Of the second numbers, how much the first are, where both are known."""
    known = [(part, whole) for part, whole in counts if part is not None and whole is not None]
    whole = sum(n for _, n in known)
    return sum(n for n, _ in known) / whole if whole else None


def _by_acceptance(requests: list[RequestRecord]) -> tuple[AcceptanceGroup, ...]:
    """Groups of about equally many requests, by acceptance length; equal ones stay together."""
    known = [(length, r) for r in requests if (length := acceptance_length(r)) is not None]
    if not known:
        return ()
    lengths = np.array([length for length, _ in known])
    cuts = np.quantile(lengths, np.arange(1, N_GROUPS) / N_GROUPS, method="lower")
    places = np.searchsorted(np.unique(cuts), lengths)
    groups = []
    for place in np.unique(places):
        own = lengths[places == place]
        group = [r for (_, r), of in zip(known, places, strict=True) if of == place]
        gaps = [b[0] - a[0] for r in group for a, b in itertools.pairwise(r.chunks)]
        each = [t for r in group if (t := tpot(r)) is not None]
        groups.append(
            AcceptanceGroup(
                least=float(own.min()),
                most=float(own.max()),
                n=len(group),
                tpot=float(np.median(each)) if each else None,
                icl=float(np.median(gaps)) if gaps else None,
                e2e=float(np.median([e2e(r) for r in group])),
            )
        )
    return tuple(groups)
