"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from mtpbatch.exceptions import NativeDiedError
from mtpbatch.types import (
    EngineConfig,
    GrammarSource,
    ModelFacts,
    Plan,
    SamplingParams,
    StepResult,
    TemplateSource,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Embedder(Protocol):
    """Makes embeddings of texts, many at once. One thread uses it, and closes it."""

    @property
    def n_ctx(self) -> int:
        """Most tokens of one text."""
        ...

    @property
    def n_embd(self) -> int:
        """Numbers in an embedding."""
        ...

    def add(self, tokens: Sequence[int]) -> int:
        """Have a text of 1 to n_ctx tokens embedded by the next steps; a number for it."""
        ...

    def drop(self, ticket: int) -> None:
        """Forget a text that is not done."""
        ...

    def step(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        """One decode; the texts that are done with it, by their numbers, each with n_embd floats.

        After an exception it can only be closed.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Backend(Protocol):
    """A loaded model that executes plans.

    The engine's thread makes it, exchanges plans for results and closes it. ``tokenize``,
    ``detokenize``, ``prepare``, ``compile_grammar`` and ``open_embedder`` are called from other
    threads, several at once, and never after ``close`` began; ``wake`` and ``cancel`` from any
    thread at any time, and from wherever the garbage collector runs: they must not wait for a lock
    of Python's.
    """

    @property
    def facts(self) -> ModelFacts:
        """What the scheduler needs to know."""
        ...

    @property
    def config(self) -> EngineConfig:
        """The config it runs with: nothing in it is left open."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each token of the vocabulary; of control tokens, none."""
        ...

    @property
    def description(self) -> str:
        """The model in a few words, for ``repr``."""
        ...

    @property
    def chat_template(self) -> TemplateSource | None:
        """The model's own chat template, if it has one."""
        ...

    @property
    def tokenizes_at_once(self) -> bool:
        """Whether an event loop may have short texts tokenised: it waits for nobody else."""
        ...

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        check: Callable[[], None] | None = None,
    ) -> list[int]:
        """The tokens of a prompt. ``add_special``: with those that the model wants around it.

        ``check`` may be called in between, and raises once nobody wants them any more.
        """
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that are in the vocabulary."""
        ...

    def open_embedder(self) -> Embedder:
        """What embeds texts with this model beside the plans, and is closed before the backend."""
        ...

    def prepare(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """What a request of these parameters needs of the vocabulary, before it comes in a plan.

        Returns :attr:`Admission.bad_words`.
        """
        ...

    def compile_grammar(self, source: GrammarSource) -> Any:
        """What :attr:`Admission.grammar` takes, so that answers keep to it. It can take seconds.

        Raises :class:`~mtpbatch.InvalidParameterError` if it cannot be done.
        """
        ...

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        """Hand over a plan; the results of the steps that have ended since the last call.

        The backend runs ahead: when a step ends, the next one begins with the plan handed over
        meanwhile, or repeats the last one. Plans are begun in order, each for one step at least;
        what one of them releases leaves at once, and is passed over by plans that come before it.
        With ``wait``, waits until there are some, :meth:`wake` is called, or ``timeout`` seconds
        of the engine's clock have passed; None: as long as it takes. Calling again says that the
        results given last have been taken in.

        A result with an error says that the step failed: its plan's sequences are lost until they
        are released. So may others be that the plan leaves out; a scheduler's leave nobody out. An
        entry that was given what it cannot have counts as failed, alone. An exception is a bug and
        ends the engine.
        """
        ...

    def wake(self) -> None:
        """End the wait of the exchange under way, or of the next one."""
        ...

    def cancel(self, ticket: int) -> None:
        """Wake, and let the request of that ticket take part in no step after the one under way.

        It needs no exchange: whoever cancels may keep Python busy from then on. A plan must still
        release the sequence. The request may be one that the next exchange hands over, but not a
        later one.
        """
        ...

    def stop(self) -> None:
        """Wake, since :meth:`close` is to come: calls wait for nothing but the model's work now.

        From any thread. Plans may still be exchanged.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


ProgressReport: TypeAlias = Callable[[float], bool]
"""Takes the loaded share of a model, 0 to 1; ``False`` tells the loader to give up."""

BackendFactory: TypeAlias = Callable[[ProgressReport], Backend]
"""Loads a backend. Called on the engine's thread."""


@runtime_checkable
class Mortal(Protocol):
    """A backend whose native part can die while the app lives on.

    Its :meth:`~Backend.exchange` then raises :class:`~mtpbatch.NativeDiedError`, once. From then
    on it takes no plan and only waits, and other calls wait for the restart. No exchange lasts
    longer than about a second, so that the engine can see whether it is stuck.
    """

    @property
    def mute(self) -> bool:
        """Whether it did not answer the last exchange, work or no work."""
        ...

    def kill(self, why: str) -> NativeDiedError:
        """Kill it because it is stuck: what :meth:`~Backend.exchange` would raise, with ``why``.

        Called on the engine's thread.
        """
        ...

    def restart(self, report: ProgressReport) -> None:
        """Begin anew: nothing is left of sequences and snapshots. Grammars stay good; should one be
        refused now, who begins with it is stuck at once (:attr:`StepResult.stuck`).

        Called on the engine's thread. While it takes its time it calls ``report`` every now and
        then, at least some times a second. Raises :class:`~mtpbatch.MtpBatchError` if it cannot
        begin; then it may be called again.
        """
        ...
