"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from mtpbatch.types import EngineConfig, ModelFacts, Plan, StepResult


class Backend(Protocol):
    """A loaded model that executes plans.

    The engine's thread makes it, executes plans and closes it. Only ``tokenize`` and
    ``detokenize`` are called from other threads, several at once, and never after ``close``
    began.
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

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that are in the vocabulary."""
        ...

    def execute(self, plan: Plan) -> StepResult:
        """Release, then admit, then run the entries of a plan.

        A :class:`~mtpbatch.exceptions.NativeError` means that the step failed: releases and
        admissions are done, the sequences of the entries are lost until they are released, and
        all others are as before. Any other exception is a bug and ends the engine.
        """
        ...

    def close(self) -> None:
        """Free everything."""
        ...


ProgressReport: TypeAlias = Callable[[float], bool]
"""Takes the loaded share of a model, 0 to 1; ``False`` tells the loader to give up."""

BackendFactory: TypeAlias = Callable[[ProgressReport], Backend]
"""Loads a backend. Called on the engine's thread."""
