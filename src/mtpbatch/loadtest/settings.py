"""What a load test is asked to be, as it is written on a command line, and what follows from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.in_words import shown
from mtpbatch.loadtest import datasets, units
from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop, Level, OpenLoop, Replay
from mtpbatch.loadtest.datasets import Dataset, Filler, Listed, Work
from mtpbatch.loadtest.driver import Load
from mtpbatch.loadtest.lengths import lengths
from mtpbatch.loadtest.records import Facts, Slo
from mtpbatch.loadtest.traces import TraceEntry, read_trace
from mtpbatch.testing.workload import Lengths

ArrivalKind: TypeAlias = Literal["closed", "constant", "poisson", "gamma", "burst", "trace"]
ARRIVALS: Final[tuple[ArrivalKind, ...]] = get_args(ArrivalKind)
DRAWN: Final = ("random", "shared-prefix")
"""Datasets that are made up."""

_CLIENTS: Final = 8
_PROMPT: Final = "128"
_OUTPUT: Final = 128  # tokens, where neither the user nor the dataset says
_FEWEST: Final = 100  # requests, where nobody says
_TURNS: Final = 10  # requests of each client, where nobody says
_GOES_WITH: Final[dict[str, tuple[ArrivalKind, ...]]] = {
    "concurrency": ("closed",),
    "rate": ("constant", "poisson", "gamma", "burst"),
    "burstiness": ("gamma",),
    "burst_size": ("burst",),
    "trace": ("trace",),
}


class Settings(Struct, frozen=True, kw_only=True):
    """A load test. ``None`` means: what follows from the others."""

    # --- whom
    target: str | None = None
    model: str | None = None
    endpoint: Literal["completions", "chat"] | None = None
    api_key: str | None = None
    params: str = "{}"
    timeout: str = "10m"
    name: str | None = None
    # --- what
    dataset: str = "builtin"
    prompt_length: str | None = None
    output_length: str | None = None
    token_ids: str | None = None
    prefixes: int | None = None
    prefix_length: str | None = None
    ignore_eos: bool = False
    cancel: float = 0.0
    # --- when
    arrivals: ArrivalKind | None = None
    concurrency: str | None = None
    rate: str | None = None
    burstiness: float | None = None
    burst_size: int | None = None
    trace: str | None = None
    requests: int | None = None
    duration: str | None = None
    warmup: str | None = None
    seed: int = 0
    # --- how it is judged
    slo: str | None = None

    def __post_init__(self) -> None:
        _at_least("requests", self.requests, 1)
        _at_least("prefixes", self.prefixes, 1)
        if not 0 <= self.cancel <= 1:
            raise InvalidParameterError("cancel", f"must be a share from 0 to 1, got {self.cancel}")
        for name, kinds in _GOES_WITH.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise InvalidParameterError(
                    name, f"goes with --arrivals {' or '.join(kinds)}, not with {self.kind}"
                )
        if self.kind == "trace" and self.trace is None:
            raise InvalidParameterError("arrivals", "trace needs --trace FILE")
        if self.kind in _GOES_WITH["rate"] and self.rate is None:
            raise InvalidParameterError("arrivals", f"{self.kind} needs --rate")
        if self.kind == "gamma" and self.burstiness is None:
            raise InvalidParameterError("arrivals", "gamma needs --burstiness")
        if self.dataset not in DRAWN and self.kind != "trace":
            for name in ("prompt_length", "token_ids"):
                if getattr(self, name) is not None:
                    raise InvalidParameterError(name, f"goes with --dataset {' or '.join(DRAWN)}")
        for name in ("prefixes", "prefix_length"):
            if getattr(self, name) is not None and self.dataset != "shared-prefix":
                raise InvalidParameterError(name, "goes with --dataset shared-prefix")

    def check(self) -> None:
        """Raise what is wrong, before anything is loaded."""
        self.make_load()
        self.make_work()
        self.make_params()
        self.make_slo()

    # -------------------------------------------------------------------- when

    @property
    def kind(self) -> ArrivalKind:
        """How requests come."""
        if self.arrivals is not None:
            return self.arrivals
        if self.trace is not None:
            return "trace"
        return "closed" if self.rate is None else "poisson"

    @property
    def seconds(self) -> float | None:
        """How long requests are sent."""
        return None if self.duration is None else units.duration("duration", self.duration)

    def make_arrivals(self) -> Arrivals:
        """When requests come."""
        if self.kind == "trace":
            return Replay(tuple(entry.moment for entry in self.traced))
        if self.kind == "closed":
            return ClosedLoop(self._level("concurrency", self.concurrency or str(_CLIENTS)))
        burstiness = {"poisson": 1.0, "gamma": self.burstiness or 1.0}.get(self.kind, math.inf)
        rate = self._level("rate", self.rate or "1")
        return OpenLoop(rate, burstiness, self.burst_size or 1)

    def _level(self, name: str, text: str) -> Level:
        low, high = units.span(name, text)
        if name == "concurrency" and max(low, high) < 1:
            raise InvalidParameterError(name, f"must be at least 1, got {text}")
        if low == high:
            return Level(low, high)
        if self.seconds is None or not math.isfinite(low + high):
            raise InvalidParameterError(
                name, f"{text} needs --duration, within which it goes from {low:g} to {high:g}"
            )
        return Level(low, high, self.seconds)

    @property
    def traced(self) -> tuple[TraceEntry, ...]:
        """The requests of the trace."""
        return _traced(Path(self.trace or ""))

    def make_load(self) -> Load:
        """The load on the target."""
        arrivals = self.make_arrivals()
        n_requests = self.requests
        if n_requests is None and self.seconds is None:
            most = arrivals.most if isinstance(arrivals, ClosedLoop) else 0
            n_requests = len(self.traced) if self.trace else max(_FEWEST, _TURNS * most)
        if n_requests is None and isinstance(arrivals, OpenLoop) and arrivals.rate.end == math.inf:
            raise InvalidParameterError("rate", "inf sends all at once and needs --requests")
        return Load(
            arrivals=arrivals,
            n_requests=n_requests,
            seconds=self.seconds,
            timeout=units.duration("timeout", self.timeout),
            warmup=0.0 if self.warmup is None else units.duration("warmup", self.warmup),
            seed=self.seed,
        )

    # -------------------------------------------------------------------- what

    def make_work(self) -> Iterator[Work]:
        """The requests, one after another."""
        output = None if self.output_length is None else self._lengths("output_length")
        return datasets.work(self.make_dataset(), output, _OUTPUT, self.cancel, self.seed)

    def make_dataset(self) -> Dataset:
        """What prompts are of."""
        if self.kind == "trace":
            return datasets.Traced(self.traced, self._filler)
        match self.dataset:
            case "builtin":
                return datasets.builtin()
            case "random":
                return datasets.Drawn(self._lengths("prompt_length"), self._filler)
            case "shared-prefix":
                prefix, suffix = self._lengths("prefix_length"), self._lengths("prompt_length")
                return datasets.SharedPrefixes(self.prefixes or 1, prefix, suffix, self._filler)
        return datasets.read_dataset("dataset", Path(self.dataset))

    def _lengths(self, name: str) -> Lengths:
        return lengths(name, getattr(self, name) or _PROMPT)

    @property
    def _filler(self) -> Filler:
        if self.token_ids is None:
            return datasets.words
        low, _, high = self.token_ids.partition("..")
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
            raise InvalidParameterError(
                "token_ids", f"must be a range such as 100..20000; got {shown(self.token_ids)}"
            )
        return datasets.TokenIds(int(low), int(high))

    @property
    def conversational(self) -> bool:
        """Whether requests go to the chat endpoint: as asked for, else as the dataset needs."""
        if self.endpoint is not None:
            return self.endpoint == "chat"
        dataset = self.make_dataset()
        return isinstance(dataset, Listed) and dataset.conversational

    # -------------------------------------------------------------------- the rest

    def make_params(self) -> dict[str, Any]:
        """Fields of every request besides its prompt and length."""
        try:
            given = msgspec.json.decode(self.params, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise InvalidParameterError(
                "params",
                f'must be JSON such as {{"temperature": 0.8}}; got {shown(self.params)}: {error}',
            ) from None
        return {"temperature": 0} | ({"ignore_eos": True} if self.ignore_eos else {}) | given

    def make_slo(self) -> Slo:
        """What a good request keeps to."""
        return {} if self.slo is None else units.slo("slo", self.slo)

    def facts(self) -> Facts:
        """What the record says of the load: all that was asked for, but the target."""
        left_out = ("target", "model", "endpoint", "api_key", "name")
        said = {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None and name not in left_out
        }
        return said | {"arrivals": self.kind}


@functools.lru_cache(maxsize=1)
def _traced(path: Path) -> tuple[TraceEntry, ...]:
    try:
        return read_trace("trace", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError("trace", f"cannot be read: {error}") from None


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InvalidParameterError(name, f"must be at least {least}, got {value}")
