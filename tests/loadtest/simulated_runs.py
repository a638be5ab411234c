"""Runs that nobody made: a server that answers so fast and no faster, and says so in records.

What matters of a queue is played: so many requests run, others wait; a step takes longer the more
run; each step gives a request a token and, by chance, accepted drafts.
"""

from __future__ import annotations

import functools
import heapq
import random

from mtpbatch.loadtest.records import (
    ClientOverhead,
    Outcome,
    RequestRecord,
    RunRecord,
    Slo,
    SweepRecord,
)
from mtpbatch.loadtest.summary import summarize

SLO: Slo = {"ttft": 0.6, "tpot": 0.03}


@functools.cache
def simulated_run(
    *,
    name: str = "mtpbatch",
    n: int = 400,
    rate: float = 12.0,
    slots: int = 16,
    step: float = 0.018,
    depth: int = 3,
    seed: int = 1,
) -> RunRecord:
    """``n`` requests come at random, ``rate`` a second, to a server of ``slots``."""
    chance = random.Random(seed)
    free = [0.0] * slots  # when each slot is
    records = []
    now = 0.0
    for index in range(n):
        now += chance.expovariate(rate)
        prompt, length = round(chance.lognormvariate(5, 0.6)), 2 + int(chance.expovariate(1 / 60))
        begin = max(now, heapq.heappop(free))
        busy = sum(end > begin for end in free)
        pace = step * (1 + 0.05 * busy)
        skill = min(0.95, max(0.05, chance.gauss(0.65, 0.2)))
        records.append(_request(chance, index, now, begin, prompt, length, pace, skill, depth))
        heapq.heappush(free, records[-1].ended)
    first, last = records[0].sent, records[-1].sent
    return RunRecord(
        name=name,
        started_at="2026-11-29T12:00:00Z",
        target={"model": "simulated", "slots": slots},
        load={"arrivals": "poisson", "rate": rate, "requests": n, "seed": seed},
        environment={"machine": "none", "cpus": 2, "python": "3.11"},
        window=(first + 0.1 * (last - first), last),
        requests=tuple(records),
        overhead=ClientOverhead(
            cpu_seconds=1.4,
            wall_seconds=last,
            loop_lag_p50=0.0002,
            loop_lag_p99=0.0018,
            send_late_p99=0.0021,
        ),
        slo=SLO,
    )


def _request(
    chance: random.Random,
    index: int,
    sent: float,
    begin: float,
    prompt: int,
    length: int,
    pace: float,
    skill: float,
    depth: int,
) -> RequestRecord:
    fate = chance.random()
    outcome: Outcome = "error" if fate < 0.02 else "cancelled" if fate < 0.07 else "ok"
    if outcome == "error":
        return RequestRecord(
            index=index,
            scheduled=round(sent - 0.001, 6),
            sent=round(sent, 6),
            prompt_tokens=prompt,
            output_tokens=0,
            chunks=(),
            ended=round(sent + chance.uniform(0.002, 0.5), 6),
            outcome=outcome,
            error=chance.choice(["http 429", "http 429", "broken stream"]),
        )
    end = length if outcome == "ok" else chance.randint(1, length)
    now = begin + 0.01 + prompt * 0.0004
    chunks, drafted, accepted, tokens = [(round(now, 6), 1)], 0, 0, 1
    while tokens < end:
        now += pace * chance.uniform(0.8, 1.3) * (1 + 0.06 * depth)
        kept = 0
        while kept < depth and chance.random() < skill:
            kept += 1
        drafted, accepted = drafted + depth, accepted + kept
        size = min(kept + 1, end - tokens)
        tokens += size
        chunks.append((round(now, 6), size))
    return RequestRecord(
        index=index,
        scheduled=round(sent - 0.001, 6),
        sent=round(sent, 6),
        prompt_tokens=prompt,
        cached_tokens=prompt // 4,
        output_tokens=tokens,
        chunks=tuple(chunks),
        ended=round(now + 0.0005, 6),
        outcome=outcome,
        finish_reason="length" if outcome == "ok" else "abort",
        drafted=drafted,
        accepted=accepted,
        steps=len(chunks),
    )


@functools.cache
def simulated_sweep(*, name: str = "mtpbatch", depth: int = 3, step: float = 0.018) -> SweepRecord:
    """Rates below and above what the server can do."""
    rates = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0)
    runs = tuple(
        (rate, simulated_run(name=name, rate=rate, n=200, depth=depth, step=step)) for rate in rates
    )
    kept = [rate for rate, run in runs if (summarize(run).slo_share or 0.0) >= 0.9]
    return SweepRecord(
        name=name, parameter="rate", runs=runs, slo=SLO, capacity=max(kept, default=None)
    )
