"""How many tokens to draft, so that most tokens come per second. Pure.

A draft costs time: the MTP head's decodes, and a row more for the model to verify. It pays if
the model agrees often enough, which depends on the text, and if a row costs little, which depends
on how many sequences share the step. Both change all the time, so both are learnt while running:

- ``costs.CostModel``: how long decodes take, by their rows, from the times of steps;
- :class:`Habit`: how deep each sequence is drafted, and how much of it is accepted;
- :class:`Calibration`: how often a draft is right of which the head is so and so sure.

:class:`Speculator` puts them together. It picks the depth that the plan gives, for all sequences
or for those that it pays for; and prices, on which each single draft stops when its next token is
not worth its row. The prices are in tokens: what costs as much time as half a token takes must be
accepted every second time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from itertools import accumulate, compress
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from mtpbatch.costs import CostModel
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

    @property
    def always(self) -> bool:
        """Whether it drafts in any case."""
        return self.limit > 0 and not self.adaptive


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


# --------------------------------------------------------------------- what drafts are worth


class Habit:
    """How drafting goes, by depth: how often it comes to it, and how often that is accepted.

    ``reached[d]`` is the share of steps that draft more than d tokens, and ``gained[d]`` of those
    in which more than d are accepted, of the steps that may; ``acceptance`` is the chance of a
    draft that is verified, if all before it were accepted. All fade: what came long ago counts
    little. A sequence begins with everybody's and soon follows its own.

    State: those three, ``behind``, the tokens that the head has to take in before it drafts, and
    what came since they were last brought up to date. :meth:`note` and :meth:`update` change it,
    and everybody's :meth:`follow` and :meth:`fade`; ``memory`` is whose it is to decide.
    """

    __slots__ = (
        *("reached", "gained", "acceptance", "behind", "memory", "_weight", "_n_tried"),
        *("_allowed", "_drafted", "_gained", "_n_refused", "_doubts"),
    )
    _PRIOR: Final = 4.0  # steps, and drafts, that what it begins with counts as
    _FADES: Final = 4.0  # turns

    def __init__(
        self, reached: Items[float], gained: Items[float], acceptance: float, memory: float
    ) -> None:
        self.reached = list(reached)
        self.gained = list(gained)
        self.acceptance = acceptance
        self.behind = 0
        self.memory = memory  # steps that count at most
        self._weight = [self._PRIOR] * len(self.reached)  # steps that count so far
        self._n_tried = self._PRIOR  # drafts that do
        self._doubts: dict[float, list[float]] = {}  # asked for since the figures changed
        self._forget()

    @classmethod
    def guess(cls, n_draft_max: int, memory: float = 1.0, acceptance: float = 0.75) -> Habit:
        """Before anything is known: three of four drafts are accepted."""
        gained = [acceptance ** (d + 1) for d in range(n_draft_max)]
        return cls([1.0] * n_draft_max, gained, acceptance, memory)

    def copy(self, memory: float, behind: int) -> Habit:
        """One that begins with this one's figures."""
        habit = Habit(self.reached, self.gained, self.acceptance, memory)
        habit.behind = behind
        return habit

    def fade(self, depth: int, n_turns: float) -> None:
        """All sequences were replaced so many times, and none drafted deeper than so: what was
        known of deeper drafts counts less."""
        kept = math.exp(-n_turns / self._FADES)
        for d in range(depth, len(self._weight)):
            self._weight[d] = self._PRIOR + (self._weight[d] - self._PRIOR) * kept
        self._doubts.clear()

    def doubt(self, depth: int, n_steps: float = math.inf) -> float:
        """Standard deviation of how many of so many drafts are accepted; or, of it, how much may
        turn out in so many steps."""
        if n_steps not in self._doubts:
            by_depth = (
                math.sqrt((gained * w + 1) * ((1 - gained) * w + 1) / (w + 3) / (1 + w / n_steps))
                / (w + 2)
                for gained, w in zip(self.gained, self._weight, strict=True)
            )
            self._doubts[n_steps] = list(accumulate(by_depth, initial=0.0))
        return self._doubts[n_steps][depth]

    def _forget(self) -> None:
        n_counts = len(self.reached) + 1
        self._n_refused = 0
        self._allowed = [0] * n_counts
        self._drafted = [0] * n_counts
        self._gained = [0] * n_counts
        self._doubts.clear()

    def note(self, allowed: int, drafted: int, accepted: int) -> None:
        """Take in a step that may draft ``allowed`` tokens."""
        self.behind = 1 + accepted if drafted else self.behind + 1
        if allowed:
            self._allowed[allowed] += 1
            self._drafted[drafted] += 1
            self._gained[accepted] += 1
            self._n_refused += drafted > accepted

    def follow(self, others: Collection[Habit]) -> None:
        """Take in what came to others since they were brought up to date."""
        self._allowed = _totals([other._allowed for other in others])
        self._drafted = _totals([other._drafted for other in others])
        self._gained = _totals([other._gained for other in others])
        self._n_refused = sum([other._n_refused for other in others])
        self.update()

    def update(self) -> None:
        """Bring the figures up to date."""
        weights, memory = self._weight, self.memory
        n_steps = n_drafted = n_gained = n_accepted = 0
        # From the deepest on: a step that reached a depth reached those before it. At a depth that
        # was not allowed there is nothing to learn.
        for d in range(len(weights) - 1, -1, -1):
            n_steps += self._allowed[d + 1]
            if not n_steps:
                continue
            n_drafted += self._drafted[d + 1]
            n_gained += self._gained[d + 1]
            n_accepted += n_gained
            weight = weights[d] + n_steps
            if weight > memory:
                weight = memory
            weights[d] = weight
            pace = n_steps / weight if n_steps < weight else 1.0
            reached = n_drafted / n_steps if n_drafted < n_steps else 1.0
            gained = n_gained / n_steps if n_gained < n_steps else 1.0
            self.reached[d] += (reached - self.reached[d]) * pace
            self.gained[d] += (gained - self.gained[d]) * pace
        if not n_steps:
            return
        n_tried = n_accepted + self._n_refused
        if n_tried:
            self._n_tried = min(self._n_tried + n_tried, memory)
            pace = min(1.0, n_tried / self._n_tried)
            self.acceptance += (n_accepted / n_tried - self.acceptance) * pace
        self._forget()


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
        for i, n_tried, n_accepted in trials:
            tried, accepted = self._tried[i] + n_tried, self._accepted[i] + n_accepted
            fade = self._MEMORY / tried if tried > self._MEMORY else 1.0
            self._tried[i], self._accepted[i] = tried * fade, accepted * fade

    @property
    def chances(self) -> tuple[float, ...]:
        """By class: of greedy requests, then of those with a temperature."""
        return tuple([a / t for a, t in zip(self._accepted, self._tried, strict=True)])


# --------------------------------------------------------------------------- the decision


class Drafter(Protocol):
    """What of a sequence matters here."""

    @property
    def request_id(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def wish(self) -> DraftWish: ...
    @property
    def habit(self) -> Habit: ...


class Choice(Struct, frozen=True):
    """What adaptive sequences draft from now on."""

    depth: int
    """Most tokens of those that draft."""
    terms: Terms
    left_out: frozenset[str] = frozenset()
    """Requests that do not, though others do."""
    trial: int | None = None
    """A depth to try out."""
    on_trial: frozenset[str] = frozenset()
    """Requests that draft to it, whatever that costs."""
    keep_prompts: bool = True
    """Whether the head may have to take in the prompts of now."""

    def differs(self, other: Choice) -> bool:
        """Whether it is worth a new plan."""
        if (self.depth, self.left_out, self.trial, self.on_trial) != (
            *(other.depth, other.left_out, other.trial, other.on_trial),
        ):
            return True
        one, two = self.terms, other.terms
        return self.depth > 0 and not (
            _alike(_prices(one), _prices(two), 0.02, 0.15)
            and _alike(one.greedy, two.greedy, 0.04, 0)
            and _alike(one.sampled, two.sampled, 0.04, 0)
        )


class _Drafting(Struct, frozen=True, gc=False):
    """Sequences that may draft up to so many tokens in a step, and what is ahead of them in all."""

    limit: int
    n: int
    accepted: float
    verified: list[float]
    """With a limit of 0, 1, 2, …, up to this one."""


class _Ahead:
    """What is ahead of sequences: ``accepted[n][i]`` of the i-th one if it may draft n tokens, and
    ``verified``. In columns, as each review sums them several times. Of one sequence at least."""

    __slots__ = ("accepted", "n", "verified")

    def __init__(self, habits: Collection[Habit]) -> None:
        self.n = len(habits)
        none = (0.0,) * self.n
        gained = zip(*[habit.gained for habit in habits], strict=True)
        reached = zip(*[habit.reached for habit in habits], strict=True)
        self.accepted = [none, *accumulate(gained, _plus)]
        self.verified = [none, *accumulate(reached, _plus)]

    def pays(self, limit: int, terms: Terms) -> list[bool]:
        """For whom it pays to draft up to a limit, which is not 0."""
        row, draft = terms.target_row, terms.draft_row
        columns = self.accepted[limit], self.verified[limit], self.verified[limit - 1]
        # One more is drafted than is verified of what comes before it.
        return [gain > row * n + draft * (1 + m) for gain, n, m in zip(*columns, strict=True)]

    def all(self, limit: int) -> _Drafting:
        """All of them, with a limit."""
        verified = [sum(column) for column in self.verified[: limit + 1]]
        return _Drafting(limit, self.n, sum(self.accepted[limit]), verified)

    def some(self, limit: int, who: Items[bool]) -> _Drafting:
        """Some of them, with a limit."""
        verified = [sum(compress(column, who)) for column in self.verified[: limit + 1]]
        return _Drafting(limit, sum(who), sum(compress(self.accepted[limit], who)), verified)


class _Outlook(Struct, gc=False):
    """What a step with drafts of one depth would come to."""

    depth: int
    n_drafting: int
    """Sequences."""
    tokens: float
    rows: float
    passes: float
    n_draft_decodes: float
    n_draft_rows: float
    seconds: float
    left_out: frozenset[str] = frozenset()
    """As that of a :class:`Choice`."""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Speculator:
    """Chooses depth and prices for the requests that leave them to the engine.

    It looks at every depth from 0 on: what a step would give and take, by the costs and habits as
    they are known. Another than the present one is taken if it is better though what is uncertain
    of it turned out badly, and gains in some steps what the head has to catch up with.

    How long a step of another depth takes, and how much would be accepted, is tried out with a few
    sequences or with all, for some steps, if what that may find out is worth more than it costs:
    little is known and the depth may well be better, or requests have begun since deeper drafts
    were seen last, whose texts may be of another kind; and it looks as if there was time to use it,
    because about as many sequences have run for some time. What trials are expected to lose is less
    than a hundredth of the time. For one that loses much, as long prompts are to be caught up with,
    that is saved up. While load and depth stay as they are, trials become rarer.

    State: what :meth:`observe` learns from results: ``costs``, ``calibration``, ``everybody``'s
    habit, and ``_n_lengths``, how many lengths drafts have in a step, that of none included, by the
    greatest of them; ``_prompts`` and ``_answers``, how long these are of adaptive requests that
    begin and end, and ``_answer``, how long answers are with those under way; ``_n_begun`` of such
    requests since any were seen to draft deeper. And what :meth:`review` decides: the ``choice`` in
    force; ``_credit``, seconds that trials may still lose, and ``_saved_for``, what the cheapest
    one loses that is worth it and takes more; ``_n_trial_steps``, of the present trial; ``_load``,
    about as many sequences as have run since the step ``_load_since``; ``_next_trial``, the step
    before which there is none, and ``_pause``, the steps from that one to the next; of very many
    sequences, whose turn it is (``_next_in_turn``).
    """

    _STEPS: Final = 2  # between reviews, while about as many sequences run
    # Of steps between reviews, too, for they cost time: while some draft, and while nobody does,
    # which shows nothing new.
    _SECONDS: Final = (0.03, 0.2)
    _FEW: Final = 0.25  # of them may come or go
    _STAYS: Final = 1.01  # how much better another depth must look
    _WARY: Final = 0.5  # by how much of its doubt worse than it does
    _TRIALS: Final = 0.0075  # of the time may be lost by trials
    _TRIAL_SECONDS: Final = 0.05  # that a trial goes on
    _TRIAL_STEPS: Final = (3, 8)  # but so many at least, and at most
    # Steps' time of that which is kept, and most for a trial that takes more, all at a stretch.
    _MOST_TRIALS: Final = (2, 32)
    _SPARE: Final = 1.25  # what is saved for loses more, the longer it takes
    _TRIED_WITH: Final = 4  # sequences at most, or all
    _PLANS: Final = 3e-4  # seconds that the plans of a trial cost
    _PAUSES: Final = (4, 128)  # steps between trials, at first and in the end
    _OTHER_TEXT: Final = 0.05  # how probably a request has a text of another kind than those before
    _GOOD_TEXT: Final = 0.9  # of the next drafts of one that drafts are good at, so many are right
    _LASTS: Final = (256, 1024)  # steps that a load is taken to go on, at least and at most
    _PAYS_WITHIN: Final = 64  # steps
    _LENGTHS_PACE: Final = 0.05
    # What it takes to keep a row of a prompt for the head, in rows of the head: the model's last
    # layer has to compute it as well.
    _KEPT: Final = 1.5
    _SHARED_MEMORY: Final = (16.0, 12.0)  # steps of sequences: so many, and for each that runs
    _OWN_MEMORY: Final = 24.0  # steps of one
    _IN_A_REVIEW: Final = 64  # sequences whose steps are taken in: of all of them it takes too long

    def __init__(self, facts: ModelFacts) -> None:
        self._depths = range(facts.n_draft_max + 1)
        self._recurrent = facts.recurrent
        self._adaptive = [DraftWish(depth, adaptive=True) for depth in self._depths]
        self.costs = CostModel(facts)
        self.calibration = Calibration()
        self.everybody = Habit.guess(facts.n_draft_max, self._SHARED_MEMORY[0])
        chances = self.calibration.chances
        terms = Terms(0.0, 0.0, 0.0, 0.0, chances[:N_CONFIDENCES], chances[N_CONFIDENCES:])
        self.choice = Choice(facts.n_draft_max, terms)
        self._n_lengths = [1.0] * len(self._depths)
        self._prompts = _Mean(0.0, 0)
        self._answers = _Mean(self._PAYS_WITHIN, 1)
        self._answer = self._answers.value
        self._credit = math.inf
        self._saved_for = 0.0
        self._n_trial_steps = 0
        self._n_steps = 0
        self._n_steps_reviewed = 0
        self._since_review = 0.0
        self._n_reviewed = 0  # sequences at the last review
        self._next_in_turn = 0
        self._load = 0
        self._load_since = 0
        self._next_trial = 0
        self._n_begun = 0
        self._pause = self._PAUSES[0]

    def new_habit(self, wish: DraftWish, n_prompt: int) -> Habit:
        """For a sequence that begins, with so many tokens of a prompt to be computed.

        One whose depth is fixed, at none perhaps, says nothing of how long the others are.
        """
        if wish.adaptive:
            self._n_begun += 1
            self._prompts.take(n_prompt)
            # Deeper drafts of it are not seen.
            self.everybody.fade(self.choice.depth, 1 / max(1, self._n_reviewed))
        return self.everybody.copy(self._OWN_MEMORY, n_prompt)

    def wish_for(self, sequence: Drafter) -> DraftWish:
        """How it drafts from now on, by the choice in force."""
        wish, choice = sequence.wish, self.choice
        if not wish.adaptive:
            return wish
        if choice.trial is not None and sequence.request_id in choice.on_trial:
            return DraftWish(choice.trial, adaptive=False)
        if sequence.request_id in choice.left_out:
            return self._adaptive[0]
        return self._adaptive[choice.depth]

    def observe(self, result: StepResult, lengths: Items[int], n_prompt: int) -> None:
        """Take in a step: see :meth:`CostModel.observe`."""
        self.costs.observe(result, lengths, n_prompt)
        if self.choice.trial is None:
            present = [n for n, count in enumerate(lengths) if count]
            longest = present[-1] if present else 0
            n_lengths = self._n_lengths[longest]
            self._n_lengths[longest] += (len(present) - n_lengths) * self._LENGTHS_PACE
        if result.trials:
            self.calibration.observe(result.trials)
        seconds = result.draft_time + result.target_time + result.sample_time
        self._credit += self._TRIALS * seconds
        self._since_review += seconds
        self._n_steps += 1

    def learn(self, ended: Drafter) -> None:
        """Take in the last steps of a sequence that has ended."""
        self.everybody.follow([ended.habit])
        if ended.wish.adaptive:
            self._answers.take(max(1, len(ended.token_ids)))

    def review(self, sequences: Collection[Drafter]) -> bool:
        """Choose anew if it is time to; whether the choice is another one now."""
        n_new = self._n_steps - self._n_steps_reviewed
        if self.choice.trial is not None:
            enough = n_new >= self._n_trial_steps
        else:
            seconds = self._SECONDS[not self.choice.depth]
            enough = n_new >= self._STEPS and self._since_review >= seconds
        change = abs(len(sequences) - self._n_reviewed)
        if not n_new or not (enough or change > self._FEW * self._n_reviewed):
            return False
        self._n_reviewed = len(sequences)
        self._n_steps_reviewed = self._n_steps
        self._since_review = 0.0
        steps, steps_each = self._SHARED_MEMORY
        self.everybody.memory = steps + steps_each * len(sequences)
        deepest = self.choice.depth == self._depths[-1]
        if deepest or (self.choice.trial or 0) > self.choice.depth:
            self._n_begun = 0  # new requests show what they have
        if not any(sequence.wish.adaptive for sequence in sequences):
            # What was noted of others waits until one comes, or they end.
            if self.choice.trial is None or not sequences:
                return False
            self.choice = msgspec.structs.replace(self.choice, trial=None, on_trial=frozenset())
            return True
        self._take_in(sequences)
        # That answers have become longer is seen before these have ended.
        lengths = [len(sequence.token_ids) for sequence in sequences if sequence.wish.adaptive]
        self._answer = self._answers.raised_by(len(lengths), sum(lengths))
        if not (self.costs.step and self.costs.target.known):  # nothing but prompts was timed yet
            return False
        new_load = not 0.5 <= len(sequences) / max(1, self._load) <= 2
        if new_load:
            self._load, self._load_since = len(sequences), self._n_steps
            self._pause = self._PAUSES[0]
        outlooks = self._outlooks(sequences, self.choice.terms)
        now = outlooks[self.choice.depth]
        # Of a load that is new nothing is certain, nor of the present depth.
        wary, stays = (0.0, 1.0) if new_load else (self._WARY, self._STAYS)
        catching_up = self._catching_up(sum(s.habit.behind for s in sequences if s.wish.adaptive))

        def at_worst(then: _Outlook) -> float:
            """Tokens per second if things turn out badly."""
            speed = then.tokens / (then.seconds + catching_up if then.depth else then.seconds)
            if then is now:
                return speed
            return speed * math.exp(-wary * self._doubt(then, now)) / stays

        outlook = max(outlooks, key=at_worst)
        if not outlook.n_drafting:  # nobody would
            outlook = outlooks[0]
        choice = Choice(
            outlook.depth,
            self._terms(outlook),
            outlook.left_out,
            keep_prompts=outlook.depth > 0 or self._may_draft(outlooks),
        )
        if choice.depth != self.choice.depth:
            self._pause = self._PAUSES[0]
        if self.choice.trial is None and self._n_steps >= self._next_trial:
            choice = self._with_trial(choice, outlooks, sequences)
        if not choice.differs(self.choice):  # prompts that come have a plan of their own
            self.choice = msgspec.structs.replace(self.choice, keep_prompts=choice.keep_prompts)
            return False
        self.choice = choice
        return True

    def _take_in(self, sequences: Iterable[Drafter]) -> None:
        """Bring habits up to date, and everybody's with them. Of very many sequences those on
        trial, and some of the others, each time the next ones."""
        habits = [sequence.habit for sequence in sequences]
        if len(habits) > self._IN_A_REVIEW:
            tried = [s.habit for s in sequences if s.request_id in self.choice.on_trial]
            first = self._next_in_turn % len(habits)
            self._next_in_turn = first + self._IN_A_REVIEW
            in_turn = (habits + habits)[first : self._next_in_turn]
            habits = list(dict.fromkeys(tried + in_turn))
        self.everybody.follow(habits)
        for habit in habits:
            habit.update()

    def _may_draft(self, outlooks: list[_Outlook]) -> bool:
        """Whether drafts would pay if what is uncertain turned out well."""
        now, *others = outlooks
        return any(then.speed * math.exp(self._doubt(then, now)) > now.speed for then in others)

    def _catching_up(self, behind: int) -> float:
        """Seconds that it adds to a step to take in so many tokens before."""
        return self.costs.drafting(1, behind) / min(self._PAYS_WITHIN, self._answer)

    # How uncertain it is how much faster one depth is than another: standard deviations of the
    # logarithm.

    def _doubt(self, then: _Outlook, now: _Outlook) -> float:
        return math.hypot(self._doubt_of_gains(then, now), self._doubt_of_costs(then, now))

    def _doubt_of_gains(self, then: _Outlook, now: _Outlook, n_steps: float = math.inf) -> float:
        """By what drafts give; or, of it, what may turn out in so many steps of a sequence."""
        if then.depth <= now.depth:
            return 0.0
        doubt = self.everybody.doubt(then.depth, n_steps) - self.everybody.doubt(now.depth, n_steps)
        return doubt * then.n_drafting / then.tokens

    def _doubt_of_costs(self, then: _Outlook, now: _Outlook) -> float:
        """By what steps of another size take."""
        return math.sqrt(self.costs.target.doubt((then.passes, then.rows), (now.passes, now.rows)))

    def _outlooks(self, sequences: Collection[Drafter], terms: Terms) -> list[_Outlook]:
        """What a step would come to, by depth. Those draft for whom it pays, unless it is better
        that all do."""
        adaptive = [s for s in sequences if s.wish.adaptive]
        ahead = _Ahead([s.habit for s in adaptive])
        fixed = []
        if ahead.n < len(sequences):
            for limit in self._depths[1:]:
                wish = DraftWish(limit, adaptive=False)
                these = [s.habit for s in sequences if s.wish == wish]
                if these:
                    fixed.append(_Ahead(these).all(limit))
        outlooks = []
        for depth in self._depths:
            best = self._outlook(depth, len(sequences), [*fixed, ahead.all(depth)])
            if depth and not all(pays := ahead.pays(depth, terms)):
                drafting = [*fixed, ahead.some(depth, pays)]
                outlook = self._outlook(depth, len(sequences), drafting)
                others = compress(adaptive, map(operator.not_, pays))
                outlook.left_out = frozenset([s.request_id for s in others])
                best = max(outlook, best, key=lambda one: one.speed)
            outlooks.append(best)
        return outlooks

    def _outlook(self, depth: int, n_sequences: int, drafting: Iterable[_Drafting]) -> _Outlook:
        """Of so many sequences, some of which draft."""
        n_drafting = 0
        n_verifying = 0.0  # of these, those that find something worth it
        tokens = rows = float(n_sequences)
        draft_rows = [0.0] * self._depths[-1]  # by decode of the draft context
        for some in drafting:
            if some.limit:
                n_drafting += some.n
                n_verifying += some.verified[1]
                tokens += some.accepted
                rows += some.verified[-1]
                draft_rows[0] += some.n + some.accepted  # what was accepted last is decoded as well
                for d in range(1, some.limit):
                    draft_rows[d] += some.verified[d] - some.verified[d - 1]
        passes = self._passes(depth, n_sequences, n_drafting, n_verifying)
        # A decode of less than a row happens that often.
        n_draft_decodes = sum([n if n < 1 else 1.0 for n in draft_rows])
        n_draft_rows = sum(draft_rows)
        if n_drafting:  # the prompts that were before so many tokens are taken in as well
            prompts = self._prompts.value / self._answer
            n_draft_rows += self._KEPT * prompts * (tokens - n_sequences + n_drafting)
        seconds = self.costs.target.of(passes, rows)
        seconds += self.costs.drafting(n_draft_decodes, n_draft_rows)
        return _Outlook(
            *(depth, n_drafting, tokens, rows, passes, n_draft_decodes, n_draft_rows, seconds)
        )

    def _passes(self, depth: int, n_sequences: int, n_drafting: int, n_verifying: float) -> float:
        """Passes of the target, as far as drafts make a difference."""
        if not self._recurrent or not n_drafting:
            return 1.0
        # Who does not draft takes part in a pass of its own, if anybody else finds something worth
        # it; and drafts are cut to few lengths.
        others = n_sequences - n_drafting
        n_lengths = self._n_lengths[depth] if n_drafting > 1 else 1.0
        return max(n_lengths, 1 + min(1.0, others) * min(1.0, n_verifying))

    def _terms(self, outlook: _Outlook) -> Terms:
        """The prices where a step is as an outlook says."""
        speed, chances = outlook.speed, self.calibration.chances
        target_pass, target_row = self.costs.target.parts(outlook.passes, outlook.rows)
        draft_decode, draft_row = self.costs.draft.parts(
            outlook.n_draft_decodes, outlook.n_draft_rows
        )
        return Terms(
            target_row=speed * target_row,
            target_pass=speed * target_pass,
            draft_row=speed * draft_row,
            draft_decode=speed * draft_decode,
            greedy=chances[:N_CONFIDENCES],
            sampled=chances[N_CONFIDENCES:],
        )

    def _with_trial(
        self, choice: Choice, outlooks: Items[_Outlook], sequences: Iterable[Drafter]
    ) -> Choice:
        """The choice, with another depth to try out if that is worth what it costs."""
        now = outlooks[choice.depth]
        least, most = self._LASTS
        lasts = now.seconds * min(max(self._n_steps - self._load_since, least), most)
        usual, most_kept = (n * now.seconds for n in self._MOST_TRIALS)
        kept = min(max(usual, self._SPARE * self._saved_for), most_kept)
        self._credit = min(self._credit, kept)
        if self._credit < self._PLANS:
            return choice
        # Who has little to catch up with loses least.
        adaptive = sorted((s for s in sequences if s.wish.adaptive), key=lambda s: s.habit.behind)
        least, most = self._TRIAL_STEPS
        n_each = math.ceil(min(max(self._TRIAL_SECONDS / now.seconds, least), most))
        best = loses = 0.0
        trial: tuple[int, list[Drafter]] | None = None
        too_dear: list[float] = []
        other = 1 - (1 - self._OTHER_TEXT) ** self._n_begun
        better_if_good = self._better_if_good(now.depth, adaptive) if other else {}
        for then in outlooks:
            if then is now:
                continue
            better = math.log(then.speed / now.speed / self._STAYS)
            changed = other * better_if_good.get(then.depth, 0.0)
            for n in {min(self._TRIED_WITH, len(adaptive)), len(adaptive)}:
                subjects = adaptive[:n]
                doubt = self._doubt_of_gains(then, now, n * n_each)
                if len(subjects) == len(adaptive):  # then it shows what such steps take
                    doubt = math.hypot(doubt, self._doubt_of_costs(then, now))
                found = lasts * (_hope(better, doubt) + changed)
                if found <= best + self._PLANS:
                    continue
                lost = self._loss(then.depth, now, subjects, n_each)
                if found - lost <= best:
                    continue
                if lost > self._credit:
                    too_dear.append(lost)
                else:
                    best, loses, trial = found - lost, lost, (then.depth, subjects)
        if trial is None:
            self._saved_for = min(too_dear, default=self._saved_for)
            return choice
        self._saved_for = 0.0
        self._n_trial_steps = n_each
        self._credit -= loses
        self._next_trial = self._n_steps + self._pause
        self._pause = min(2 * self._pause, self._PAUSES[1])
        depth, tried = trial
        on_trial = frozenset(s.request_id for s in tried)
        return msgspec.structs.replace(choice, trial=depth, on_trial=on_trial)

    def _better_if_good(self, present: int, sequences: Items[Drafter]) -> dict[int, float]:
        """By depth, how much better than the present one it would be, as a logarithm, if the drafts
        that are deeper than that were mostly right."""
        ahead = _Ahead([s.habit for s in sequences])
        some = ahead.all(present)
        usual = self._outlook(present, ahead.n, [some]).speed
        right = some.accepted - ahead.all(present - 1).accepted if present else float(ahead.n)
        found = {}
        for depth in self._depths[1 + present :]:
            right *= self._GOOD_TEXT
            verified = [*some.verified, some.verified[-1] + ahead.n]
            some = _Drafting(depth, ahead.n, some.accepted + right, verified)
            speed = self._outlook(depth, ahead.n, [some]).speed
            if speed and usual:
                found[depth] = max(0.0, math.log(speed / usual))
        return found

    def _loss(self, depth: int, now: _Outlook, subjects: Items[Drafter], n_steps: int) -> float:
        """Seconds that a trial of so many steps is expected to lose."""
        ahead = _Ahead([s.habit for s in subjects])
        then, usual = (self._outlook(d, ahead.n, [ahead.all(d)]) for d in (depth, now.depth))
        lost = then.seconds - usual.seconds - (then.tokens - usual.tokens) / now.speed
        lost *= n_steps
        if not now.depth:
            lost += self.costs.drafting(1, sum(s.habit.behind for s in subjects))
        return max(lost, 0.0) + self._PLANS


class _Mean:
    """What values are on average, the last some dozens of them."""

    _MEMORY: Final = 32

    def __init__(self, guess: float, n: int) -> None:
        self.value = guess
        self._n = n  # values that the guess counts as

    def take(self, value: float) -> None:
        self._n = min(self._n + 1, self._MEMORY)
        self.value += (value - self.value) / self._n

    def raised_by(self, n: int, total: float) -> float:
        """With ``n`` more that come to so much at least: higher, if they are higher than this."""
        if total <= n * self.value:
            return self.value
        return (self._n * self.value + total) / (self._n + n)


def _totals(counts: list[list[int]]) -> list[int]:
    """Of several counts of the same, their sums."""
    return list(map(sum, zip(*counts, strict=True)))


def _plus(some: tuple[float, ...], others: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(operator.add, some, others))


def _hope(mean: float, deviation: float) -> float:
    """What is to be gained on average if a thing, normally distributed, counts only above 0."""
    if not deviation:
        return max(mean, 0.0)
    z = mean / deviation
    below = (1 + math.erf(z / math.sqrt(2))) / 2
    return mean * below + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def at_least(counts: list[int]) -> tuple[int, ...]:
    """From how often something was 0, 1, 2, …: how often it was at least 1, 2, …"""
    return tuple(accumulate(counts[:0:-1]))[::-1]


def _prices(terms: Terms) -> tuple[float, ...]:
    return terms.target_row, terms.target_pass, terms.draft_row, terms.draft_decode


def _alike(some: Items[float], others: Items[float], absolute: float, relative: float) -> bool:
    return some == others or all(
        abs(one - other) <= absolute + relative * max(one, other)
        for one, other in zip(some, others, strict=True)
    )
