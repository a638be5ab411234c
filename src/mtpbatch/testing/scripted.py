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
from typing import TYPE_CHECKING, Literal, NamedTuple

from mtpbatch._loops import ThreadEvent
from mtpbatch.backend import Embedder, ProgressReport
from mtpbatch.engine import Engine
from mtpbatch.exceptions import (
    DecodeError,
    InternalError,
    ModelLoadError,
    NativeDiedError,
    NativeError,
)
from mtpbatch.types import (
    NO_RESULT,
    Admission,
    EngineConfig,
    EntryResult,
    GrammarSource,
    ModelFacts,
    OnFull,
    Park,
    Plan,
    PlanEntry,
    Resume,
    SamplingParams,
    StepResult,
    TemplateSource,
    TokenLogprobs,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_SPARE_OUTPUTS = 8  # rows for prompts that are scored
_N_EMBD = 8
_GATE_TIMEOUT = 30.0  # seconds; a test that forgets to release a step fails instead of hanging


class VirtualClock:
    """A clock that moves only when told to. Call it for the time in seconds.

    ::

        clock = VirtualClock()
        clock.advance(1.5)
        assert clock() == 1.5
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._on_advance: Callable[[], object] | None = None

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now += seconds
        if self._on_advance is not None:
            self._on_advance()


class StepGate:
    """Holds one step of a :class:`ScriptedBackend` on the engine's thread.

    Release it before the engine is closed; after 30 seconds the step raises
    :class:`InternalError`.

    ::

        backend = ScriptedBackend(lambda prompt: "Let there be light.")
        gate = backend.hold_step(1)
        async with open_scripted_engine(backend) as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(engine.generate, "In the beginning")
            await gate.reached()
            assert backend.active == {0}
            gate.release()
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

    ::

        backend = ScriptedBackend(lambda prompt: f"You said: {prompt}", step_time=0.5)
        async with open_scripted_engine(backend) as engine:
            done = await engine.generate("hello")
            assert done.text == "You said: hello"
            assert done.timings.total == 0.5 * backend.n_steps

    ``script`` maps the prompt's text to the answer; the end-of-generation token follows, and
    then, for requests that ignore it, the same again. Without a script every prompt has an
    answer of its own, some words long. Sampling parameters make no difference, but for
    ``min_tokens``: before that, a space stands for each token that would end the answer. The model
    is certain of each token, also of a prompt's: its log probability is 0.0, its rank 1, and
    ``logprobs`` and ``prompt_logprobs`` name no other token beside it, however many are asked for.
    The form that an answer is to keep to makes no difference either: the script sees to that.

    ``acceptance`` is the chance that a draft is right, drawn for each position of each prompt,
    or a pattern of right and wrong drafts that is repeated over the positions. It changes how
    many steps an answer takes, never the answer. ``mtp=False`` plays a model without MTP heads.

    Each step takes ``step_time`` seconds of ``clock``, which the engine uses as well; where no step
    runs, time passes when the app advances it. Steps run when their results are asked for, one at
    a time. ``lag=1`` lets each run before the result of the one before it is given out, as a real
    model does that is quicker than Python; larger numbers play an app that keeps Python busy.

    ``n_cells``, ``snapshot_memory`` (in MiB), ``max_waiting``, ``max_waiting_tokens``, ``on_full``,
    ``step_timeout`` and ``truncates`` are those of :class:`~mtpbatch.EngineConfig` and
    :class:`~mtpbatch.ModelFacts`; a model that does not truncate keeps recurrent state. A token of
    a saved sequence has 1,000 bytes, copied in no time.

    ``chat_template`` is the model's, in Jinja; by default each message is a line that begins with
    its role. One that names ``<think>`` and ``<tool_call>`` lets answers have these.

    The embedding of a text has 8 numbers, which count its tokens by the rest that their ids leave.
    Each decode embeds one text.

    :meth:`die_in_step` plays the end of a process that runs a model, as with
    ``isolation="process"``. The engine then waits, by ``clock``, and has it play on with nothing of
    what it knew. :meth:`hang_in_step` plays a process that is stuck, which an engine with a
    ``step_timeout`` kills.

    It keeps its own record of every sequence and every snapshot, and raises
    :class:`InternalError` for a plan that a real model could not execute.
    """

    tokenizes_at_once = True
    mute = False
    """What is stuck is its model; it answers all the same."""

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
        n_cells: int | None = None,
        snapshot_memory: int = 16,
        max_waiting: int | None = 1024,
        max_waiting_tokens: int | None = None,
        on_full: OnFull = "wait",
        step_timeout: float | None = None,
        truncates: bool = True,
        chat_template: str | None = _CHAT_TEMPLATE,
    ) -> None:
        self._script = script or _default_script
        self._acceptance = acceptance
        self._step_time = step_time
        self._lag = lag
        self.clock = VirtualClock()
        self.clock._on_advance = self.wake
        self.config = EngineConfig(
            n_seq=n_seq,
            n_ctx=n_ctx,
            n_draft_max=n_draft_max if mtp else 0,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=1,
            n_gpu_layers=0,
            n_cells=n_seq * n_ctx if n_cells is None else n_cells,
            snapshot_memory=snapshot_memory,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            on_full=on_full,
            isolation="none" if step_timeout is None else "process",
            step_timeout=step_timeout,
        )
        assert self.config.n_cells is not None
        self.facts = ModelFacts(
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_batch=n_batch,
            n_draft_max=self.config.n_draft_max,
            n_vocab=len(_TOKEN_BYTES),
            eog_token_ids=frozenset({_EOS}),
            n_cells=self.config.n_cells,
            n_ubatch=n_batch,
            n_outputs=n_seq + max(n_seq * self.config.n_draft_max, _SPARE_OUTPUTS),
            recurrent=not truncates,
            truncates=truncates,
        )
        self.token_bytes: Sequence[bytes] = _TOKEN_BYTES
        self.chat_template = None if chat_template is None else TemplateSource(text=chat_template)
        self.description = "scripted model"
        self.n_steps = 0
        """Steps played or begun."""
        self.closed = False
        self.dead = False
        """Whether it has died, and not begun anew."""
        self._hanging_step: int | None = None  # in which it is stuck until it dies
        self._failing_saves: set[int] = set()
        self._failing_restores: set[int] = set()
        self._failing_restarts: dict[int, Exception] = {}
        self._n_saves = 0
        self._n_restores = 0
        self._n_restarts = 0
        self._wakes: SimpleQueue[None] = SimpleQueue()  # may be put from a garbage collection
        self._cancels: SimpleQueue[int] = SimpleQueue()  # tickets; so may these
        self._gates: dict[int, StepGate] = {}
        self._errors: dict[int, Exception] = {}
        self._begin_with_nothing()

    def _begin_with_nothing(self) -> None:
        self._sequences: dict[int, _ScriptedSequence] = {}
        self._parked: dict[int, _ScriptedSequence] = {}  # by ticket
        self._snapshots: dict[int, _Snapshot | None] = {}  # None: it could not be taken
        self._copies: _Copies = _Copies([], [])  # for the next result
        self._plans: deque[Plan] = deque()  # handed over, not begun
        self._left_early: set[int] = set()  # ids that those have released already
        self._standing: Plan | None = None
        self._stepped = False  # whether the standing plan has had its first step
        self._results: deque[StepResult] = deque()
        self._n_unseen = 0  # steps whose results have not been taken in
        self._n_shown = 0  # of those, given out by the last exchange
        self._cancelled: set[int] = set()

    @property
    def active(self) -> frozenset[int]:
        """Sequence ids that are taken."""
        return frozenset(self._sequences)

    @property
    def parked(self) -> frozenset[int]:
        """Tickets of requests that are parked."""
        return frozenset(self._parked)

    @property
    def snapshots(self) -> frozenset[int]:
        """Snapshots that no plan has dropped."""
        return frozenset(self._snapshots)

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

    def die_in_step(self, index: int) -> None:
        """Have the process that runs the model die in the step of that index."""
        self.fail_step(index, NativeDiedError(-9))

    def hang_in_step(self, index: int) -> None:
        """Have the process that runs the model be stuck from the step of that index on."""
        self._hanging_step = index

    def fail_restart(self, index: int, error: Exception | None = None) -> None:
        """Have the restart of that index end in ``error``, by default a :class:`ModelLoadError`."""
        self._failing_restarts[index] = error or ModelLoadError("scripted failure")

    def fail_save(self, index: int) -> None:
        """Have no memory for the snapshot of that index, the first that is taken being 0."""
        self._failing_saves.add(index)

    def fail_restore(self, index: int) -> None:
        """Have a sequence not start from its snapshot: the restore of that index fails."""
        self._failing_restores.add(index)

    # ----------------------------------------------------------- what the engine calls

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        check: Callable[[], None] | None = None,
    ) -> list[int]:
        """Greedily, longest run first, and in one go. There are no special tokens to add."""
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

    def open_embedder(self) -> Embedder:
        """Embeds as the class says."""
        return _ScriptedEmbedder(self.facts.n_ctx)

    def prepare(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """There is nothing to prepare."""
        return ()

    def compile_grammar(self, source: GrammarSource) -> None:
        """There is nothing to compile: answers are the script's."""

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        """Take a plan; with ``wait``, play steps until there is a result to give, or wait.

        A ``timeout`` ends no wait by itself: whoever advances the clock does.
        """
        _require(not self.closed, "the backend is closed")
        if self.dead:
            _require(plan is None, "the backend is dead")
            if wait:
                self._wakes.get()
            return []
        self._n_unseen -= self._n_shown
        self._n_shown = 0
        if plan is not None:
            self._plans.append(plan)
        if not wait:
            return []
        while not self._hangs and len(self._results) <= self._lag and self._begins():
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

    def kill(self, why: str) -> NativeDiedError:
        """Die at the engine's wish, stuck or not."""
        self._die()
        return NativeDiedError(-9, why=why)

    def restart(self, report: ProgressReport) -> None:
        """Begin anew after a death."""
        _require(self.dead, "it lives")
        index = self._n_restarts
        self._n_restarts += 1
        report(0.0)
        failure = self._failing_restarts.pop(index, None)
        if failure is not None:
            raise failure
        self.dead = False

    def stop(self) -> None:
        """Nothing waits but an exchange."""
        self.wake()

    def close(self) -> None:
        """Forget all sequences; nothing can be executed any more."""
        self.closed = True
        self._begin_with_nothing()

    # ------------------------------------------------------------------------ details

    def _one_answer(self, prompt_ids: Sequence[int]) -> list[int]:
        return [*self.tokenize(self._script(self.detokenize(prompt_ids))), _EOS]

    @property
    def _hangs(self) -> bool:
        return self.n_steps == self._hanging_step

    def _die(self) -> None:
        self.dead = True
        self._hanging_step = None
        self._begin_with_nothing()

    def _begins(self) -> bool:
        """Take in what plans say beside their steps; whether there is a step to play."""
        while not self._cancels.empty():
            self._cancelled.add(self._cancels.get())
        self._release_early()
        while self._plans and (
            self._standing is None or self._stepped or not _follows_a_step(self._plans[0])
        ):
            self._open(self._plans.popleft())
        standing = self._standing
        if standing is None:
            return False
        if not self._stepped:
            return True
        in_time = 0 < standing.run_ahead >= self._n_unseen
        return in_time and any(self._takes_part(entry) for entry in standing.entries)

    def _open(self, plan: Plan) -> None:
        """Carry out what a plan says beside its steps."""
        for save in plan.save:
            self._save(save.seq_id, save.snapshot)
        for park in plan.park:
            self._park(park)
        for seq_id in plan.release:
            if seq_id in self._left_early:
                self._left_early.remove(seq_id)
            else:
                self._release(seq_id)
        for number in plan.drop:
            _require(number in self._snapshots, f"drop of snapshot {number}, which is not there")
            del self._snapshots[number]
        for ticket in plan.forget:
            _require(ticket in self._parked, f"request {ticket} is forgotten but not parked")
            del self._parked[ticket]
            self._cancelled.discard(ticket)
        for admission in plan.admit:
            self._admit(admission)
        moves = {park.snapshot for park in plan.park} - {0}
        for resume in plan.resume:
            self._resume(resume, moves=resume.snapshot in moves)
        if plan.entries:
            self._standing, self._stepped = plan, False
            self._check_plan(plan)
        else:
            _require(not plan.admit and not plan.resume, "a sequence begins without an entry")
            if plan.save or any(park.snapshot for park in plan.park):
                self._n_unseen += 1
                self._results.append(self._result(plan, (), 0, None))

    def _release_early(self) -> None:
        """What waiting plans release leaves at once, unless one before them has it taken or saved
        first."""
        needed: set[int] = set()
        for plan in self._plans:
            needed.update(save.seq_id for save in plan.save)
            for seq_id in set(plan.release) - needed:
                if seq_id not in self._left_early:
                    self._release(seq_id)
                    self._left_early.add(seq_id)
            needed |= _beginning(plan)

    def _release(self, seq_id: int) -> None:
        _require(seq_id in self._sequences, f"release of free sequence {seq_id}")
        self._cancelled.discard(self._sequences.pop(seq_id).ticket)

    def _takes_part(self, entry: PlanEntry) -> bool:
        sequence = self._sequences.get(entry.seq_id)
        if sequence is None or sequence.lost or sequence.over:
            return False
        if sequence.ticket in self._cancelled:
            return False
        return not self._stepped or (sequence.n_generated > 0 and not sequence.again)

    def _step(self) -> StepResult:
        plan, repeated = self._standing, self._stepped
        assert plan is not None
        self._n_unseen += 1
        failure = None
        if any(self._takes_part(entry) for entry in plan.entries):
            failure = self._play_step()
        results: list[EntryResult] = []
        n_rows = 0
        if failure is not None:
            for seq_id, sequence in self._sequences.items():
                if self.facts.recurrent or any(e.seq_id == seq_id for e in plan.entries):
                    sequence.lost = True
        self._check_cells(plan, repeated)
        for entry in plan.entries:
            if not self._takes_part(entry):
                results.append(NO_RESULT)
                continue
            results.append(self._run(entry, repeated))
            n_rows += len(entry.tokens) if entry.tokens and not repeated else 1
            n_rows += results[-1].n_drafted
        self._stepped = True
        return self._result(plan, tuple(results), n_rows, failure)

    def _result(
        self,
        plan: Plan,
        entries: tuple[EntryResult, ...],
        n_rows: int,
        failure: NativeError | None,
    ) -> StepResult:
        copies, self._copies = self._copies, _Copies([], [])
        return StepResult(
            plan=plan.number,
            entries=entries,
            n_target_tokens=n_rows,
            n_target_decodes=min(n_rows, 1),
            n_draft_tokens=sum(entry.n_drafted for entry in entries),
            n_draft_decodes=max((entry.n_drafted for entry in entries), default=0),
            gap_time=0.0,
            draft_time=0.0,
            target_time=self._step_time if n_rows else 0.0,
            sample_time=0.0,
            error=failure,
            saved=tuple(copies.saved),
            lost=tuple(copies.lost),
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
        if isinstance(failure, NativeDiedError):
            self._die()
            raise failure
        if failure is not None and not isinstance(failure, NativeError):
            raise failure
        return failure

    def _admit(self, admission: Admission) -> None:
        seq_id = admission.seq_id
        _require(0 <= seq_id < self.facts.n_seq, f"admission to sequence {seq_id}")
        _require(seq_id not in self._sequences, f"admission to taken sequence {seq_id}")
        _require(admission.max_tokens >= 1, "admission of a request that may not generate")
        _require(bool(admission.snapshot) == (admission.n_reused > 0), "tokens of no snapshot")
        sequence = self._sequences[seq_id] = _ScriptedSequence(admission)
        if admission.snapshot:
            state = self._restore(seq_id, admission.snapshot)
            n_reused = admission.n_reused
            if state is not None and (
                n_reused <= len(state.token_ids)
                if self.facts.truncates
                else n_reused == len(state.token_ids)
            ):
                _require(state.drafts or not admission.drafts, "a snapshot made without drafts")
                sequence.token_ids = list(state.token_ids[:n_reused])
            else:
                self._lose(seq_id)

    def _save(self, seq_id: int, number: int) -> None:
        _require(number > 0 and number not in self._snapshots, f"snapshot {number} twice")
        _require(seq_id in self._sequences, f"free sequence {seq_id} is saved")
        sequence = self._sequences[seq_id]
        fails = self._n_saves in self._failing_saves
        self._n_saves += 1
        state = None
        if not fails and not sequence.lost and sequence.token_ids:
            state = _Snapshot(tuple(sequence.token_ids), sequence.ticket, sequence.drafts)
        self._snapshots[number] = state
        self._copies.saved.append((number, 1000 * len(state.token_ids) if state else 0))

    def _park(self, park: Park) -> None:
        _require(park.seq_id in self._sequences, f"free sequence {park.seq_id} is parked")
        if park.snapshot:
            self._save(park.seq_id, park.snapshot)
        sequence = self._sequences.pop(park.seq_id)
        self._parked[sequence.ticket] = sequence

    def _resume(self, resume: Resume, *, moves: bool) -> None:
        """``moves``: the same plan has parked it, without knowing whether it has ended by then."""
        seq_id, ticket = resume.seq_id, resume.ticket
        _require(ticket in self._parked, f"request {ticket} is resumed but not parked")
        _require(seq_id not in self._sequences, f"request {ticket} resumes on taken {seq_id}")
        sequence = self._sequences[seq_id] = self._parked.pop(ticket)
        _require(sequence.n_generated > 0, "a request resumes that has not generated")
        _require(moves or not sequence.over, "a request resumes that has ended")
        held, sequence.token_ids = sequence.token_ids, []
        if not resume.snapshot:
            sequence.lost = False
            sequence.again = (*sequence.prompt, *sequence.generated)
            return
        state = self._restore(seq_id, resume.snapshot)
        if state is None:
            self._lose(seq_id)
        else:
            _require(state.ticket == ticket, "a request resumes from another's snapshot")
            _require(not sequence.again, "a request resumes from half of its state")
            _require(list(state.token_ids) == held, "its state is an old one")
            sequence.token_ids = held

    def _restore(self, seq_id: int, number: int) -> _Snapshot | None:
        _require(number in self._snapshots, f"restore of snapshot {number}, which is not there")
        fails = self._n_restores in self._failing_restores
        self._n_restores += 1
        state = None if fails else self._snapshots[number]
        n_held = sum(len(sequence.token_ids) for sequence in self._sequences.values())
        _require(
            state is None or n_held + len(state.token_ids) <= self.facts.n_cells,
            f"a snapshot is restored beside {n_held} tokens in {self.facts.n_cells} cells",
        )
        return state

    def _lose(self, seq_id: int) -> None:
        self._sequences[seq_id].lost = True
        self._sequences[seq_id].token_ids = []
        self._copies.lost.append(seq_id)

    def _check_cells(self, plan: Plan, repeated: bool) -> None:
        n_held = sum(len(sequence.token_ids) for sequence in self._sequences.values())
        n_rows = sum(
            len(entry.tokens)
            if entry.tokens and not repeated
            else 1 + min(entry.n_draft, self._sequences[entry.seq_id].remaining - 1)
            for entry in plan.entries
            if self._takes_part(entry)
        )
        _require(
            n_held + n_rows <= self.facts.n_cells,
            f"{n_held} tokens and {n_rows} more in {self.facts.n_cells} cells",
        )

    def _check_plan(self, plan: Plan) -> None:
        n_batch = self.facts.n_batch
        for n_rows in (
            sum(len(e.tokens) or 1 + e.n_draft for e in plan.entries),
            sum(1 + e.n_draft for e in plan.entries if e.sample),
        ):
            _require(n_rows <= n_batch, f"{n_rows} tokens in a batch of {n_batch}")
        n_outputs = sum(
            len(e.scored) + e.sample if e.tokens else 1 + e.n_draft for e in plan.entries
        )
        most = self.facts.n_outputs or n_batch
        _require(n_outputs <= most, f"{n_outputs} rows are looked at, of {most}")
        seq_ids = {entry.seq_id for entry in plan.entries}
        _require(len(seq_ids) == len(plan.entries), "two entries for one sequence")
        _require(
            _beginning(plan) <= seq_ids,
            "a sequence begins without an entry",
        )
        for entry in plan.entries:
            _require(0 <= entry.n_draft <= self.facts.n_draft_max, "draft deeper than the heads")
            own = (*entry.tokens[1:], *entry.scored[len(entry.tokens) - 1 :])
            _require(
                not entry.scored or (entry.scored == own and len(own) <= len(entry.tokens)),
                "tokens are scored that do not follow the entry's",
            )
            if entry.seq_id in self._left_early:
                continue
            _require(entry.seq_id in self._sequences, f"entry for free sequence {entry.seq_id}")
            sequence = self._sequences[entry.seq_id]
            if entry.tokens:
                _require(
                    sequence.n_generated == 0 or bool(sequence.again) or sequence.lost,
                    "prompt tokens after a sampled one",
                )
            elif not sequence.lost and sequence.ticket not in self._cancelled:
                _require(entry.sample, "a sampled token is fed without sampling the next")
                _require(sequence.n_generated > 0, "no sampled token to go on from")
                _require(not sequence.again, "a sequence goes on before its state is whole again")

    def _run(self, entry: PlanEntry, repeated: bool) -> EntryResult:
        sequence = self._sequences[entry.seq_id]
        n_draft = 0
        if entry.tokens and not repeated:
            sequence.token_ids.extend(entry.tokens)
        else:
            n_draft = min(entry.n_draft, sequence.remaining - 1)
            sequence.token_ids.append(sequence.generated[-1])
        _require(
            len(sequence.token_ids) + n_draft <= self.facts.n_ctx,
            f"sequence {entry.seq_id} grows past n_ctx",
        )
        told = _told(entry.scored if not repeated else (), sequence.params.prompt_logprobs)
        if not entry.sample:
            return EntryResult((), 0, 0, None, prompt_logprobs=told) if told else NO_RESULT
        if not sequence.answer:
            sequence.prompt = tuple(sequence.token_ids)
            sequence.answer = self._one_answer(sequence.prompt)
            sequence.luck = zlib.crc32(repr(sequence.prompt).encode())
        if sequence.again:
            _require(tuple(sequence.token_ids) == sequence.again, "other tokens than it had")
            sequence.again = ()
        n_accepted = 0
        token_ids: list[int] = []
        while not sequence.ended and n_accepted < n_draft and self._hit(sequence):
            token_ids.append(sequence.generate())
            sequence.token_ids.append(token_ids[-1])
            n_accepted += 1
        if not sequence.ended:
            token_ids.append(sequence.generate())
        return EntryResult(
            tuple(token_ids),
            n_draft,
            n_accepted,
            sequence.ended,
            logprobs=_told(token_ids, sequence.params.logprobs),
            prompt_logprobs=told,
        )

    def _hit(self, sequence: _ScriptedSequence) -> bool:
        """Whether the draft of the sequence's next token is right."""
        position = sequence.n_generated
        if isinstance(self._acceptance, float | int):
            mixed = (sequence.luck ^ (position * 0x9E3779B1)) * 0x85EBCA6B & 0xFFFFFFFF
            return mixed / 2**32 < self._acceptance
        return self._acceptance[position % len(self._acceptance)]


class _ScriptedEmbedder:
    """Counts tokens."""

    n_embd = _N_EMBD

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self._tickets = itertools.count()
        self._texts: dict[int, Sequence[int]] = {}

    def add(self, tokens: Sequence[int]) -> int:
        ticket = next(self._tickets)
        self._texts[ticket] = tokens
        return ticket

    def drop(self, ticket: int) -> None:
        del self._texts[ticket]

    def step(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        import numpy as np  # here only, as in the library

        if not self._texts:
            return []
        ticket = min(self._texts)
        counts = np.bincount(np.array(self._texts.pop(ticket)) % _N_EMBD, minlength=_N_EMBD)
        return [(ticket, counts.astype(np.float32))]

    def close(self) -> None:
        self._texts.clear()


class _Snapshot(NamedTuple):
    token_ids: tuple[int, ...]
    ticket: int
    drafts: bool


class _Copies(NamedTuple):
    """What became of snapshots since the last result."""

    saved: list[tuple[int, int]]
    lost: list[int]


class _ScriptedSequence:
    """What the scripted model knows of one sequence."""

    def __init__(self, admission: Admission) -> None:
        self.ticket = admission.ticket
        self.drafts = admission.drafts
        self.params = admission.params
        self._stop = frozenset(admission.stop_token_ids)
        self._stop_texts = [text.encode() for text in admission.params.stop]
        self._min_tokens = admission.params.min_tokens
        self._text = b""
        self._n_before = 0  # bytes of the text in which no stop text ends
        self._max_tokens = admission.max_tokens
        self.token_ids: list[int] = []  # computed
        self.prompt: tuple[int, ...] = ()  # known once it has generated
        self.again: tuple[int, ...] = ()  # what has to be fed after a pause
        self.answer: list[int] = []
        self.luck = 0
        self.generated: list[int] = []
        self.ended: Literal["stop", "length"] | None = None
        self.lost = False

    @property
    def n_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.generated)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self._max_tokens - self.n_generated

    @property
    def over(self) -> bool:
        """Whether nothing goes on until it is released."""
        return bool(self.ended) or any(
            text in self._text[max(0, self._n_before - len(text) + 1) :]
            for text in self._stop_texts
        )

    def generate(self) -> int:
        token_id = self.answer[self.n_generated % len(self.answer)]
        held_back = self.n_generated < self._min_tokens
        if held_back and token_id in self._stop:
            token_id = next(i for i in range(ord(" "), _EOS) if i not in self._stop)
        self.generated.append(token_id)
        self._text += _TOKEN_BYTES[token_id]
        if held_back:
            self._n_before = len(self._text)
        if token_id in self._stop:
            self.ended = "stop"
        elif self.n_generated == self._max_tokens:
            self.ended = "length"
        return token_id


@asynccontextmanager
async def open_scripted_engine(backend: ScriptedBackend) -> AsyncIterator[Engine]:
    """An engine on a scripted model; use it as you would one from :meth:`Engine.open`.

    Times in its completions are those of ``backend.clock``.

    ::

        import pytest

        backend = ScriptedBackend()
        backend.fail_step(0)
        async with open_scripted_engine(backend) as engine:
            with pytest.raises(mtpbatch.DecodeError):
                await engine.generate("hello")
    """
    engine = await Engine._start(lambda report: backend, clock=backend.clock)
    try:
        yield engine
    finally:
        await engine.aclose()


def _told(token_ids: Sequence[int], n_top: int | None) -> tuple[TokenLogprobs, ...]:
    if n_top is None:
        return ()
    return tuple(TokenLogprobs(t, 0.0, 1, ((t, 0.0),) if n_top else ()) for t in token_ids)


def _default_script(prompt: str) -> str:
    chance = random.Random(zlib.crc32(prompt.encode()))
    return " ".join(chance.choices(_WORDS, k=chance.randint(0, 12)))


def _follows_a_step(plan: Plan) -> bool:
    """Whether it waits for the first step of the plan before it."""
    return bool(plan.entries or plan.save or plan.park)


def _beginning(plan: Plan) -> set[int]:
    """Sequence ids that the plan has taken."""
    return {a.seq_id for a in plan.admit} | {r.seq_id for r in plan.resume}


def _require(rule: bool, broken: str) -> None:
    if not rule:
        raise InternalError(f"a plan that no executor can run: {broken}")
