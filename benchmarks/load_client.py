"""How much the client of ``mtpbatch bench`` can take, and how exactly it measures.

A mock server in a process of its own answers many streams: at once, and then at paces at which
every token comes by itself. What the client's event loop spends on a token says how many it can
take in a second; what the mock writes down itself says how much later the client saw it.
"""

from __future__ import annotations

import json
import statistics
import urllib.request
from collections.abc import Sequence

import anyio

from benchmarks.command_line import conditions, in_one_line, parser
from benchmarks.report import table
from mtpbatch.loadtest import datasets, mock
from mtpbatch.loadtest.arrivals import ClosedLoop, Level
from mtpbatch.loadtest.driver import Load, Observed, Run
from mtpbatch.loadtest.mock import Pace
from mtpbatch.loadtest.openai_target import open_server
from mtpbatch.testing import Fixed


async def measure(url: str, streams: int, tokens: int) -> Observed:
    """One request in each stream."""
    load = Load(
        arrivals=ClosedLoop(Level(streams, streams)),
        n_requests=streams,
        seconds=None,
        timeout=120,
    )
    work = datasets.work(datasets.builtin(), Fixed(tokens), 1, 0.0, seed=1)
    async with open_server(url, chat=False, model=None, api_key=None, params={}) as target:
        return await Run(target, load, work)()


def row(streams: int, tokens: int, rate: float | None) -> Sequence[str]:
    """One pace: tokens per second of all streams together; None: at once."""
    pace = Pace() if rate is None else Pace(itl=streams / rate)
    with mock.running(pace) as url:
        observed = anyio.run(measure, url, streams, tokens)
        with urllib.request.urlopen(f"{url}/truth") as truth:
            served = {each["request_id"]: each for each in json.load(truth)}
    requests = observed.requests
    if any(request.output_tokens != tokens for request in requests):
        raise RuntimeError(f"not every answer has {tokens} tokens")
    seconds = max(r.ended for r in requests) - min(r.sent for r in requests)
    overhead = observed.overhead
    late = []
    for request in requests:
        told = served[f"bench-{request.index}"]
        measured = request.chunks[0][0] - request.sent
        late.append(measured - (told["sent"][0] - told["received"]))
    each = overhead.cpu_seconds / (streams * tokens)
    return (
        "at once" if rate is None else f"{rate:.0f}",
        f"{streams * tokens / seconds:.0f}",
        f"{each * 1e6:.0f}",
        f"{overhead.cpu_seconds / overhead.wall_seconds:.0%}",
        f"{overhead.loop_lag_p50 * 1e3:.1f}, {overhead.loop_lag_p99 * 1e3:.1f}",
        f"{statistics.median(late) * 1e3:.1f}, {max(late) * 1e3:.1f}",
    )


def pace_row(ttft: float, itl: float, tokens: int = 50) -> Sequence[str]:
    """What is measured of a server whose figures are known."""
    with mock.running(Pace(ttft=ttft, itl=itl)) as url:
        requests = anyio.run(measure, url, 8, tokens).requests
    first = [r.chunks[0][0] - r.sent for r in requests]
    each = [(r.chunks[-1][0] - r.chunks[0][0]) / (tokens - 1) for r in requests]
    return (
        f"{ttft * 1e3:.0f}, {itl * 1e3:.0f}",
        f"{statistics.median(first) * 1e3:.2f}",
        f"{statistics.median(each) * 1e3:.2f}",
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--streams", type=int, default=256)
    options.add_argument("--tokens", type=int, default=100, help="of each answer")
    options.add_argument("--rates", type=float, nargs="+", default=[2500, 5000, 10000])
    given = options.parse_args()
    print(in_one_line(conditions()))
    print(f"\n{given.streams} streams of {given.tokens} tokens\n")
    head = ("tokens/s sent", "received", "µs of CPU each", "CPU", "loop late p50, p99 (ms)")
    rows = [row(given.streams, given.tokens, rate) for rate in (None, *given.rates)]
    print(table((*head, "first chunk later by, median, most (ms)"), rows))
    print("\n8 streams of 50 tokens\n")
    paces = [pace_row(0.05, 0.01), pace_row(0.2, 0.05)]
    print(table(("TTFT, ITL of the mock (ms)", "TTFT measured", "TPOT measured"), paces))


if __name__ == "__main__":
    main()
