"""How long decodes take, by their rows: learnt from the times of steps. Pure."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence as Items
from typing import Final

from mtpbatch.types import ModelFacts, StepResult


class Cost:
    """Seconds that a decode takes: so much for a pass, so much for each of its rows, and what
    passes of about that many rows take more or less than that.

    Follows what decodes took as a Kalman filter does, with three parts of the logarithm of the
    seconds as its state: of a pass, of the root of a row's share in it, and, for each size, what
    that size adds. So it knows what it cannot tell from decodes of always the same size, and takes
    it up quickly when other sizes come: a machine that becomes slower changes the pass, and all
    sizes with it; what is particular to a size is remembered while others come. (With the share
    itself, steps towards a small one overshoot; with its logarithm, a small one never grows again.)

    State: ``_pass`` and ``_root``; what of them is uncertain, as variances and covariance of
    the logarithm and the root; ``_sizes``, by class of size, what that adds to the logarithm, and
    the variance of it; and ``_noise``, how much the logarithms of observations scatter.
    :meth:`observe` changes them.
    """

    _FIRST_ROOT: Final = 0.35  # a share of an eighth
    _LEAST_ROOT: Final = 1 / 64
    _LEAST_NOISE: Final = 1e-3  # about 3 %
    _NOISE_PACE: Final = 0.05
    _DRIFT: Final = (2e-3, 5e-5)  # what variances grow by with each; of the root, in units of it
    _LEAST_DRIFTING: Final = 0.2  # as if the root was not smaller
    _SURPRISE: Final = 0.7  # at most, of a logarithm: a step in which the machine did other things
    _SIZE: Final = 0.01  # variance of what a size adds: about 10 %
    _SIZE_DRIFT: Final = 1e-5
    _UNKNOWN: Final = (0.0, _SIZE)

    def __init__(self) -> None:
        self._pass = 0.0  # 0: nothing was observed
        self._root = self._FIRST_ROOT
        self._var_pass = 25.0  # it may be anything
        self._var_root = 0.5 * self._FIRST_ROOT**2
        self._covar = 0.0
        self._sizes: dict[int, tuple[float, float]] = {}
        self._noise = 0.02  # about 14 %

    def of(self, passes: float, rows: float) -> float:
        """Seconds of so many passes, with so many rows in all."""
        added, _ = self._sizes.get(_size(passes, rows), self._UNKNOWN)
        return self._pass * (passes + self._root**2 * rows) * math.exp(added)

    def doubt(self, one: tuple[float, float], other: tuple[float, float]) -> float:
        """Variance of the logarithm of what one takes, over what the other takes: each is so many
        passes, with so many rows in all."""
        size, other_size = _size(*one), _size(*other)
        if size == other_size:
            return 0.0
        weight, other_weight = self._weight(*one), self._weight(*other)
        _, var_size = self._sizes.get(size, self._UNKNOWN)
        _, var_other_size = self._sizes.get(other_size, self._UNKNOWN)
        return (weight - other_weight) ** 2 * self._var_root + var_size + var_other_size

    def parts(self, passes: float, rows: float) -> tuple[float, float]:
        """Seconds of a pass, and of a row, where there are so many."""
        added, _ = self._sizes.get(_size(passes, rows), self._UNKNOWN)
        per_pass = self._pass * math.exp(added)
        return per_pass, per_pass * self._root**2

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self._pass > 0

    def observe(self, passes: int, rows: int, seconds: float) -> None:
        """Take in how long so many passes took, with so many rows in all; 0 says nothing."""
        if seconds <= 0:
            return
        root, size = self._root, _size(passes, rows)
        in_passes = passes + root * root * rows
        if not self._pass:
            self._pass = seconds / in_passes
        weight = self._weight(passes, rows)
        added, var_added = self._sizes.get(size, self._UNKNOWN)
        surprise = math.log(seconds / (self._pass * in_passes)) - added
        if abs(surprise) > self._SURPRISE:
            surprise = math.copysign(self._SURPRISE, surprise)
        self._noise += self._NOISE_PACE * (surprise * surprise - self._noise)
        noise = max(self._noise, self._LEAST_NOISE)
        drift_pass, drift_root = self._DRIFT
        self._var_pass += drift_pass
        self._var_root += drift_root * max(root, self._LEAST_DRIFTING) ** 2
        var_added = min(var_added + self._SIZE_DRIFT, self._SIZE)
        with_pass = self._var_pass + weight * self._covar
        with_root = self._covar + weight * self._var_root
        variance = with_pass + weight * with_root + var_added + noise
        gain_pass, gain_root = with_pass / variance, with_root / variance
        gain_added = var_added / variance
        self._pass *= math.exp(gain_pass * surprise)
        self._root = max(root + gain_root * surprise, self._LEAST_ROOT)
        self._sizes[size] = added + gain_added * surprise, (1 - gain_added) * var_added
        self._var_pass -= gain_pass * with_pass
        self._var_root -= gain_root * with_root
        self._covar -= gain_pass * with_root

    def _weight(self, passes: float, rows: float) -> float:
        """Of the root in the logarithm of the seconds: how much that grows with it."""
        return 2 * self._root * rows / (passes + self._root**2 * rows)


def _size(passes: float, rows: float) -> int:
    """The class of a pass's rows: two classes each time they double."""
    return round(2 * math.log2(rows / passes)) if rows > passes > 0 else 0


class CostModel:
    """How long the parts of a step take, learnt from the steps.

    What passes between steps is left out: it goes with requests that begin and end, not with how
    deep they draft.

    State: ``target`` and ``draft``, of their decodes, and of sampling with the former;
    ``prompt_row``, seconds that a row of a prompt adds to a step; ``step``, seconds of a step
    without prompts, lately; ``_n_decoding`` sequences, with which the next step is undisturbed, and
    the share of steps that are. :meth:`observe` changes them.
    """

    _PACE: Final = 0.1
    _CHUNK_STEPS: Final = 2  # steps' time that a chunk of a prompt may take
    _ENOUGH: Final = 0.25  # of the steps undisturbed: the others need not count
    _DRAFT: Final = 0.125  # of what the target takes: a guess
    _LEAST_CHUNK: Final = 32  # rows: smaller ones take too many passes

    def __init__(self, facts: ModelFacts) -> None:
        self._recurrent = facts.recurrent
        self._n_ubatch = facts.n_ubatch
        self.target = Cost()
        self.draft = Cost()
        self.prompt_row = 0.0
        self._n_decoding = 0
        self._undisturbed = 0.0
        self.step = 0.0

    def drafting(self, decodes: float, rows: float) -> float:
        """Seconds of so many decodes of the draft context, with so many rows in all."""
        if not self.draft.known:
            return self._DRAFT * self.target.of(decodes, rows)
        return self.draft.of(decodes, rows)

    def chunk(self, most: int, prompts: float) -> int:
        """Rows of prompts in a step beside sequences that generate, to each of which there are so
        many prompts.

        With few of these they take two more steps' time, or that of the rows that a pass must have
        to be worth it.
        """
        if not self.prompt_row or not self.step:
            return most
        rows = int(self._CHUNK_STEPS * (1 + prompts) * self.step / self.prompt_row)
        return min(most, max(self._LEAST_CHUNK, rows))

    def observe(self, result: StepResult, lengths: Items[int], n_prompt: int) -> None:
        """Take in a step.

        ``lengths[n]`` is how many sequences verified a draft of n tokens; 0 counts those that
        decoded one token. ``n_prompt`` rows were of prompts.
        """
        rows = sum(map(operator.mul, lengths, itertools.count(1)))
        target_time = result.target_time + result.sample_time  # both go by rows
        counts = self._is_undisturbed(sum(lengths), n_prompt)
        if result.n_draft_decodes and counts:
            self.draft.observe(result.n_draft_decodes, result.n_draft_tokens, result.draft_time)
        if n_prompt:
            beside = self.target.of(self._passes(lengths, rows), rows)
            row = max(0.0, target_time - beside) / n_prompt
            self.prompt_row += (row - self.prompt_row) * (self._PACE if self.prompt_row else 1)
            if counts and not self._recurrent:  # else it is not known in how many passes they went
                passes = -(-(rows + n_prompt) // self._n_ubatch)
                self.target.observe(passes, rows + n_prompt, target_time)
        elif rows and counts:
            self.target.observe(self._passes(lengths, rows), rows, target_time)
            step = result.draft_time + target_time
            self.step += (step - self.step) * (self._PACE if self.step else 1)

    def _is_undisturbed(self, n_decoding: int, n_prompt: int) -> bool:
        """Whether a step shows what its decodes take.

        While it runs Python takes in the one before. Requests that began or ended in that are most
        work, for the very processors on which the step runs, and just then it has fewer rows.
        """
        undisturbed = n_decoding == self._n_decoding
        self._n_decoding = 0 if n_prompt else n_decoding
        self._undisturbed += (undisturbed - self._undisturbed) * self._PACE
        return undisturbed or self._undisturbed < self._ENOUGH

    def _passes(self, lengths: Items[int], rows: int) -> int:
        """Forward passes that the decodes of a step take."""
        if not self._recurrent:
            return -(-rows // self._n_ubatch)
        # Each length is one, or more.
        sizes = [count * (1 + length) for length, count in enumerate(lengths) if count]
        return sum([-(-size // self._n_ubatch) for size in sizes])
