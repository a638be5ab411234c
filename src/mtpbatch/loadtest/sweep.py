"""Which loads to try to find how much a target can take. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_value(
    tried: Mapping[float, bool], low: float, high: float, *, precision: float, whole: bool
) -> float | None:
    """The next load to try, from ``low`` to ``high``; None when the capacity is known.

    ``tried`` says of each load so far whether the target could take it. Loads double until one is
    too much, which shows the whole curve; then the gap between the last that was not and the first
    that was is halved, until it is ``precision`` of the former. ``whole``: loads are whole numbers.
    """
    if not tried:
        return low
    taken = [load for load, could in tried.items() if could]
    too_much = [load for load, could in tried.items() if not could]
    if not too_much:
        top = max(taken)
        return None if top >= high else min(high, 2 * top)
    first_bad = min(too_much)
    last_good = max((load for load in taken if load < first_bad), default=None)
    if last_good is None or first_bad - last_good <= precision * last_good:
        return None
    middle = (last_good + first_bad) / 2
    if whole:
        middle = math.floor(middle)
    return None if middle <= last_good else middle


def capacity(tried: Mapping[float, bool]) -> float | None:
    """The greatest load that the target could take, with all smaller ones; None: not even one."""
    too_much = [load for load, could in tried.items() if not could]
    limit = min(too_much, default=math.inf)
    return max((load for load, could in tried.items() if could and load < limit), default=None)
