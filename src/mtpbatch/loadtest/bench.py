"""``mtpbatch bench``: one run, or a sweep over loads."""

from __future__ import annotations

import datetime
import signal
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Literal

import anyio
import msgspec

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.loadtest import progress, units
from mtpbatch.loadtest.driver import Run
from mtpbatch.loadtest.environment import environment
from mtpbatch.loadtest.overhead import doubts
from mtpbatch.loadtest.records import RunRecord, SweepRecord
from mtpbatch.loadtest.settings import Settings
from mtpbatch.loadtest.summary import summarize
from mtpbatch.loadtest.sweep import capacity, next_value
from mtpbatch.loadtest.targets import Target, open_engine

_SWEPT: Final = "1..64"


def open_target(
    settings: Settings, config: Mapping[str, Any]
) -> AbstractAsyncContextManager[Target]:
    """Whom to measure: a server if a URL is given, else an engine opened with ``config``."""
    params = settings.make_params()
    if settings.target is None:
        return open_engine(settings.model, config, params)
    if config:
        raise InvalidParameterError(
            next(iter(config)), "is a setting of the engine in this process; a server has its own"
        )
    try:
        from mtpbatch.loadtest.openai_target import open_server
    except ImportError as error:
        raise InvalidParameterError(
            "target", f"needs {error.name}: pip install 'mtpbatch[bench]'"
        ) from None
    return open_server(
        settings.target,
        chat=settings.conversational,
        model=settings.model,
        api_key=settings.api_key,
        params=params,
    )


async def bench(settings: Settings, config: Mapping[str, Any]) -> tuple[RunRecord, bool]:
    """Make the load once. Also tells whether Ctrl-C ended it."""
    settings.check()
    async with open_target(settings, config) as target:
        return await _one(settings, target)


async def sweep(
    settings: Settings, config: Mapping[str, Any], slo_share: float, precision: float
) -> tuple[SweepRecord, bool]:
    """Make loads of different size, to find the greatest at which the SLO is kept.

    It is kept if ``slo_share`` of the requests keep it. Ctrl-C ends the run under way, which is
    dropped, and the sweep; it also tells whether that happened.
    """
    parameter: Literal["rate", "concurrency"]
    parameter = "concurrency" if settings.kind == "closed" else "rate"
    if settings.kind == "trace":
        raise InvalidParameterError("trace", "has a load of its own and cannot be swept")
    for name, given in (("slo_share", slo_share), ("precision", precision)):
        if not 0 <= given <= 1:
            raise InvalidParameterError(name, f"must be from 0 to 1, got {given}")
    low, high = units.span(parameter, getattr(settings, parameter) or _SWEPT)
    slo = settings.make_slo()

    def step(value: float, number: int) -> Settings:
        # Each with prompts of its own, lest a cache of prompts makes later runs look better.
        changes: dict[str, Any] = {parameter: f"{value:g}", "seed": settings.seed + number}
        return msgspec.structs.replace(settings, **changes)

    step(low, 0).check()
    interrupted = False
    tried: dict[float, bool] = {}
    runs: list[tuple[float, RunRecord]] = []
    async with open_target(settings, config) as target:
        while True:
            value = next_value(
                tried, low, high, precision=precision, whole=parameter == "concurrency"
            )
            if value is None:
                break
            run, interrupted = await _one(step(value, len(runs)), target)
            if interrupted:
                break
            runs.append((value, run))
            share = summarize(run).slo_share
            tried[value] = not slo or (share is not None and share >= slo_share)
            _tell(f"{parameter} {value:g}: {_verdict(run, share, tried[value])}")
    record = SweepRecord(
        name=settings.name or target.name,
        parameter=parameter,
        runs=tuple(runs),
        slo=slo,
        capacity=capacity(tried) if slo else None,
    )
    return record, interrupted


def _verdict(run: RunRecord, share: float | None, kept: bool) -> str:
    rate = summarize(run).output_rate or 0.0
    if share is None:
        return f"{rate:.0f} output tokens/s"
    return f"{rate:.0f} output tokens/s, SLO kept by {share:.1%}{'' if kept else ': too much'}"


async def _one(settings: Settings, target: Target) -> tuple[RunRecord, bool]:
    """Make a load on a target that is ready."""
    where, load = environment(), settings.make_load()
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = Run(target, load, settings.make_work())
    async with anyio.create_task_group() as watchers:
        watchers.start_soon(progress.show, run, load)
        watchers.start_soon(_stop_on_interrupt, run)
        observed = await run()
        watchers.cancel_scope.cancel()
    for kind, count in run.tally.errors.most_common():
        _tell(f"{count} x {kind}, such as: {run.tally.examples[kind]}")
    for doubt in doubts(observed.overhead):
        _tell(f"the client may be the bottleneck: {doubt}")
    if not observed.steady:
        _tell("too few requests for a steady state: all of them count, ramp-up and drain too")
    facts = settings.facts()
    if observed.interrupted:
        _tell("interrupted: what follows is of what there was by then")
        facts["interrupted"] = True
    record = RunRecord(
        name=settings.name or target.name,
        started_at=started_at,
        target=target.facts,
        load=facts,
        environment=where,
        window=observed.window,
        requests=observed.requests,
        overhead=observed.overhead,
        samples=observed.samples,
        slo=settings.make_slo(),
    )
    return record, observed.interrupted


async def _stop_on_interrupt(run: Run) -> None:
    """Ctrl-C ends the run with what there is; a second one ends the program."""
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            if run.stopped:
                raise KeyboardInterrupt
            run.stop()


def _tell(words: str) -> None:
    print(f"mtpbatch: {words}", file=sys.stderr, flush=True)
