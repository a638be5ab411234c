"""Test an app that uses mtpbatch without a model: a scripted one in its place.

::

    from mtpbatch.testing import ScriptedBackend, open_scripted_engine

    async def test_my_handler():
        backend = ScriptedBackend(lambda prompt: f"You said: {prompt}")
        async with open_scripted_engine(backend) as engine:
            assert (await my_handler(engine, "hello")) == "You said: hello"

The engine is the real one, with its thread and its scheduler; only the model is played. What
it answers, how many drafts are accepted and how long steps take is written down beforehand, so
every run is the same. A step can be held (:meth:`ScriptedBackend.hold_step`) to cancel or close
at exactly that moment, and can be made to fail (:meth:`ScriptedBackend.fail_step`).
"""

from __future__ import annotations

import itertools
import random
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from mtpbatch._loops import ThreadEvent
from mtpbatch.engine import Engine
from mtpbatch.exceptions import DecodeError, InternalError, NativeError
from mtpbatch.types import (
    Admission,
    EngineConfig,
    EntryResult,
    ModelFacts,
    Plan,
    PlanEntry,
    StepResult,
)

__all__ = ["ScriptedBackend", "StepGate", "VirtualClock", "open_scripted_engine"]

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

    Each step takes ``step_time`` seconds of ``clock``, which the engine uses as well.

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
    ) -> None:
        self._script = script or _default_script
        self._acceptance = acceptance
        self._step_time = step_time
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
        )
        self.token_bytes: Sequence[bytes] = _TOKEN_BYTES
        self.description = "scripted model"
        self.n_steps = 0
        """Steps executed or begun; plans that only release are not counted."""
        self.closed = False
        self._sequences: dict[int, _ScriptedSequence] = {}
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
        """Have the step of that index raise ``error``, by default a :class:`DecodeError`.

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

    def execute(self, plan: Plan) -> StepResult:
        """Play one step."""
        _require(not self.closed, "the backend is closed")
        for seq_id in plan.release:
            _require(seq_id in self._sequences, f"release of free sequence {seq_id}")
            del self._sequences[seq_id]
        for admission in plan.admit:
            self._admit(admission)
        if not plan.entries:
            return StepResult((), 0, 0, 0.0, 0.0, 0.0)

        index = self.n_steps
        self.n_steps += 1
        gate = self._gates.pop(index, None)
        if gate is not None:
            gate._pass()
        self._check_batch(plan.entries)
        error = self._errors.pop(index, None)
        if error is not None:
            if isinstance(error, NativeError):
                for entry in plan.entries:
                    self._sequences[entry.seq_id].lost = True
            raise error
        results = tuple(self._run(entry) for entry in plan.entries)
        self.clock.advance(self._step_time)
        return StepResult(
            entries=results,
            n_target_tokens=sum(_n_rows(entry) for entry in plan.entries),
            n_draft_decodes=max(entry.n_draft for entry in plan.entries),
            draft_time=0.0,
            target_time=self._step_time,
            sample_time=0.0,
        )

    def close(self) -> None:
        """Forget all sequences; nothing can be executed any more."""
        self.closed = True
        self._sequences.clear()

    # ------------------------------------------------------------------------ details

    def _one_answer(self, prompt_ids: Sequence[int]) -> list[int]:
        return [*self.tokenize(self._script(self.detokenize(prompt_ids))), _EOS]

    def _admit(self, admission: Admission) -> None:
        seq_id = admission.seq_id
        _require(0 <= seq_id < self.facts.n_seq, f"admission to sequence {seq_id}")
        _require(seq_id not in self._sequences, f"admission to taken sequence {seq_id}")
        _require(admission.max_tokens >= 1, "admission of a request that may not generate")
        self._sequences[seq_id] = _ScriptedSequence(admission)

    def _check_batch(self, entries: Sequence[PlanEntry]) -> None:
        n_batch = self.facts.n_batch
        n_rows = sum(_n_rows(entry) for entry in entries)
        _require(n_rows <= n_batch, f"{n_rows} tokens in a batch of {n_batch}")
        seq_ids = {entry.seq_id for entry in entries}
        _require(len(seq_ids) == len(entries), "two entries for one sequence")
        for entry in entries:
            _require(entry.seq_id in self._sequences, f"entry for free sequence {entry.seq_id}")
            sequence = self._sequences[entry.seq_id]
            _require(not sequence.lost, f"entry for sequence {entry.seq_id}, which was lost")
            _require(not sequence.ended, f"entry for sequence {entry.seq_id}, which has ended")
            _require(
                sequence.n_past + _n_rows(entry) <= self.facts.n_ctx,
                f"sequence {entry.seq_id} grows past n_ctx",
            )
            _require(0 <= entry.n_draft <= self.facts.n_draft_max, "draft deeper than the heads")
            if entry.tokens:
                _require(sequence.n_generated == 0, "prompt tokens after a sampled one")
                _require(entry.n_draft == 0, "drafting behind a prompt chunk")
            else:
                _require(entry.sample, "a sampled token is fed without sampling the next")
                _require(sequence.n_generated > 0, "no sampled token to go on from")

    def _run(self, entry: PlanEntry) -> EntryResult:
        sequence = self._sequences[entry.seq_id]
        sequence.prompt.extend(entry.tokens)
        if not entry.sample:
            return EntryResult((), 0, 0, None)
        if not sequence.answer:
            sequence.answer = self._one_answer(sequence.prompt)
            sequence.luck = zlib.crc32(repr(sequence.prompt).encode())
        n_accepted = 0
        token_ids: list[int] = []
        while not sequence.ended and n_accepted < entry.n_draft and self._hit(sequence):
            token_ids.append(sequence.generate())
            n_accepted += 1
        if not sequence.ended:
            token_ids.append(sequence.generate())
        return EntryResult(tuple(token_ids), entry.n_draft, n_accepted, sequence.ended)

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
        self._stop = frozenset(admission.stop_token_ids)
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

    def generate(self) -> int:
        token_id = self.answer[self.n_generated % len(self.answer)]
        self.n_generated += 1
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


def _n_rows(entry: PlanEntry) -> int:
    """Tokens of the target batch: the chunk, or the token sampled last, and the drafts."""
    return (len(entry.tokens) or 1) + entry.n_draft


def _require(rule: bool, broken: str) -> None:
    if not rule:
        raise InternalError(f"a plan that no executor can run: {broken}")
