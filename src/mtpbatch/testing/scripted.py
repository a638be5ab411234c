"""A backend that plays a model whose answers are known beforehand."""

from __future__ import annotations

import itertools
import random
import threading
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from queue import SimpleQueue
from typing import Literal

from mtpbatch._loops import ThreadEvent
from mtpbatch.engine import Engine
from mtpbatch.exceptions import DecodeError, InternalError, NativeError
from mtpbatch.types import (
    NO_RESULT,
    Admission,
    EngineConfig,
    EntryResult,
    ModelFacts,
    Plan,
    PlanEntry,
    StepResult,
)

# A vocabulary of all bytes, of some runs of letters, and of one that ends inside a character.
_RUNS = ("the", " the", "ing", "tion", " and", " of", "er", "\n\n", "ab", "abc", " o", "ld")
_TOKEN_BYTES = (
    *(bytes([byte]) for byte in range(256)),
    *(run.encode() for run in _RUNS),
    b" \xe2",
    b"",
)
_EOS = len(_TOKEN_BYTES) - 1
_IDS = {run: token_id for token_id, run in enumerate(_TOKEN_BYTES) if run}
_LONGEST = max(map(len, _IDS))
_WORDS = ("the", "old", "tower", "naïve", "Größe", "日本語", "ending", "a", "of", "and", "🙂", "€5")

_GATE_TIMEOUT = 30.0  # seconds; a test that forgets to release a step fails instead of hanging


class VirtualClock:
    """A clock that moves only when told to. Call it for the time in seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now += seconds


class StepGate:
    """Holds one step of a :class:`ScriptedBackend` on the engine's thread.

    Release it before the engine is closed; after 30 seconds the step raises
    :class:`InternalError`.
    """

    def __init__(self) -> None:
        self._reached = ThreadEvent()
        self._released = threading.Event()

    async def reached(self) -> None:
        """Wait until the step is about to run."""
        await self._reached.wait()

    def release(self) -> None:
        """Let the step run."""
        self._released.set()

    def _pass(self) -> None:
        self._reached.set()
        if not self._released.wait(_GATE_TIMEOUT):
            raise InternalError(f"a held step was not released in {_GATE_TIMEOUT:.0f} seconds")


class ScriptedBackend:
    """Plays a model: a :class:`~mtpbatch.backend.Backend` whose answers are known beforehand.

    ``script`` maps the prompt's text to the answer; the end-of-generation token follows, and
    then, for requests that ignore it, the same again. Without a script every prompt has an
    answer of its own, some words long. Sampling parameters make no difference.

    ``acceptance`` is the chance that a draft is right, drawn for each position of each prompt,
    or a pattern of right and wrong drafts that is repeated over the positions. It changes how
    many steps an answer takes, never the answer. ``mtp=False`` plays a model without MTP heads.

    Each step takes ``step_time`` seconds of ``clock``, which the engine uses as well. Steps run
    when their results are asked for, one at a time. ``lag=1`` lets each run before the result of
    the one before it is given out, as a real model does that is quicker than Python; larger
    numbers play an app that keeps Python busy.

    It keeps its own record of every sequence, and raises :class:`InternalError` for a plan that
    a real model could not execute.
    """

    def __init__(
        self,
        script: Callable[[str], str] | None = None,
        *,
        n_seq: int = 4,
        n_ctx: int = 256,
        n_batch: int = 64,
        n_draft_max: int = 3,
        mtp: bool = True,
        acceptance: float | Sequence[bool] = 0.75,
        step_time: float = 0.01,
        lag: int = 0,
    ) -> None:
        self._script = script or _default_script
        self._acceptance = acceptance
        self._step_time = step_time
        self._lag = lag
        self.clock = VirtualClock()
        self.config = EngineConfig(
            n_seq=n_seq,
            n_ctx=n_ctx,
            n_draft_max=n_draft_max if mtp else 0,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=1,
            n_gpu_layers=0,
        )
        self.facts = ModelFacts(
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            n_draft_max=self.config.n_draft_max,
            n_vocab=len(_TOKEN_BYTES),
            eog_token_ids=frozenset({_EOS}),
            n_cells=n_seq * n_ctx,
            n_ubatch=n_batch,
        )
        self.token_bytes: Sequence[bytes] = _TOKEN_BYTES
        self.description = "scripted model"
        self.n_steps = 0
        """Steps played or begun."""
        self.closed = False
        self._sequences: dict[int, _ScriptedSequence] = {}
        self._plans: deque[Plan] = deque()  # handed over, not begun
        self._left_early: set[int] = set()  # ids that those have released already
        self._standing: Plan | None = None
        self._stepped = False  # whether the standing plan has had its first step
        self._results: deque[StepResult] = deque()
        self._n_unseen = 0  # steps whose results have not been taken in
        self._n_shown = 0  # of those, given out by the last exchange
        self._wakes: SimpleQueue[None] = SimpleQueue()  # may be put from a garbage collection
        self._cancels: SimpleQueue[int] = SimpleQueue()  # tickets; so may these
        self._cancelled: set[int] = set()
        self._gates: dict[int, StepGate] = {}
        self._errors: dict[int, Exception] = {}

    @property
    def active(self) -> frozenset[int]:
        """Sequence ids that are taken."""
        return frozenset(self._sequences)

    def answer(self, prompt: str | Sequence[int], n_tokens: int) -> list[int]:
        """The first tokens the script generates after ``prompt``, past end tokens if need be."""
        prompt_ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        return list(itertools.islice(itertools.cycle(self._one_answer(prompt_ids)), n_tokens))

    def hold_step(self, index: int) -> StepGate:
        """Hold the step of that index, the first being 0, until its gate is released."""
        gate = self._gates[index] = StepGate()
        return gate

    def fail_step(self, index: int, error: Exception | None = None) -> None:
        """Have the step of that index end in ``error``, by default a :class:`DecodeError`.

        A :class:`~mtpbatch.exceptions.NativeError` fails the step; anything else is played as a
        bug and kills the engine.
        """
        self._errors[index] = error or DecodeError("scripted failure")

    # ----------------------------------------------------------- what the engine calls

    def tokenize(self, text: str) -> list[int]:
        """Greedily, longest run first."""
        data = text.encode()
        token_ids = []
        start = 0
        while start < len(data):
            end = min(start + _LONGEST, len(data))
            while data[start:end] not in _IDS:
                end -= 1
            token_ids.append(_IDS[data[start:end]])
            start = end
        return token_ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(_TOKEN_BYTES[i] for i in token_ids).decode(errors="replace")

    def exchange(self, plan: Plan | None, *, wait: bool) -> list[StepResult]:
        """Take a plan; with ``wait``, play steps until there is a result to give, or wait."""
        _require(not self.closed, "the backend is closed")
        self._n_unseen -= self._n_shown
        self._n_shown = 0
        if plan is not None:
            self._plans.append(plan)
        if not wait:
            return []
        while len(self._results) <= self._lag and self._begins():
            self._results.append(self._step())
        if not self._results:
            self._wakes.get()
        while not self._wakes.empty():
            self._wakes.get()
        if not self._results:
            return []
        self._n_shown = 1
        return [self._results.popleft()]

    def wake(self) -> None:
        """End the wait of an exchange that has nothing to do."""
        self._wakes.put(None)

    def cancel(self, ticket: int) -> None:
        """The request of that ticket takes part in no step that begins from now on."""
        self._cancels.put(ticket)
        self.wake()

    def close(self) -> None:
        """Forget all sequences; nothing can be executed any more."""
        self.closed = True
        self._sequences.clear()

    # ------------------------------------------------------------------------ details

    def _one_answer(self, prompt_ids: Sequence[int]) -> list[int]:
        return [*self.tokenize(self._script(self.detokenize(prompt_ids))), _EOS]

    def _begins(self) -> bool:
        """Take in what plans say beside their steps; whether there is a step to play."""
        while not self._cancels.empty():
            self._cancelled.add(self._cancels.get())
        self._release_early()
        while self._plans and (
            self._standing is None or self._stepped or not self._plans[0].entries
        ):
            plan = self._plans.popleft()
            for seq_id in plan.release:
                if seq_id in self._left_early:
                    self._left_early.remove(seq_id)
                else:
                    self._release(seq_id)
            for admission in plan.admit:
                self._admit(admission)
            if plan.entries:
                self._standing, self._stepped = plan, False
                self._check_plan(plan)
        standing = self._standing
        if standing is None:
            return False
        if not self._stepped:
            return True
        in_time = 0 < standing.run_ahead >= self._n_unseen
        return in_time and any(self._takes_part(entry) for entry in standing.entries)

    def _release_early(self) -> None:
        """What waiting plans release leaves at once, unless one before them admits it first."""
        admitted: set[int] = set()
        for plan in self._plans:
            for seq_id in set(plan.release) - admitted:
                if seq_id not in self._left_early:
                    self._release(seq_id)
                    self._left_early.add(seq_id)
            admitted.update(admission.seq_id for admission in plan.admit)

    def _release(self, seq_id: int) -> None:
        _require(seq_id in self._sequences, f"release of free sequence {seq_id}")
        self._cancelled.discard(self._sequences.pop(seq_id).ticket)

    def _takes_part(self, entry: PlanEntry) -> bool:
        sequence = self._sequences.get(entry.seq_id)
        if sequence is None or sequence.lost or sequence.over:
            return False
        if sequence.ticket in self._cancelled:
            return False
        return not self._stepped or sequence.n_generated > 0

    def _step(self) -> StepResult:
        plan, repeated = self._standing, self._stepped
        assert plan is not None
        self._n_unseen += 1
        failure = None
        if any(self._takes_part(entry) for entry in plan.entries):
            failure = self._play_step()
        results: list[EntryResult] = []
        n_rows = 0
        for entry in plan.entries:
            if failure is not None and entry.seq_id in self._sequences:
                self._sequences[entry.seq_id].lost = True
            if not self._takes_part(entry):
                results.append(NO_RESULT)
                continue
            results.append(self._run(entry, repeated))
            n_rows += len(entry.tokens) if entry.tokens and not repeated else 1
            n_rows += results[-1].n_drafted
        self._stepped = True
        return StepResult(
            plan=plan.number,
            entries=tuple(results),
            n_target_tokens=n_rows,
            n_target_decodes=min(n_rows, 1),
            n_draft_tokens=sum(result.n_drafted for result in results),
            n_draft_decodes=max((result.n_drafted for result in results), default=0),
            gap_time=0.0,
            draft_time=0.0,
            target_time=self._step_time if n_rows else 0.0,
            sample_time=0.0,
            error=failure,
        )

    def _play_step(self) -> NativeError | None:
        """Held, failing, and taking its time, as it was said beforehand."""
        index = self.n_steps
        self.n_steps += 1
        gate = self._gates.pop(index, None)
        if gate is not None:
            gate._pass()
        self.clock.advance(self._step_time)
        failure = self._errors.pop(index, None)
        if failure is not None and not isinstance(failure, NativeError):
            raise failure
        return failure

    def _admit(self, admission: Admission) -> None:
        seq_id = admission.seq_id
        _require(0 <= seq_id < self.facts.n_seq, f"admission to sequence {seq_id}")
        _require(seq_id not in self._sequences, f"admission to taken sequence {seq_id}")
        _require(admission.max_tokens >= 1, "admission of a request that may not generate")
        self._sequences[seq_id] = _ScriptedSequence(admission)

    def _check_plan(self, plan: Plan) -> None:
        n_batch = self.facts.n_batch
        for n_rows in (
            sum(len(e.tokens) or 1 + e.n_draft for e in plan.entries),
            sum(1 + e.n_draft for e in plan.entries if e.sample),
        ):
            _require(n_rows <= n_batch, f"{n_rows} tokens in a batch of {n_batch}")
        seq_ids = {entry.seq_id for entry in plan.entries}
        _require(len(seq_ids) == len(plan.entries), "two entries for one sequence")
        _require(
            all(admission.seq_id in seq_ids for admission in plan.admit),
            "a sequence is admitted without an entry",
        )
        for entry in plan.entries:
            _require(0 <= entry.n_draft <= self.facts.n_draft_max, "draft deeper than the heads")
            if entry.seq_id in self._left_early:
                continue
            _require(entry.seq_id in self._sequences, f"entry for free sequence {entry.seq_id}")
            sequence = self._sequences[entry.seq_id]
            if entry.tokens:
                _require(sequence.n_generated == 0, "prompt tokens after a sampled one")
            elif not sequence.lost and sequence.ticket not in self._cancelled:
                _require(entry.sample, "a sampled token is fed without sampling the next")
                _require(sequence.n_generated > 0, "no sampled token to go on from")

    def _run(self, entry: PlanEntry, repeated: bool) -> EntryResult:
        sequence = self._sequences[entry.seq_id]
        n_draft = 0
        if entry.tokens and not repeated:
            sequence.prompt.extend(entry.tokens)
        else:
            n_draft = min(entry.n_draft, sequence.remaining - 1)
        _require(
            sequence.n_past + n_draft <= self.facts.n_ctx,
            f"sequence {entry.seq_id} grows past n_ctx",
        )
        if not entry.sample:
            return NO_RESULT
        if not sequence.answer:
            sequence.answer = self._one_answer(sequence.prompt)
            sequence.luck = zlib.crc32(repr(sequence.prompt).encode())
        n_accepted = 0
        token_ids: list[int] = []
        while not sequence.ended and n_accepted < n_draft and self._hit(sequence):
            token_ids.append(sequence.generate())
            n_accepted += 1
        if not sequence.ended:
            token_ids.append(sequence.generate())
        return EntryResult(tuple(token_ids), n_draft, n_accepted, sequence.ended)

    def _hit(self, sequence: _ScriptedSequence) -> bool:
        """Whether the draft of the sequence's next token is right."""
        position = sequence.n_generated
        if isinstance(self._acceptance, float | int):
            mixed = (sequence.luck ^ (position * 0x9E3779B1)) * 0x85EBCA6B & 0xFFFFFFFF
            return mixed / 2**32 < self._acceptance
        return self._acceptance[position % len(self._acceptance)]


class _ScriptedSequence:
    """What the scripted model knows of one sequence."""

    def __init__(self, admission: Admission) -> None:
        self.ticket = admission.ticket
        self._stop = frozenset(admission.stop_token_ids)
        self._stop_texts = [text.encode() for text in admission.params.stop]
        self._generated = b""
        self._max_tokens = admission.max_tokens
        self.prompt: list[int] = []
        self.answer: list[int] = []
        self.luck = 0
        self.n_generated = 0
        self.ended: Literal["stop", "length"] | None = None
        self.lost = False

    @property
    def n_past(self) -> int:
        """Tokens computed: all but the one sampled last."""
        return len(self.prompt) + max(0, self.n_generated - 1)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self._max_tokens - self.n_generated

    @property
    def over(self) -> bool:
        """Whether nothing goes on until it is released."""
        return bool(self.ended) or any(text in self._generated for text in self._stop_texts)

    def generate(self) -> int:
        token_id = self.answer[self.n_generated % len(self.answer)]
        self.n_generated += 1
        self._generated += _TOKEN_BYTES[token_id]
        if token_id in self._stop:
            self.ended = "stop"
        elif self.n_generated == self._max_tokens:
            self.ended = "length"
        return token_id


@asynccontextmanager
async def open_scripted_engine(backend: ScriptedBackend) -> AsyncIterator[Engine]:
    """An engine on a scripted model; use it as you would one from :meth:`Engine.open`.

    Times in its completions are those of ``backend.clock``.
    """
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    try:
        yield engine
    finally:
        await engine.aclose()


def _default_script(prompt: str) -> str:
    chance = random.Random(zlib.crc32(prompt.encode()))
    return " ".join(chance.choices(_WORDS, k=chance.randint(0, 12)))


def _require(rule: bool, broken: str) -> None:
    if not rule:
        raise InternalError(f"a plan that no executor can run: {broken}")
