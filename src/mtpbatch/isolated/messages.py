"""What crosses between the app and the process that runs the model. Pure values."""

from __future__ import annotations

import traceback
from typing import TypeAlias

from msgspec import Struct

from mtpbatch import exceptions
from mtpbatch.exceptions import InternalError, MtpBatchError
from mtpbatch.types import (
    EngineConfig,
    GrammarSource,
    ModelFacts,
    Plan,
    SamplingParams,
    StepResult,
    TemplateSource,
)

Results: TypeAlias = tuple[StepResult, ...]


def portable(text: str) -> str:
    """A text, made so that it can cross: it may hold the name of a file, which need not be one."""
    return text.encode(errors="backslashreplace").decode()


# ------------------------------------------------------------------------------ failures


class Failure(Struct, frozen=True):
    """An exception, which comes instead of any answer."""

    kind: str
    """The name of its class, which is one of :mod:`mtpbatch.exceptions`."""
    words: str
    fields: dict[str, str | int | float | None]
    """Its attributes."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """An exception as a value; one that mtpbatch does not raise on purpose is a bug."""
        if not isinstance(error, MtpBatchError):
            words = "".join(traceback.format_exception(error))
            return cls(InternalError.__name__, f"in the model's process: {words}", {})
        fields = {
            name: value
            for name, value in vars(error).items()
            if value is None or isinstance(value, str | int | float)
        }
        return cls(type(error).__name__, portable(str(error)), fields)

    @property
    def error(self) -> MtpBatchError:
        """The exception again, without its constructor, which may want other arguments."""
        kind = getattr(exceptions, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, MtpBatchError)):
            return InternalError(f"the model's process raised {self.kind}: {self.words}")
        error: MtpBatchError = kind.__new__(kind, self.words)
        vars(error).update(self.fields)
        return error


# ------------------------------------------------------------------------- steps: loading


class Load(Struct, frozen=True):
    """Comes first, once. Names of files need not be texts, and so are not in the config."""

    path: bytes
    draft_model: bytes | None
    lora: dict[bytes, float]
    config: EngineConfig


class Loaded(Struct, frozen=True):
    """What an engine wants to know of its backend."""

    facts: ModelFacts
    config: EngineConfig
    token_bytes: tuple[bytes, ...]
    description: str
    chat_template: TemplateSource | None


class Progress(Struct, frozen=True):
    """So much of the model is loaded."""

    share: float
    loaded: Loaded | None = None
    """All of it, and this is the last one."""


# ------------------------------------------------------------- steps, from then on: plans


class Exchange(Struct, frozen=True):
    """The arguments of an exchange."""

    plan: Plan | None
    """Grammars in it are numbers, by which they have been compiled."""
    wait: bool
    timeout: float | None
    forgotten: tuple[int, ...]
    """Grammars that nobody needs after it."""


# --------------------------------------------------------------------------------- texts


class Tokenize(Struct, frozen=True, tag=True):
    """Answered with token ids."""

    text: str
    add_special: bool


class Detokenize(Struct, frozen=True, tag=True):
    """Answered with a text."""

    token_ids: tuple[int, ...]


class Prepare(Struct, frozen=True, tag=True):
    """Answered with the tokens of bad words."""

    params: SamplingParams


# ------------------------------------------------------------------------------ grammars


class Compile(Struct, frozen=True):
    """Answered with nothing. Plans name the grammar by the number."""

    number: int
    source: GrammarSource


# ---------------------------------------------------------------------------- embeddings


class OpenEmbedder(Struct, frozen=True, tag=True):
    """Answered with :class:`EmbedderFacts`. Of several, the last one opened is meant."""


class EmbedderFacts(Struct, frozen=True):
    """What its user wants to know of it."""

    n_ctx: int
    n_embd: int


class AddText(Struct, frozen=True, tag=True):
    """Answered with the text's number."""

    token_ids: tuple[int, ...]


class DropText(Struct, frozen=True, tag=True):
    """Answered with nothing."""

    ticket: int


class Embed(Struct, frozen=True, tag=True):
    """One decode. Answered with the texts' numbers and vectors, as float32 in machine order."""


class CloseEmbedder(Struct, frozen=True, tag=True):
    """Answered with nothing."""
