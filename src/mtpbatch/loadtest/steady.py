"""Which part of a run is steady: neither ramp-up nor drain. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from mtpbatch.loadtest.arrivals import Arrivals, ClosedLoop
from mtpbatch.loadtest.records import RequestRecord

_FIRST: Final = 10


def window(
    requests: Sequence[RequestRecord], arrivals: Arrivals, warmup: float
) -> tuple[float, float]:
    """Begin and end of the steady state, in seconds since the run began.

    It ends when the last request is sent: from then on there is less and less to do. It begins
    ``warmup`` seconds after the start, and not before the load is whole:

    - in a closed loop, when each client that is there from the start has had its first chunk;
    - in an open loop, after the time that a request takes (the median of the first ten): only then
      as many can end as come.

    Where no request was sent between that ended well, as with a single burst or when a run was
    interrupted early, the whole run is the window.
    """
    if not requests:
        return 0.0, 0.0
    in_order = sorted(requests, key=lambda request: request.sent)
    end = in_order[-1].sent
    if isinstance(arrivals, ClosedLoop):
        first = in_order[: int(arrivals.clients.at(0.0))]
        whole = max((_first_chunk(request) for request in first), default=0.0)
    else:
        taken = (request.ended - request.sent for request in in_order[:_FIRST])
        whole = in_order[0].sent + statistics.median(taken)
    begin = max(whole, warmup)
    if any(begin <= each.sent <= end and each.outcome == "ok" for each in requests):
        return begin, end
    return in_order[0].sent, max(request.ended for request in requests)


def _first_chunk(request: RequestRecord) -> float:
    return request.chunks[0][0] if request.chunks else request.ended
