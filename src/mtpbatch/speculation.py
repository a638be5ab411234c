"""How many tokens to draft, so that most tokens come per second. Pure.

A draft costs time: the MTP head's decodes, and a row more for the model to verify. It pays if
the model agrees often enough, which depends on the text, and if a row costs little, which depends
on how many sequences share the step. Both change all the time, so both are learnt while running:

- :class:`CostModel`: how long decodes take, by their rows, from the times of steps;
- :class:`Habit`: how deep each sequence is drafted, and how much of it is accepted;
- :class:`Calibration`: how often a draft is right of which the head is so and so sure.

:class:`Speculator` puts them together. It picks the depth that the plan gives, for all sequences
or for those that it pays for; and prices, on which each single draft stops when its next token is
not worth its row. The prices are in tokens: what costs as much time as half a token takes must be
accepted every second time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Final, Protocol

from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import (
    N_CONFIDENCES,
    EngineConfig,
    ModelFacts,
    Speculation,
    StepResult,
    Terms,
)


class DraftWish(Struct, frozen=True, gc=False):
    """How a request wants to draft."""

    limit: int
    """Most tokens per step."""
    adaptive: bool
    """As many as pay, instead of always as many as the limit."""


def draft_wish(requested: Speculation | None, config: EngineConfig, facts: ModelFacts) -> DraftWish:
    """How a request drafts.

    ``requested`` is the request's ``speculation``; ``None`` leaves it to ``config``. ``"auto"``
    on a model without MTP heads is 0; a number that cannot be served raises
    :class:`InvalidParameterError`.
    """
    wish = config.speculation if requested is None else requested
    if wish == "auto":
        return DraftWish(facts.n_draft_max, adaptive=facts.n_draft_max > 0)
    if wish > facts.n_draft_max:
        raise InvalidParameterError("speculation", _refusal(wish, facts))
    return DraftWish(wish, adaptive=False)


def _refusal(wish: int, facts: ModelFacts) -> str:
    if facts.n_draft_max == 0:
        return (
            f"{wish} was asked for, but this engine cannot draft: the model has no MTP heads, or "
            f'n_draft_max is 0; use speculation=0 or "auto", or a GGUF that was converted with '
            f"its MTP (nextn) layers"
        )
    return (
        f"{wish} is deeper than n_draft_max={facts.n_draft_max}; lower it, or raise n_draft_max "
        f"when opening the engine"
    )


# ------------------------------------------------------------------------- what things cost


class Curve:
    """Seconds that a decode takes, by its rows. Learnt from decodes; 0 before the first.

    Known at powers of two, and in between on straight lines. Each decode moves the points beside
    it, quickly at first, and all others a little: a machine that is slower for a while is slower
    for all. Points that nothing came near keep the shape of a guess, in which a pass costs as
    much as 8 of its rows.

    State: ``_points`` and ``_seen``, changed by :meth:`observe` alone.
    """

    _PASS_ROWS: Final = 8.0
    _SLOWEST: Final = 0.1  # of an observation's surprise, what its points take over in the end
    _COMMON: Final = 0.1  # and what all points do
    _SURPRISE: Final = 4.0  # at most: a step during which the machine did something else

    def __init__(self, most_rows: int) -> None:
        n_points = max(2, most_rows.bit_length() + 1)
        self._points = [self._PASS_ROWS + 2.0**i for i in range(n_points)]
        self._seen = [0] * n_points
        self._n_observed = 0

    def at(self, rows: float) -> float:
        """Seconds of a decode of so many rows. Less than one: it happens that often."""
        if not self._n_observed or rows <= 0:
            return 0.0
        if rows < 1:
            return rows * self._points[0]
        i, share = self._place(rows)
        return self._points[i] + share * (self._points[i + 1] - self._points[i])

    def per_row(self, rows: float) -> float:
        """Seconds that one row more takes."""
        return max(0.0, self.at(1.5 * rows + 1) - self.at(rows)) / (0.5 * rows + 1)

    def per_pass(self, rows: float) -> float:
        """Seconds that it takes more to decode so many rows in two passes."""
        return max(0.0, 2 * self.at(max(1.0, rows / 2)) - self.at(max(1.0, rows)))

    def observe(self, decodes: Items[int], seconds: float) -> None:
        """Take in that decodes of so many rows took so long together."""
        if seconds <= 0:
            return
        if not self._n_observed:
            self._n_observed = 1  # from here on there are times, in some unit
        expected = [self.at(rows) for rows in decodes]
        total = sum(expected)
        surprise = seconds / total
        if self._n_observed > 1:
            surprise = min(max(surprise, 1 / self._SURPRISE), self._SURPRISE)
        common = surprise ** max(self._COMMON, 1 / self._n_observed)
        self._points = [seconds * common for seconds in self._points]
        self._n_observed += 1
        for rows, part in zip(decodes, expected, strict=True):
            i, share = self._place(rows)
            for point, weight in ((i, 1 - share), (i + 1, share)):
                pace = max(self._SLOWEST, 1 / (1 + self._seen[point]))
                self._points[point] *= (surprise / common) ** (pace * weight * part / total)
                self._seen[point] += weight > 0.3

    def _place(self, rows: float) -> tuple[int, float]:
        """The point below, and how far it is to the next one: past the last, beyond 1."""
        i = min(int(rows).bit_length() - 1, len(self._points) - 2)
        return i, rows / 2**i - 1


class CostModel:
    """How long the parts of a step take, learnt from the steps.

    State: ``target`` and ``draft``, by the rows of a decode; ``prompt_row``, seconds that a row of
    a prompt adds to a step; ``overhead``, seconds of a step beside its decodes; ``step``, seconds
    of a step without prompts, lately. :meth:`observe` changes them.
    """

    _PACE: Final = 0.1
    _CHUNK_STEPS: Final = 2  # steps' time that a chunk of a prompt may take
    _LEAST_CHUNK: Final = 32  # rows: smaller ones take too many passes

    def __init__(self, facts: ModelFacts) -> None:
        self._recurrent = facts.recurrent
        self.target = Curve(facts.n_batch)
        self.draft = Curve(facts.n_batch)
        self.prompt_row = 0.0
        self.overhead = 0.0
        self.step = 0.0

    @property
    def chunk(self) -> int | None:
        """Rows of prompts in a step beside sequences that generate; ``None``: any number.

        These wait twice as long as without them, and then once more, at most; or for the rows
        that a pass must have to be worth it.
        """
        if not self.prompt_row or not self.step:
            return None
        return max(self._LEAST_CHUNK, int(self._CHUNK_STEPS * self.step / self.prompt_row))

    def observe(self, result: StepResult, lengths: Items[int], n_prompt: int) -> None:
        """Take in a step.

        ``lengths[n]`` is how many sequences verified a draft of n tokens; 0 counts those that
        decoded one token. ``n_prompt`` rows were of prompts.
        """
        decodes = [count * (1 + length) for length, count in enumerate(lengths) if count]
        if not self._recurrent and decodes:
            decodes = [sum(decodes)]
        if result.n_draft_decodes:
            per_decode = max(1, round(result.n_draft_tokens / result.n_draft_decodes))
            self.draft.observe([per_decode] * result.n_draft_decodes, result.draft_time)
        if n_prompt:
            beside = sum(map(self.target.at, decodes))
            row = max(0.0, result.target_time - beside) / n_prompt
            self.prompt_row += (row - self.prompt_row) * (self._PACE if self.prompt_row else 1)
        elif decodes:
            self.target.observe(decodes, result.target_time)
            rest = result.sample_time + min(result.gap_time, result.target_time)
            self.overhead += (rest - self.overhead) * self._PACE
            step = result.draft_time + result.target_time + rest
            self.step += (step - self.step) * (self._PACE if self.step else 1)


# --------------------------------------------------------------------- what drafts are worth


class Habit:
    """How drafting goes, by depth: how often it comes to it, and how often that is accepted.

    ``reached[d]`` is the share of steps that draft more than d tokens, and ``gained[d]`` of those
    in which more than d are accepted, of the steps that may. Both fade: what came long ago counts
    little. A sequence begins with everybody's and soon follows its own.

    State: those two, and what came since they were last brought up to date; :meth:`note` and
    :meth:`settle` change it.
    """

    __slots__ = ("_allowed", "_drafted", "_gained", "_memory", "_weight", "gained", "reached")

    def __init__(self, reached: Items[float], gained: Items[float], memory: float) -> None:
        self.reached = list(reached)
        self.gained = list(gained)
        self._memory = memory  # steps that count at most
        self._weight = [4.0] * len(self.reached)  # steps that count so far
        self._forget()

    @classmethod
    def guess(cls, n_draft_max: int, memory: float = 1.0) -> Habit:
        """Before anything is known: three of four drafts are accepted."""
        return cls([1.0] * n_draft_max, [0.75 ** (d + 1) for d in range(n_draft_max)], memory)

    def copy(self, memory: float) -> Habit:
        """One that begins with this one's figures."""
        return Habit(self.reached, self.gained, memory)

    def note(self, allowed: int, drafted: int, accepted: int) -> None:
        """Take in a step that may draft ``allowed`` tokens."""
        self._allowed[allowed] += 1
        self._drafted[drafted] += 1
        self._gained[accepted] += 1

    def settle(self, others: Habit) -> None:
        """Bring the figures up to date, and ``others``, which is everybody's, with them."""
        n_depths = len(self.reached)
        if sum(self._allowed) > self._allowed[0]:
            allowed, drafted, gained = (
                list(accumulate(reversed(counts)))[::-1][1:]
                for counts in (self._allowed, self._drafted, self._gained)
            )
            for d in range(n_depths):
                if allowed[d]:
                    for habit in (self, others):
                        habit._take(d, allowed[d], drafted[d], gained[d])
        self._forget()

    def ahead(self, limit: int) -> tuple[float, float, float]:
        """Of a step that may draft ``limit`` tokens: how many are accepted, verified, drafted."""
        verified = sum(self.reached[:limit])
        drafted = 1 + verified - self.reached[limit - 1] if limit else 0.0
        return sum(self.gained[:limit]), verified, drafted

    @property
    def next_accepted(self) -> float:
        """The chance that a draft comes to one token more and has it accepted, after one was."""
        before = sum(self.gained[:-1])
        return sum(self.gained[1:]) / before if before > 0 else 0.0

    def _take(self, d: int, allowed: int, drafted: int, gained: int) -> None:
        self._weight[d] = weight = min(self._weight[d] + allowed, self._memory)
        pace = min(1.0, allowed / weight)
        self.reached[d] += (min(1.0, drafted / allowed) - self.reached[d]) * pace
        self.gained[d] += (min(1.0, gained / allowed) - self.gained[d]) * pace

    def _forget(self) -> None:
        n_counts = len(self.reached) + 1
        self._allowed = [0] * n_counts
        self._drafted = [0] * n_counts
        self._gained = [0] * n_counts


class Calibration:
    """How often drafts are accepted of which the head is so and so sure.

    A head's probabilities are those of its training; how they relate to what the model accepts
    is learnt, for each class of confidence (see :class:`~mtpbatch.types.Terms`). Before that the
    head is taken at its word.

    State: ``_tried`` and ``_accepted`` by class, which fade; :meth:`observe` changes them.
    """

    _PRIOR: Final = 4.0  # trials that the head's own word counts as
    _MEMORY: Final = 500.0

    def __init__(self) -> None:
        said = [1 - 2 ** (-(i + 0.5) / 2) for i in range(N_CONFIDENCES)] * 2
        self._tried = [self._PRIOR] * len(said)
        self._accepted = [self._PRIOR * chance for chance in said]

    def observe(self, trials: Iterable[tuple[int, int, int]]) -> None:
        """Take in what a step says of its drafts: class, how many, accepted."""
        for i, tried, accepted in trials:
            fade = min(1.0, self._MEMORY / (self._tried[i] + tried))
            self._tried[i] = (self._tried[i] + tried) * fade
            self._accepted[i] = (self._accepted[i] + accepted) * fade

    @property
    def chances(self) -> tuple[float, ...]:
        """By class: of greedy requests, then of those with a temperature."""
        return tuple(a / t for a, t in zip(self._accepted, self._tried, strict=True))


# --------------------------------------------------------------------------- the decision


class Drafter(Protocol):
    """What of a sequence matters here."""

    @property
    def request_id(self) -> str: ...
    @property
    def wish(self) -> DraftWish: ...
    @property
    def habit(self) -> Habit: ...


class Choice(Struct, frozen=True):
    """What adaptive sequences draft from now on."""

    depth: int
    """Most tokens of those that draft."""
    left_out: frozenset[str]
    """Requests that do not, though others do."""
    terms: Terms

    def differs(self, other: Choice) -> bool:
        """Whether it is worth a new plan."""
        if self.depth != other.depth or self.left_out != other.left_out:
            return True
        one, two = self.terms, other.terms
        return self.depth > 0 and not (
            _alike(_prices(one), _prices(two), 0.02, 0.15)
            and _alike(one.greedy, two.greedy, 0.04, 0)
            and _alike(one.sampled, two.sampled, 0.04, 0)
        )


class _Outlook:
    """What one depth would come to in a step: sums over the sequences, then what follows."""

    __slots__ = (
        *("depth", "tokens", "drafted", "undrafted", "draft_rows"),
        *("left_out", "rows", "seconds"),
    )

    def __init__(self, depth: int, n_decodes: int) -> None:
        self.depth = depth
        self.tokens = 0.0
        self.drafted = 0.0  # rows of sequences that verify a draft
        self.undrafted = 0.0  # and of those that verify none
        self.draft_rows = [0.0] * n_decodes  # by decode of the draft context
        self.left_out: list[str] = []
        self.rows = 0.0
        self.seconds = 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Speculator:
    """Chooses depth and prices for the requests that leave them to the engine.

    It looks at every depth from 0 on: what a step would give and take, by the costs and habits as
    they are known. Of depths that are nearly as good the present one stays. What would have to be
    known to be sure, how long a step of another depth takes and how much would be accepted, is
    tried out now and then, for a step or two and for at most a fiftieth of the time.

    State: ``costs``, ``calibration`` and ``everybody``'s habit, which results change through
    :meth:`observe`; and through :meth:`review` the ``choice`` in force, the depth that it stays at
    when a trial ends, whether it is one, and ``_credit``, seconds that trials may still cost.
    """

    _STEPS: Final = 8  # between reviews, while the same sequences run
    _STAYS: Final = 1.02  # how much better another depth must look
    _TRIALS: Final = 0.02  # of the time may be lost by trials
    _MOST_TRIALS: Final = 8  # steps' time that may be lost at a stretch, as at the beginning
    _WORTH_A_TRIAL: Final = 0.7  # of the best speed that a depth must promise
    _SHARED_MEMORY: Final = 400.0  # steps of all sequences together
    _OWN_MEMORY: Final = 24.0  # steps of one

    def __init__(self, facts: ModelFacts) -> None:
        self._depths = range(facts.n_draft_max + 1)
        self._recurrent = facts.recurrent
        self.costs = CostModel(facts)
        self.calibration = Calibration()
        self.everybody = Habit.guess(facts.n_draft_max, self._SHARED_MEMORY)
        self._depth = facts.n_draft_max
        self.choice = self._whatever_it_costs(self._depth)
        self._trial = False
        self._next_trial = 0  # depth
        self._credit = math.inf
        self._n_steps = 0  # since the last review
        self._n_reviewed = 0  # sequences at the last review

    def new_habit(self) -> Habit:
        """For a sequence that begins."""
        return self.everybody.copy(self._OWN_MEMORY)

    def depth_of(self, sequence: Drafter) -> int:
        """Most tokens that it may draft per step, by the choice in force."""
        wish = sequence.wish
        if not wish.adaptive:
            return wish.limit
        return 0 if sequence.request_id in self.choice.left_out else self.choice.depth

    def observe(self, result: StepResult, lengths: Items[int], n_prompt: int) -> None:
        """Take in a step: see :meth:`CostModel.observe`."""
        self.costs.observe(result, lengths, n_prompt)
        if result.trials:
            self.calibration.observe(result.trials)
        self._credit += self._TRIALS * (result.target_time + result.draft_time)
        self._n_steps += 1

    def review(self, sequences: Collection[Drafter]) -> bool:
        """Choose anew if it is time to; whether the choice is another one now."""
        enough = self._n_steps >= (1 if self._trial else self._STEPS)
        if not self._n_steps or not (enough or len(sequences) != self._n_reviewed):
            return False
        self._n_reviewed = len(sequences)
        self._n_steps = 0
        adaptive = False
        for sequence in sequences:
            adaptive = adaptive or sequence.wish.adaptive
            sequence.habit.settle(self.everybody)
        if not adaptive:
            return False
        outlooks = self._outlooks(sequences)
        best = max(self._depths, key=lambda depth: outlooks[depth].speed)
        if outlooks[best].speed > self._STAYS * outlooks[self._depth].speed:
            self._depth = best
        trial = None if self._trial else self._depth_to_try(outlooks)
        self._trial = trial is not None
        if trial is not None:
            choice = self._whatever_it_costs(trial)
        else:
            outlook = outlooks[self._depth]
            choice = Choice(self._depth, frozenset(outlook.left_out), self._terms(outlook))
        if not choice.differs(self.choice):
            return False
        self.choice = choice
        return True

    def _outlooks(self, sequences: Iterable[Drafter]) -> list[_Outlook]:
        """What a step would come to, by depth. Only those draft for whom it pays by itself."""
        outlooks = [_Outlook(depth, self._depths[-1]) for depth in self._depths]
        target_row, draft_row = self.choice.terms.target_row, self.choice.terms.draft_row
        for sequence in sequences:
            wish, habit = sequence.wish, sequence.habit
            for outlook in outlooks:
                limit = min(wish.limit, outlook.depth) if wish.adaptive else wish.limit
                gain, rows, draft_rows = habit.ahead(limit)
                if limit and wish.adaptive and gain <= target_row * rows + draft_row * draft_rows:
                    outlook.left_out.append(sequence.request_id)
                    limit = 0
                outlook.tokens += 1
                if limit == 0:
                    outlook.undrafted += 1
                    continue
                first = habit.reached[0]
                outlook.tokens += gain
                outlook.undrafted += 1 - first
                outlook.drafted += first + rows
                outlook.draft_rows[0] += 1 + gain  # what was accepted last is decoded as well
                for d in range(1, limit):
                    outlook.draft_rows[d] += habit.reached[d - 1]
        for outlook in outlooks:
            outlook.rows = outlook.drafted + outlook.undrafted
            passes = [outlook.drafted, outlook.undrafted] if self._recurrent else [outlook.rows]
            outlook.seconds = (
                self.costs.overhead
                + sum(map(self.costs.target.at, passes))
                + sum(map(self.costs.draft.at, outlook.draft_rows))
            )
        return outlooks

    def _terms(self, outlook: _Outlook) -> Terms:
        """The prices where a step is as an outlook says."""
        speed, target, draft = outlook.speed, self.costs.target, self.costs.draft
        draft_rows = max(outlook.draft_rows, default=0.0)
        draft_row = draft.per_row(draft_rows)
        chances = self.calibration.chances
        return Terms(
            target_row=speed * target.per_row(outlook.rows),
            target_pass=speed * target.per_pass(outlook.rows),
            draft_row=speed * draft_row,
            draft_decode=speed * max(0.0, draft.at(draft_rows) - draft_row * draft_rows),
            greedy=chances[:N_CONFIDENCES],
            sampled=chances[N_CONFIDENCES:],
        )

    def _depth_to_try(self, outlooks: Items[_Outlook]) -> int | None:
        """Another depth, if one is worth knowing more about and can be afforded."""
        present = outlooks[self._depth]
        if not present.seconds:  # nothing has been timed yet
            return None
        self._credit = min(self._credit, self._MOST_TRIALS * present.seconds)
        for _ in outlooks:
            depth, self._next_trial = self._next_trial, (self._next_trial + 1) % len(outlooks)
            outlook = outlooks[depth]
            if depth == self._depth or outlook.speed < self._WORTH_A_TRIAL * present.speed:
                continue
            # Another step goes by until it is known how the first went.
            lost = 2 * (outlook.seconds - outlook.tokens / present.speed)
            lost = max(lost, 0.1 * present.seconds)  # as it may be worse than it looks
            if lost <= self._credit:
                self._credit -= lost
                return depth
        return None

    def _whatever_it_costs(self, depth: int) -> Choice:
        """All sequences draft to a depth, to see what comes of it."""
        chances = self.calibration.chances
        terms = Terms(0.0, 0.0, 0.0, 0.0, chances[:N_CONFIDENCES], chances[N_CONFIDENCES:])
        return Choice(depth, frozenset(), terms)


def _prices(terms: Terms) -> tuple[float, ...]:
    return terms.target_row, terms.target_pass, terms.draft_row, terms.draft_decode


def _alike(some: Items[float], others: Items[float], absolute: float, relative: float) -> bool:
    return all(
        abs(one - other) <= absolute + relative * max(one, other)
        for one, other in zip(some, others, strict=True)
    )
