"""What planning costs: the scheduler's part in a step, with nobody waiting and with very many.

    python -m benchmarks.scheduler_cost [--sequences 256] [--waiting 100000]

No model runs: results are made up, three tokens for each sequence and step. Measured is one call of
``Scheduler.schedule`` and one of ``Scheduler.update``, which are all of Python's that a step must
have, and ``Scheduler.add`` where a request comes. In a quiet step the plan stands; in a busy one a
request ends, one comes and one is admitted, so that a plan is made. Two schedulers, of which one
has the requests waiting, take turns step by step, so that the machine is the same for both.
"""

from __future__ import annotations

import itertools
import statistics
import time

from benchmarks import command_line
from benchmarks.report import spread, table
from mtpbatch.scheduler import Scheduler
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import DraftWish
from mtpbatch.text import TextAssembler
from mtpbatch.types import EntryResult, ModelFacts, Plan, SamplingParams, StepResult

_N_DRAFT = 3
_N_CTX = 1 << 20  # nobody's context ends
_PROMPT = (65,) * 32
_TOKEN_BYTES = [bytes([byte]) for byte in range(256)]
_FIRST = EntryResult((65,), 0, 0, None)
_NEXT = EntryResult((66, 67, 68), _N_DRAFT, 2, None)
_LAST = EntryResult((66, 67, 68), _N_DRAFT, 2, "stop")


class Subject:
    """A scheduler whose sequence ids are all taken, and who waits."""

    def __init__(self, n_sequences: int, n_waiting: int, *, followed: bool) -> None:
        self._followed = followed
        self._tickets = itertools.count(1)
        self._scheduler = Scheduler(
            ModelFacts(
                n_ctx=_N_CTX,
                n_seq=n_sequences,
                n_batch=max(2048, n_sequences * (len(_PROMPT) + _N_DRAFT)),  # no prompt is cut
                n_draft_max=_N_DRAFT,
                n_vocab=256,
                eog_token_ids=frozenset(),
                n_cells=n_sequences * _N_CTX,
                n_ubatch=512,
            )
        )
        for _ in range(n_sequences):
            self._scheduler.add(self._request())
        while self._scheduler.stats.waiting:
            self._plan()
            self._scheduler.update(self._result(), 0.0)
        for _ in range(n_waiting):
            self._scheduler.add(self._request())

    def quiet(self) -> float:
        """Seconds of a step in which the plan stands."""
        result = self._result()
        begin = time.perf_counter()
        self._scheduler.schedule(0.0)
        self._scheduler.update(result, 0.0)
        return time.perf_counter() - begin

    def busy(self) -> float:
        """Seconds of a step in which a request ends and another takes its sequence id."""
        result, request = self._result(ends=True), self._request()
        begin = time.perf_counter()
        self._scheduler.update(result, 0.0)
        self._scheduler.add(request)
        self._plan()
        seconds = time.perf_counter() - begin
        self._scheduler.update(self._result(), 0.0)  # of the prompt that has come
        return seconds

    def _plan(self) -> None:
        plan = self._scheduler.schedule(0.0)
        assert plan is not None
        assert plan.admit
        self._standing: Plan = plan
        self._stepped = False

    def _request(self) -> Sequence:
        ticket = next(self._tickets)
        return Sequence(
            f"r{ticket}",
            ticket,
            _PROMPT,
            SamplingParams(),
            seed=0,
            max_tokens=_N_CTX - len(_PROMPT),
            wish=DraftWish(_N_DRAFT, adaptive=True),
            n_draft_max=_N_DRAFT,
            followed=self._followed,
            assembler=TextAssembler(_TOKEN_BYTES),
            submitted=float(ticket),
        )

    def _result(self, *, ends: bool = False) -> StepResult:
        """Of the standing plan's next step. The oldest request may end in it."""
        entries = self._standing.entries
        results = [_FIRST if entry.tokens and not self._stepped else _NEXT for entry in entries]
        if ends:
            results[0] = _LAST
        self._stepped = True
        return StepResult(
            plan=self._standing.number,
            entries=tuple(results),
            n_target_tokens=1,
            n_target_decodes=1,
            n_draft_tokens=0,
            n_draft_decodes=0,
            gap_time=0.0,
            draft_time=0.0,
            target_time=0.0,
            sample_time=0.0,
        )


def measure(n_sequences: int, n_waiting: int, n_steps: int, *, followed: bool) -> list[list[float]]:
    """Microseconds, medians over the steps: quiet ones and busy ones, of both schedulers."""
    subjects = [Subject(n_sequences, n, followed=followed) for n in (0, n_waiting)]
    figures = []
    for step in (Subject.quiet, Subject.busy):
        times = [[1e6 * step(subject) for subject in subjects] for _ in range(n_steps)]
        figures.append([statistics.median(of_one) for of_one in zip(*times, strict=True)])
    return figures


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=400, help="of each kind in a round")
    options = parser.parse_args()
    print(f"{command_line.in_one_line(command_line.conditions())}\n")
    rows = []
    for followed in (False, True):
        rounds = [
            measure(options.sequences, options.waiting, options.steps, followed=followed)
            for _ in range(options.rounds)
        ]
        for name, of_kind in zip(
            ("plan stands", "new plan"), zip(*rounds, strict=True), strict=True
        ):
            alone, crowded = zip(*of_kind, strict=True)
            ratios = [b / a for a, b in of_kind]
            rows.append(
                [
                    "stream" if followed else "generate",
                    name,
                    spread(alone),
                    spread(crowded),
                    spread(ratios, 3),
                ]
            )
    head = ["requests", "step", "nobody waits, µs", f"{options.waiting:,} wait, µs", "ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
