"""Which part of a run is steady: neither ramp-up nor drain. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop
from mtpbatch.loadtest.records import RequestRecord

_FIRST: Final = 10


def steady_window(
    requests: Sequence[RequestRecord], arrivals: Arrivals, warmup: float
) -> tuple[float, float] | None:
    """Begin and end of the steady state, in seconds since the run began.

    It ends when the last request is sent: from then on there is less and less to do. It begins
    ``warmup`` seconds after the start, and not before the load is whole:

    - in a closed loop, when each client that is there from the start has ended its first request.
      Clients can go in step; from one such moment to another, they do so for whole rounds;
    - in an open loop, after the time that a request takes (the median of the first ten): only then
      as many can end as come.

    None: less than half of the requests were sent between, or none of them ended well.
    """
    if not requests:
        return None
    in_order = sorted(requests, key=lambda request: request.sent)
    end = in_order[-1].sent
    if isinstance(arrivals, ClosedLoop):
        first = in_order[: int(arrivals.clients.at(0.0))]
        whole = max((request.ended for request in first), default=0.0)
    else:
        taken = (request.ended - request.sent for request in in_order[:_FIRST])
        whole = in_order[0].sent + statistics.median(taken)
    begin = max(whole, warmup)
    between = [request for request in requests if begin <= request.sent <= end]
    if 2 * len(between) < len(requests) or all(each.outcome != "ok" for each in between):
        return None
    return begin, end


def whole_run(requests: Sequence[RequestRecord]) -> tuple[float, float]:
    """From the first request to the end of the last."""
    begin = min((request.sent for request in requests), default=0.0)
    return begin, max((request.ended for request in requests), default=0.0)
