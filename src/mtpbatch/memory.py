"""What sequences may hold: KV cells, and snapshots in host memory. Pure.

**Cells.** Where every sequence can have its whole context there is nothing to count. With fewer
cells, requests are parked before the cells run out, and go on when there are some. The executor
runs ahead, so what counts is not what sequences hold but what they may hold before the next plan
can be handed over (:class:`Cells`).

**Parking loses no token.** A plan P that parks a request leaves it out of its entries, and the
executor carries the parking out when P is begun. Until then the request goes on: steps of earlier
plans sample tokens of which nothing is known here when P is made. Those tokens are real, and the
state that P saves has them, so they are taken in when their results come. Results come in the order
of the steps, hence: once a result of P or of a later plan has come, all of them have been taken
in, and none can come any more. Only from then on may the request go on. Its tokens are then exactly
those that the executor has sampled, so that feeding them all rebuilds the state that it had,
and the sampler that the executor kept continues with the next one. The request may also have
ended in those steps; then the executor is told to forget it.

A plan that parks a request with a snapshot and resumes it from that at once, on another sequence
id, need not know its tokens: no step comes between, and none is fed again. It has only moved.

A request that has not been known to sample anything is not parked but starts again: its sequence
id is released, and results that still come for it are void. The same seed gives the same tokens.

**Snapshots** are kept within a number of bytes. Those of parked requests stay until they have gone
on, those of prompts make room for others, the one used longest ago first. How large one is shows
when it has been taken; before that it is estimated by those that were. So those of parked requests
keep to the budget as well as the estimate is right, and before there is any estimate only one of
them is taken at a time. A prompt's that turns out too large is dropped.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from mtpbatch.exceptions import InternalError
from mtpbatch.sequence import Sequence
from mtpbatch.types import ModelFacts

# Steps for which there must be cells when another request begins, and which a plan may run ahead:
# more would keep cells for those who run that a newcomer could have.
_ROOM: Final = 16
_LEAST_AHEAD: Final = 1  # with less, steps would wait for Python
_MEMORY: Final = 0.9  # what is left of a measurement after the next one
_SCATTER: Final = 1 / 16  # of their mean: lengths that differ less say little of what a token takes
# How many times too high estimates may be at first, and with each refusal so many times more: 35
# are refused before one is tried, and the worse it looks the more.
_DOUBT: Final = 0.5
_MORE_DOUBT: Final = 1.02


class _HandedOver(Struct, gc=False):
    """A plan as far as it decides how many steps may begin. Steps are counted over all plans."""

    n_taken: int
    """Steps that had been taken in when it was handed over."""
    run_ahead: int
    first: int | None = None
    """Its first step, once that has been taken in."""


class Cells:
    """How many steps may begin before cells run out.

    The first step of a plan begins in any case, when the step under way ends. A step that repeats a
    plan begins only while no other plan waits and at most ``run_ahead`` steps have not been taken
    in. Results are taken in and a plan is handed over in one exchange, and results come in the
    order of the steps. From that follows how many steps may begin before the next plan can be
    handed over, and from that how many cells sequences may hold by then:

    - A sequence holds at most its known tokens, and one more and its drafts for each step that
      nobody has heard of, but never more than its prompt and its token limit.
    - What a result says of a sequence is no more than was reckoned with before. So it is enough
      to look whenever more steps may begin, at each exchange.
    - What a plan parks and releases is gone when its first step begins.

    One request alone always has enough: ``n_cells`` is at least ``n_ctx``.

    State: ``_plans`` are those that may be repeated or begun, at most one of which a step has been
    taken in, the first. ``_n_taken`` steps have been taken in, and at most ``_n_begun`` have begun,
    or will before another exchange.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self._scarce = facts.n_cells < facts.n_seq * facts.n_ctx
        self._n_cells = facts.n_cells
        self._plans: deque[_HandedOver] = deque()
        self._n_taken = 0
        self._n_begun = 0

    def take_in(self, *, first: bool) -> None:
        """A step's result was taken in; ``first``: of its plan's first step."""
        if not self._scarce:
            return
        self._n_taken += 1
        if first:
            if self._plans[0].first is not None:
                self._plans.popleft()
            self._plans[0].first = self._n_taken

    def stand(self, running: Iterable[Sequence]) -> bool:
        """Let the newest plan stand; ``False`` if there must be another one."""
        if not self._scarce or not self._plans:
            return True
        n_begun = self._begun(self._plans, self._plans[-1].run_ahead)
        if self._needed(running, n_begun) > self._n_cells:
            return False
        self._n_begun = n_begun
        return True

    def short(self, running: Iterable[Sequence]) -> bool:
        """Whether no plan for all of these can be made now."""
        if not self._scarce:
            return False
        return self._needed(running, self._begun_ahead(_LEAST_AHEAD)) > self._n_cells

    def have_room(
        self, running: Iterable[Sequence], newcomer: Sequence, n_restored: int = 0
    ) -> bool:
        """Whether one more may begin, so that nobody is soon parked for it.

        ``n_restored``: tokens of the snapshot that it starts from, which at first needs cells for
        all of them.
        """
        if not self._scarce:
            return True
        n_begun = self._begun_ahead(_ROOM)
        # Of one that was parked, all tokens may be fed again.
        first = newcomer.n_tokens + max(0, n_begun - self._n_taken) * _rows(newcomer)
        most = max(min(newcomer.n_tokens_most, first), n_restored)
        return self._needed(running, n_begun) + most <= self._n_cells

    def plan(self, running: Iterable[Sequence], most: int) -> int:
        """The ``run_ahead`` of the next plan, at most ``most``. They must not be :meth:`short`."""
        if not self._scarce:
            return most
        running = list(running)
        free = self._n_cells - sum(_held(sequence) for sequence in running)
        n_steps = free // max(1, sum(_rows(sequence) for sequence in running))
        plan = _HandedOver(self._n_taken, 0)
        self._plans.append(plan)
        n_steps -= self._known(self._plans)[1] + 1 - self._n_taken
        # Half of what there is: the nearer the end, the more plans, but not one for each step.
        plan.run_ahead = min(most, _ROOM, max(_LEAST_AHEAD, n_steps // 2))
        self._n_begun = self._begun(self._plans, plan.run_ahead)
        return plan.run_ahead

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise :class:`InternalError` if cells may run out."""
        if self._scarce and self._needed(running, self._n_begun) > self._n_cells:
            raise InternalError("cells: they may run out before another plan can be handed over")

    def _needed(self, running: Iterable[Sequence], n_begun: int) -> int:
        """Cells that these may hold once so many steps have begun."""
        n_steps = max(0, n_begun - self._n_taken)
        return sum(min(s.n_tokens_most, _held(s) + n_steps * _rows(s)) for s in running)

    def _begun_ahead(self, run_ahead: int) -> int:
        """Steps that may have begun if a plan is handed over now that may run so far ahead."""
        return self._begun((*self._plans, _HandedOver(self._n_taken, run_ahead)), run_ahead)

    def _begun(self, plans: Iterable[_HandedOver], run_ahead: int) -> int:
        """Steps that may have begun before another plan can come; the last may be repeated."""
        n_firsts, n_taken = self._known(plans)
        return max(n_firsts, n_taken + run_ahead + 1)

    def _known(self, plans: Iterable[_HandedOver]) -> tuple[int, int]:
        """Steps that may have begun with the first one of the last of these plans, and those that
        may have been taken in before another plan can come.

        No other can come while two plans wait for their first step to be taken in.
        """
        n_begun = n_taken = self._n_taken
        n_before: int | None = None  # steps before the first one of the first plan that waits
        previous = 0  # run_ahead of the plan before
        for plan in plans:
            if plan.first is not None:
                n_begun = plan.first
            else:
                n_begun = max(n_begun, plan.n_taken + previous + 1)
                if n_before is None:
                    n_before = n_begun
                else:
                    n_taken = max(n_taken, n_before)
                n_begun += 1
            previous = plan.run_ahead
        return n_begun, n_taken


def _held(sequence: Sequence) -> int:
    """Cells for what is known: all of its prompt, though it may not have been fed yet."""
    return max(sequence.n_computed, sequence.n_feed)


def _rows(sequence: Sequence) -> int:
    return 1 + sequence.wish.limit


class _Rate:
    """Seconds that bytes take, recent ones counting most."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def measured(self, n_bytes: int, seconds: float) -> None:
        self._bytes = self._bytes * _MEMORY + n_bytes
        self._seconds = self._seconds * _MEMORY + seconds

    def seconds(self, n_bytes: int) -> float:
        """0 before the first measurement."""
        return n_bytes * self._seconds / self._bytes if self._bytes else 0.0


class _Sizes:
    """Bytes of a snapshot by its tokens: a line through those that were seen, recent ones counting
    most.

    A snapshot has a part that is always there and one for each token, neither below nothing. The
    less the lengths differ that were seen, the more others are taken to have the most they can:
    longer ones in proportion to their tokens, shorter ones as much as these.

    State: ``_tokens`` and ``_bytes`` are means, ``_spread`` and ``_joint`` the sums of squares and
    of products of what differs from them, and ``_weight`` is how many count.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0
        self._bytes = 0.0
        self._spread = 0.0
        self._joint = 0.0

    @property
    def known(self) -> bool:
        """Whether any was measured."""
        return self._weight > 0

    def measured(self, n_tokens: int, n_bytes: int) -> None:
        before = self._weight * _MEMORY
        self._weight = before + 1
        more_tokens, more_bytes = n_tokens - self._tokens, n_bytes - self._bytes
        self._tokens += more_tokens / self._weight
        self._bytes += more_bytes / self._weight
        count = more_tokens * before / self._weight
        self._spread = self._spread * _MEMORY + count * more_tokens
        self._joint = self._joint * _MEMORY + count * more_bytes

    def estimate(self, n_tokens: int) -> int:
        """0 before the first measurement."""
        if not self.known:
            return 0
        in_proportion = self._bytes / self._tokens
        guess = in_proportion if n_tokens > self._tokens else 0.0
        scatter = (self._tokens * _SCATTER) ** 2
        per_token = (self._joint + guess * scatter) / (self._spread + scatter)
        per_token = min(max(per_token, 0.0), in_proportion)
        return round(self._bytes + per_token * (n_tokens - self._tokens))


class _Snapshot(Struct, gc=False):
    n_tokens: int
    n_bytes: int
    """Estimated until it is reported; 0 if it is only tried."""


class Snapshots:
    """States of sequences in host memory: how much room they take, and what they are worth.

    State: ``_cached`` are those of prompts, the one used longest ago first, and ``_kept`` those of
    parked requests; together they have ``_n_bytes``, as far as that is known. ``_dropped`` are
    those that the next plan drops. Numbers are never used twice. Rates and sizes are what was
    measured. These may be wrong, and nothing would show it while all is refused because of them. So
    prompts' that seem to take up to ``_doubt`` times what they may are tried: with each one that is
    refused that is more, and after a trial it is what it was at first.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._cached: OrderedDict[int, _Snapshot] = OrderedDict()
        self._kept: dict[int, _Snapshot] = {}
        self._n_bytes = 0
        self._dropped: list[int] = []
        self._n_taken = 0
        self._sizes = _Sizes()
        self._copying = _Rate()
        self._doubt = _DOUBT

    @property
    def enabled(self) -> bool:
        """Whether there is room for any."""
        return self._budget > 0

    @property
    def n_bytes(self) -> int:
        """What all of them take, as far as it is known."""
        return self._n_bytes

    # --------------------------------------------------------------- taken and dropped

    def would_take(self, n_tokens: int, token_seconds: float) -> bool:
        """Whether :meth:`take` would take a snapshot now."""
        return (
            self.enabled
            and self._has_room(min(self.size(n_tokens), self._budget))
            and self._excess(n_tokens, token_seconds) <= max(1.0, self._doubt)
        )

    def take(self, n_tokens: int, token_seconds: float) -> int:
        """The number for a snapshot of a prompt; 0 if it is not worth it, or has no room.

        It may cost a quarter of what it may spare. ``token_seconds``: how long a token of a prompt
        takes; 0 before that is known.
        """
        if not self.would_take(n_tokens, token_seconds):
            self._doubt *= _MORE_DOUBT
            return 0
        if self._excess(n_tokens, token_seconds) > 1:
            self._doubt = _DOUBT
        return self._add(n_tokens, self._cached)

    def keep(self, n_tokens: int, seconds: float) -> int:
        """The number for the snapshot of a parked request; 0 if it is not worth it, or has no room.

        It is saved and restored, which may take so many ``seconds``; 0: nobody knows how many.
        """
        n_bytes = self.size(n_tokens)
        if not self.enabled or not self._has_room(n_bytes):
            return 0
        if self._kept and not self._sizes.known:
            return 0  # there may be no room beside that one
        if self._share_of(seconds, n_bytes, times=2) > 1:
            return 0
        return self._add(n_tokens, self._kept)

    def use(self, number: int) -> None:
        """A prompt's snapshot is restored once more."""
        self._cached.move_to_end(number)

    def drop(self, number: int) -> None:
        """Have the next plan drop it, if it is still there."""
        snapshot = self._cached.pop(number, None) or self._kept.pop(number, None)
        if snapshot is not None:
            self._n_bytes -= snapshot.n_bytes
            self._dropped.append(number)

    def take_dropped(self) -> tuple[int, ...]:
        """Those that have gone since the last call, for the next plan to drop."""
        dropped = tuple(self._dropped)
        self._dropped.clear()
        return dropped

    # ------------------------------------------------------------------------ measured

    def report(self, number: int, n_bytes: int) -> None:
        """What became of one: its bytes, or 0 if it could not be taken."""
        snapshot = self._cached.get(number) or self._kept.get(number)
        if snapshot is None:
            return
        if not n_bytes:
            self.drop(number)
            return
        self._sizes.measured(snapshot.n_tokens, n_bytes)
        self._n_bytes += n_bytes - snapshot.n_bytes
        snapshot.n_bytes = n_bytes
        if number in self._cached and not self._has_room(n_bytes):
            self.drop(number)  # and no other for it
        self._make_room(0)

    def copied(self, n_bytes: int, seconds: float) -> None:
        """How long it took to save or restore so many bytes."""
        self._copying.measured(n_bytes, seconds)

    def size(self, n_tokens: int) -> int:
        """Bytes of a snapshot of so many tokens, as far as one knows; 0 before the first one."""
        return self._sizes.estimate(n_tokens)

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks its rules. Looks at everything."""
        n_bytes = sum(s.n_bytes for s in (*self._cached.values(), *self._kept.values()))
        for rule, words in (
            (n_bytes == self._n_bytes, "bytes add up"),
            (not self._cached.keys() & self._kept.keys(), "each has one purpose"),
            (not self._cached or n_bytes <= self._budget, "the cache keeps to its budget"),
        ):
            if not rule:
                raise InternalError(f"snapshots: it does not hold that {words}")

    # ------------------------------------------------------------------------- details

    def _excess(self, n_tokens: int, token_seconds: float) -> float:
        """How many times what a prompt's snapshot may take it takes, of time or memory."""
        n_bytes = self.size(n_tokens)
        share = self._share_of(token_seconds * n_tokens, n_bytes, times=4)
        return max(share, n_bytes / self._budget)

    def _share_of(self, seconds: float, n_bytes: int, *, times: int) -> float:
        """What copying it so many times takes of that; at first nothing, so that one tries."""
        return self._copying.seconds(n_bytes) * times / seconds if seconds else 0.0

    def _has_room(self, n_bytes: int) -> bool:
        """Whether it fits beside those of parked requests."""
        return sum(s.n_bytes for s in self._kept.values()) + n_bytes <= self._budget

    def _add(self, n_tokens: int, into: dict[int, _Snapshot]) -> int:
        n_bytes = self.size(n_tokens)
        if n_bytes > self._budget:
            n_bytes = 0  # it is tried: nothing has to go until its size is known
        self._make_room(n_bytes)
        self._n_taken += 1
        into[self._n_taken] = _Snapshot(n_tokens, n_bytes)
        self._n_bytes += n_bytes
        return self._n_taken

    def _make_room(self, n_bytes: int) -> None:
        while self._cached and self._n_bytes + n_bytes > self._budget:
            self.drop(next(iter(self._cached)))
