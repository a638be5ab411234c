"""What planning costs: the scheduler's part in a step, with nobody waiting and with very many.

    python -m benchmarks.scheduler_cost [--sequences 256] [--waiting 100000]

No model runs: the executor of ``mtpbatch.testing`` plays the steps. In about each of them a request
ends and another takes its place. Measured is the processor time of what Python must do between two
steps: ``Scheduler.update``, ``Scheduler.add`` where a request comes, and ``Scheduler.schedule``.
Two schedulers have the same requests, but one has all of them from the beginning. They take turns
step by step, so that the machine is the same for both.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch.scheduler import Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import DraftWish
from mtpbatch.testing import Drafts, StepCost
from mtpbatch.testing.simulated import SimulatedExecutor
from mtpbatch.testing.workload import N_LUCK, luck_of
from mtpbatch.text import TextAssembler
from mtpbatch.types import ModelFacts, SamplingParams

_N_DRAFT = 3
_N_CTX = 4096
_PROMPT = (65,) * 32
_LUCK = luck_of(Drafts())
_COST = StepCost(target_pass=0.05, target_row=1e-4, draft_decode=1e-3, draft_row=1e-5)
_WARM_UP = 200  # steps: the first requests begin together, but do not end so


class Subject:
    """A scheduler that shares its steps among as many requests as it has sequence ids."""

    def __init__(
        self,
        n_sequences: int,
        n_waiting: int,
        *,
        followed: bool,
        scheduler: Callable[[ModelFacts], Scheduler] = Scheduler,
    ) -> None:
        facts = ModelFacts(
            n_ctx=_N_CTX,
            n_seq=n_sequences,
            n_batch=2048,
            n_draft_max=_N_DRAFT,
            n_vocab=256,
            eog_token_ids=frozenset(),
            n_cells=n_sequences * _N_CTX,
            n_ubatch=512,
        )
        self._followed = followed
        self._n_sequences = n_sequences
        self._scheduler = scheduler(facts)
        self._executor = SimulatedExecutor(facts, _COST)
        self._tickets = itertools.count(1)
        for _ in range(n_sequences + n_waiting):
            self._scheduler.add(self._request())
        self._plan(0.0)
        for _ in range(_WARM_UP):
            self.step()

    def step(self) -> float:
        """Seconds of processor time that Python takes for a step."""
        now = self._executor.step_end
        self._executor.end_step()
        seconds = 0.0
        for result in self._executor.take_results(now):
            begin = time.thread_time()
            events = self._scheduler.update(result, now)
            seconds += time.thread_time() - begin
            for _ in (event for event in events if event.last):
                request = self._request()
                begin = time.thread_time()
                self._scheduler.add(request)
                seconds += time.thread_time() - begin
        return seconds + self._plan(now)

    def _plan(self, now: float) -> float:
        seconds = 0.0
        plan = None
        while not seconds or plan is not None:
            begin = time.thread_time()
            plan = self._scheduler.schedule(now)
            seconds += time.thread_time() - begin
            if plan is not None:
                self._executor.hand_over(plan, now)
        return seconds

    def _request(self) -> Sequence:
        ticket = next(self._tickets)
        luck = ticket * 2_654_435_761
        self._executor.expect(ticket, _LUCK, luck % N_LUCK)
        # So long that one ends in each step, of 2 tokens for each sequence.
        max_tokens = self._n_sequences + luck % (2 * self._n_sequences)
        return Sequence(
            f"r{ticket}",
            ticket,
            _PROMPT,
            SamplingParams(),
            seed=0,
            max_tokens=max_tokens,
            wish=DraftWish(_N_DRAFT, adaptive=True),
            n_draft_max=_N_DRAFT,
            followed=self._followed,
            assembler=TextAssembler([b"x"]),
            submitted=float(ticket),
        )


def measure(
    n_sequences: int, n_waiting: int, n_steps: int, *, followed: bool
) -> list[Items[float]]:
    """Microseconds of each step, of both schedulers."""
    subjects = [Subject(n_sequences, n, followed=followed) for n in (0, n_waiting)]
    steps = [[1e6 * subject.step() for subject in subjects] for _ in range(n_steps)]
    return list(zip(*steps, strict=True))


def percentile(times: Items[float], share: float) -> float:
    return sorted(times)[int(share * len(times))]


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=500, help="in a round")
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    rows = []
    for followed in (False, True):
        rounds = [
            measure(options.sequences, options.waiting, options.steps, followed=followed)
            for _ in range(options.rounds)
        ]
        for name, figure in (
            ("median", statistics.median),
            ("9 of 10 take less than", lambda times: percentile(times, 0.9)),
        ):
            alone, crowded = (
                [figure(times) for times in side] for side in zip(*rounds, strict=True)
            )
            ratios = [b / a for a, b in zip(alone, crowded, strict=True)]
            requests = "stream" if followed else "generate"
            rows.append([requests, name, spread(alone), spread(crowded), spread(ratios, 3)])
    head = ["requests", "steps", "nobody waits, µs", f"{options.waiting:,} wait, µs", "ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
