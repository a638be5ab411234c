"""A backend whose model runs in another process, and which starts another one when that dies."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakSet

import msgspec
from msgspec import Struct

from mtpbatch._process import HomeProcess
from mtpbatch.backend import Embedder, ProgressReport
from mtpbatch.exceptions import ModelLoadError, MtpBatchError, NativeDiedError
from mtpbatch.isolated.channel import WAKE, Channel, HangUp
from mtpbatch.isolated.messages import (
    AddText,
    CloseEmbedder,
    Compile,
    Detokenize,
    DropText,
    Embed,
    EmbedderFacts,
    Exchange,
    Load,
    Loaded,
    OpenEmbedder,
    Prepare,
    Progress,
    Results,
    Tokenize,
)
from mtpbatch.isolated.process import ModelProcess
from mtpbatch.types import (
    NO_RESULT,
    EngineConfig,
    GrammarSource,
    Plan,
    SamplingParams,
    StepResult,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_LOOK_AROUND: Final = 0.05  # seconds between looks at what else there is while a model loads
_PATIENCE: Final = 1.0  # seconds between these while an exchange is not answered
_HEARTBEAT: Final = 0.5  # seconds after which one is answered though nothing has happened
_MOST: Final = 2**31 - 1  # native code counts no further

_Value = TypeVar("_Value")


class Grammar:
    """A grammar that was compiled in the process, under a number.

    ``refusal`` says why the present process could not compile it, though one before it could.
    """

    def __init__(self, number: int, source: GrammarSource, forgotten: SimpleQueue[int]) -> None:
        self.number = number
        self.source = source
        self.refusal: str | None = None
        self._forgotten = forgotten

    def __del__(self) -> None:
        self._forgotten.put(self.number)  # which takes no lock, as this may be anywhere


class ProcessBackend:
    """What :class:`~mtpbatch.native.NativeBackend` is, in another process.

    State, under ``_changed``: ``_process`` is the one that runs plans, ``None`` while there is
    none; ``_newest`` is the last one that was started, which may be loading or dead; ``_stopped``
    says that there will be no other one. ``_grammars`` are those that somebody may need.
    ``_unanswered``, of the engine's thread, is how many exchanges the process owes an answer to,
    and ``mute`` whether one of them was due; ``_stuck`` are entries of plans under way, by the
    plan's number and their index, that begin with a grammar which was refused.

    ``_wakes`` are for waits while there is none. Whoever wakes puts first what there is to find,
    and who waits looks after ``_process`` has changed: nothing is missed that was for the other.
    """

    tokenizes_at_once = False

    def __init__(
        self, path: str | os.PathLike[str], config: EngineConfig, report: ProgressReport
    ) -> None:
        self._home = HomeProcess()
        self._path = os.fspath(path)
        # Without paths, and what the engine alone needs, which may be more than a message can hold.
        own: dict[str, Any] = {"draft_model": None, "lora": {}, "snapshot_memory": 0}
        own |= {"max_waiting": None, "max_waiting_tokens": None}
        self._request = Load(
            os.fsencode(path),
            None if config.draft_model is None else os.fsencode(config.draft_model),
            {os.fsencode(adapter): scale for adapter, scale in config.lora.items()},
            msgspec.structs.replace(config, **own),
        )
        self._folder = _current_folder()  # for relative paths, wherever the app goes meanwhile
        self._changed = threading.Condition()
        self._process: ModelProcess | None = None
        self._newest: ModelProcess
        self._stopped = False
        self._unanswered = 0
        self.mute = False
        self._stuck: dict[int, dict[int, tuple[int, str]]] = {}
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._numbers = itertools.count(1)
        self._grammars: WeakSet[Grammar] = WeakSet()
        self._forgotten: SimpleQueue[int] = SimpleQueue()

        self._process, self._loaded = self._start(report)
        # What was left to the machine stays as it is, though that may have fewer CPUs by then.
        self._request = msgspec.structs.replace(self._request, config=self._loaded.config)
        self.facts = self._loaded.facts
        own = {name: getattr(config, name) for name in own}
        self.config = msgspec.structs.replace(self._loaded.config, **own)
        self.token_bytes: Sequence[bytes] = self._loaded.token_bytes
        self.description = self._loaded.description
        self.chat_template = self._loaded.chat_template

    # ------------------------------------------------------------------------ its thread

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        process = self._process
        if process is None:
            if wait:
                self._wait(timeout)
            return []
        with suppress(HangUp):
            return self._exchange(process, plan, wait, timeout)
        raise self._bury(process)

    def kill(self, why: str) -> NativeDiedError:
        return self._bury(self._newest, why)

    def restart(self, report: ProgressReport) -> None:
        process, loaded = self._start(report)
        try:
            if loaded != self._loaded:
                raise ModelLoadError(f"{self._path}: is not the model any more that it was before")
            self._compile_again(process, report)
        except BaseException:
            process.kill()
            process.close()
            raise
        self._unanswered = 0
        self.mute = False
        self._stuck.clear()
        with self._changed:
            self._process = process
            self._changed.notify_all()

    def close(self) -> None:
        self.stop()
        with self._changed:
            self._process = None
        self._newest.close()

    # ------------------------------------------------------------------------ any thread

    def wake(self) -> None:
        self._note(WAKE)

    def cancel(self, ticket: int) -> None:
        self._note(ticket)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._newest.end_in_time()
            self._changed.notify_all()
        self.wake()

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        check: Callable[[], None] | None = None,
    ) -> list[int]:
        # Unchecked: where it takes too long, `stop` ends the process.
        return self._ask(Tokenize(text, add_special), list[int])

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._ask(Detokenize(tuple(token_ids)), str)

    def prepare(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        return self._ask(Prepare(_portable_params(params)), tuple[tuple[int, ...], ...])

    def compile_grammar(self, source: GrammarSource) -> Grammar:
        grammar = Grammar(next(self._numbers), source, self._forgotten)
        process: ModelProcess | None = None
        while True:
            process = self._running(other_than=process)
            _compile(process, grammar)
            with self._changed:
                if self._process is process:
                    self._grammars.add(grammar)
                    return grammar

    def open_embedder(self) -> Embedder:
        return self._use(
            lambda process: _Embedder(
                process, process.embeddings.ask(OpenEmbedder(), EmbedderFacts)
            )
        )

    # --------------------------------------------------------------------------- details

    def _start(self, report: ProgressReport) -> tuple[ModelProcess, Loaded]:
        """A process that has loaded the model."""
        try:
            process = ModelProcess(self._folder)
        except (OSError, RuntimeError) as error:
            raise ModelLoadError(
                f"{self._path}: no process could be started to load it: {error}"
            ) from None
        with self._changed:
            self._newest = process
        try:
            return process, self._load(process, report)
        except BaseException:
            process.kill()
            process.close()
            raise

    def _load(self, process: ModelProcess, report: ProgressReport) -> Loaded:
        share = 0.0
        with suppress(HangUp):
            process.steps.send(self._request)
            while True:
                self._await(process.steps, report, share)
                progress = process.steps.receive(Progress)
                if progress.loaded is not None:
                    return progress.loaded
                share = progress.share
        raise ModelLoadError(f"{self._path}: {process.death()} while it loaded it")

    def _compile_again(self, process: ModelProcess, report: ProgressReport) -> None:
        """Have a process know the grammars that the ones before it knew.

        What took nearly too much once may take too much now. That ends whose grammar it is, when
        it is that one's turn, and nobody else.
        """
        with self._changed:
            grammars = list(self._grammars)
        with suppress(HangUp):
            for grammar in grammars:
                process.grammars.send(Compile(grammar.number, grammar.source))
                self._await(process.grammars, report, 1.0)
                grammar.refusal = None
                try:
                    process.grammars.receive(type(None))
                except MtpBatchError as error:
                    grammar.refusal = f"compiled again after a restart, it was refused: {error}"
            return
        raise process.death()

    def _await(self, channel: Channel, report: ProgressReport, share: float) -> None:
        """Wait for a message, and look around meanwhile."""
        while report(share):
            if channel.comes(_LOOK_AROUND):
                return
        raise ModelLoadError(f"{self._path}: loading was given up")

    def _exchange(
        self, process: ModelProcess, plan: Plan | None, wait: bool, timeout: float | None
    ) -> list[StepResult]:
        """Exchange with a process, which may be stuck: then requests can end all the same.

        What it has not answered in time it answers later, and is not asked again meanwhile.
        """
        patience = _PATIENCE if timeout is None else min(timeout + _LOOK_AROUND, _PATIENCE)
        if plan is not None or not self._unanswered:
            if self._unanswered:
                process.notes.send(WAKE)  # it may wait for what does not come
            heartbeat = _HEARTBEAT if timeout is None else min(timeout, _HEARTBEAT)
            if plan is not None and (stuck := _stuck(plan)):
                self._stuck[plan.number] = stuck
            exchange = Exchange(_portable(plan), wait, heartbeat, self._take_forgotten())
            process.steps.send(exchange)
            self._unanswered += 1
        self.mute = not process.steps.comes(patience)
        if self.mute:
            return []
        self._unanswered -= 1
        return [self._with_stuck(result) for result in process.steps.receive(Results)]

    def _with_stuck(self, result: StepResult) -> StepResult:
        """The result, in which they are stuck whose grammar was refused; they began without."""
        stuck = self._stuck.pop(result.plan, None)
        if stuck is None:
            return result
        entries = tuple(
            NO_RESULT if index in stuck else entry for index, entry in enumerate(result.entries)
        )
        return msgspec.structs.replace(
            result, entries=entries, stuck=(*result.stuck, *stuck.values())
        )

    def _bury(self, process: ModelProcess, why: str = "") -> NativeDiedError:
        """There is no process from now on. What it died of."""
        death = process.death(why)
        with self._changed:
            self._process = None
        process.close()
        return death

    def _running(self, other_than: ModelProcess | None = None) -> ModelProcess:
        """The process that runs, another one than that: wait until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._process not in (None, other_than))
            process = self._process
        if process is None or process is other_than:
            raise self._newest.death()
        return process

    def _ask(self, request: Struct, kind: type[_Value]) -> _Value:
        """Ask about texts, where nobody else waits for an answer."""

        def ask(process: ModelProcess) -> _Value:
            free = (channel for channel in process.texts if not channel.busy)
            return next(free, process.texts[0]).ask(request, kind)

        return self._use(ask)

    def _use(self, use: Callable[[ModelProcess], _Value]) -> _Value:
        """Use the process. If it dies meanwhile, this is hardly why: use the next one.

        If that dies as well, it may be why. Who tried again and again would end the engine.
        """
        process = self._running()
        with suppress(HangUp):
            return use(process)
        process.death()  # what it answered may have been no answer
        process = self._running(other_than=process)
        with suppress(HangUp):
            return use(process)
        raise process.death()

    def _note(self, note: int) -> None:
        # No lock: see the protocol.
        if not self._home.here:
            return
        process = self._process
        if process is None:
            self._wakes.put(None)
        else:
            process.notes.send(note)

    def _wait(self, timeout: float | None) -> None:
        try:
            self._wakes.get(timeout=timeout)
            while True:
                self._wakes.get_nowait()
        except Empty:
            pass

    def _take_forgotten(self) -> tuple[int, ...]:
        forgotten = []
        while not self._forgotten.empty():
            forgotten.append(self._forgotten.get())
        return tuple(forgotten)


class _Embedder:
    """An embedder in a process; it dies with it."""

    def __init__(self, process: ModelProcess, facts: EmbedderFacts) -> None:
        self._process = process
        self.n_ctx = facts.n_ctx
        self.n_embd = facts.n_embd

    def add(self, tokens: Sequence[int]) -> int:
        return self._ask(AddText(tuple(tokens)), int)

    def drop(self, ticket: int) -> None:
        self._ask(DropText(ticket), type(None))

    def step(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        import numpy as np  # not before it is needed, as with the rest of the engine

        done = self._ask(Embed(), list[tuple[int, bytes]])
        return [(ticket, np.frombuffer(vector, np.float32)) for ticket, vector in done]

    def close(self) -> None:
        with suppress(NativeDiedError):
            self._ask(CloseEmbedder(), type(None))

    def _ask(self, request: Struct, kind: type[_Value]) -> _Value:
        with suppress(HangUp):
            return self._process.embeddings.ask(request, kind)
        raise self._process.death()


def _compile(process: ModelProcess, grammar: Grammar) -> None:
    with suppress(HangUp):
        process.grammars.ask(Compile(grammar.number, grammar.source), type(None))
        return
    raise process.death()


def _stuck(plan: Plan) -> dict[int, tuple[int, str]]:
    """Its entries that begin with a grammar that was refused, by index: their ids, and why."""
    refusals = {
        admission.seq_id: admission.grammar.refusal
        for admission in plan.admit
        if admission.grammar is not None and admission.grammar.refusal is not None
    }
    if not refusals:  # as in almost every plan
        return {}
    return {
        index: (entry.seq_id, refusals[entry.seq_id])
        for index, entry in enumerate(plan.entries)
        if entry.seq_id in refusals
    }


def _portable(plan: Plan | None) -> Plan | None:
    """The same, with nothing in it that only the app understands, nor grammars refused."""
    if plan is None or not plan.admit:
        return plan
    admit = tuple(
        msgspec.structs.replace(
            admission, params=_portable_params(admission.params), grammar=_known(admission.grammar)
        )
        for admission in plan.admit
    )
    return msgspec.structs.replace(plan, admit=admit)


def _known(grammar: Grammar | None) -> Grammar | None:
    return None if grammar is None or grammar.refusal is not None else grammar


def _portable_params(params: SamplingParams) -> SamplingParams:
    """Without what was compiled, which may be Python types, and what nobody samples by."""
    return msgspec.structs.replace(
        params,
        json_schema=None,
        regex=None,
        choice=(),
        grammar=None,
        metadata={},
        max_tokens=min(params.max_tokens, _MOST),
        min_tokens=min(params.min_tokens, _MOST),
        top_k=min(params.top_k, _MOST),
    )


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None
