"""Everything mtpbatch raises, in one tree, sorted by who can do something about it.

::

    MtpBatchError
    ├── InvalidRequestError (ValueError)    the caller's: mend the arguments and call again
    │   ├── InvalidParameterError           one parameter is missing, mistyped or out of range
    │   ├── PromptTooLongError              the prompt does not fit into a sequence's context
    │   └── ChatTemplateError               the model's template makes no prompt of these messages
    ├── EngineError                         this engine cannot serve the call
    │   ├── EngineOverloaded                too many requests wait already
    │   ├── EngineClosedError               it was closed, or drains
    │   ├── EngineDeadError                 its thread ended because of an error, which is the cause
    │   └── EngineStalledError              it has requests, and no step ends
    ├── WrongProcessError                   a forked child used what its parent opened
    ├── NativeError                         llama.cpp refused or failed
    │   ├── ModelLoadError                  no such file, not a GGUF, truncated, unsupported
    │   ├── ContextError                    a context could not be made or was used wrongly
    │   ├── DecodeError                     a decode failed
    │   ├── GrammarError                    an answer cannot go on by its grammar
    │   ├── NativeDiedError                 the process that runs it died; the engine starts another
    │   └── MtpSessionError                 speculative drafting
    │       ├── MtpInitError                the model's MTP heads cannot be used
    │       ├── MtpInvalidConfigError       a value of its config is out of range
    │       ├── MtpIncompatibleContextsError  these two contexts cannot work together
    │       ├── MtpBadSequenceError         no such sequence, or not at that position
    │       ├── MtpProcessError             a decoded batch could not be taken in
    │       ├── MtpDraftError               drafting was asked for out of turn or wrongly
    │       ├── MtpAcceptError              accept without a draft, or of more than was drafted
    │       └── MtpStateError               a sequence cannot be saved, restored or forked
    ├── LibraryMismatchError (ImportError)  another llama-cpp-python than the one compiled against
    └── InternalError                       a bug in mtpbatch: please report it
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpbatch.types import Completion


class MtpBatchError(Exception):
    """Base of every error that mtpbatch raises on purpose.

    ``completion`` holds what a request had produced when the error ended it, if it had started.
    """

    completion: Completion | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # So that errors reach other processes whole: what __init__ takes is not what some keep.
        return _made_anew, (type(self), self.args), self.__dict__


def _made_anew(kind: type[MtpBatchError], args: tuple[object, ...]) -> MtpBatchError:
    return kind.__new__(kind, *args)


class InvalidRequestError(MtpBatchError, ValueError):
    """The arguments of a call are wrong; nothing was started and no other request is affected."""


class InvalidParameterError(InvalidRequestError):
    """One parameter is unknown, has the wrong type or is out of range.

    ``parameter`` is its name as the caller wrote it.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter


class PromptTooLongError(InvalidParameterError):
    """The prompt leaves no room in a sequence's context for even one generated token."""

    def __init__(self, n_tokens: int, n_ctx: int) -> None:
        super().__init__(
            "prompt",
            f"has {n_tokens} tokens, but a sequence holds n_ctx={n_ctx} and needs one free for the "
            f"answer; shorten the prompt or open the engine with a larger n_ctx",
        )
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class ChatTemplateError(InvalidRequestError):
    """A conversation could not be made a prompt: no chat template, or it refused or failed.

    The message carries the template's own words, if it had any.
    """


class EngineError(MtpBatchError):
    """The engine cannot take or finish the call."""


class EngineOverloaded(EngineError):
    """Too many requests wait already, and this call does not wait for room. Nothing was started.

    Attributes, of that moment: ``running`` and ``waiting`` requests; ``waiting_tokens``, those of
    the prompts that wait; and the limits ``max_waiting`` and ``max_waiting_tokens`` of
    :class:`~mtpbatch.EngineConfig`, ``None`` for no limit.
    """

    def __init__(
        self,
        *,
        running: int,
        waiting: int,
        waiting_tokens: int,
        max_waiting: int | None,
        max_waiting_tokens: int | None,
    ) -> None:
        super().__init__(
            f"the engine is full: {running} requests run and {waiting} wait, with prompts of "
            f"{waiting_tokens} tokens (max_waiting={max_waiting}, "
            f"max_waiting_tokens={max_waiting_tokens}); try again later, raise the limits when "
            f'opening the engine, or let generate() wait for room: on_full="wait"'
        )
        self.running = running
        self.waiting = waiting
        self.waiting_tokens = waiting_tokens
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens


class EngineClosedError(EngineError):
    """The engine was closed, or takes no new requests because it is being drained."""


class EngineDeadError(EngineError):
    """The engine's thread ended because of an error (see ``__cause__``); open a new engine.

    With ``isolation="process"`` this is also the end when the process that runs the model died too
    often in a row; the cause is then the last death, or why no other process could be started.
    """


class EngineStalledError(EngineError):
    """No step has ended for too long although there are requests.

    ``seconds`` is how long, ``n_requests`` how many requests have not ended.
    """

    def __init__(self, seconds: float, stall_timeout: float, n_requests: int) -> None:
        super().__init__(
            f"no step has ended for {seconds:.1f} s, longer than stall_timeout={stall_timeout}, "
            f"with {n_requests} requests under way; if a step of this model can take so long, "
            f"allow more, otherwise restart the process"
        )
        self.seconds = seconds
        self.n_requests = n_requests


class WrongProcessError(MtpBatchError):
    """A forked child used an object that its parent opened: native threads do not survive a fork.

    Open the engine in the process that uses it, or start workers with the ``spawn`` method.
    """


class NativeError(MtpBatchError):
    """A call into llama.cpp was refused or failed; the message carries its reason."""


class ModelLoadError(NativeError):
    """The model file could not be loaded."""


class ContextError(NativeError):
    """A context could not be created, or was asked for something it cannot do."""


class DecodeError(NativeError):
    """A decode failed. A request that took part in it has ended; see the native API's docs of what
    else it means there."""


class GrammarError(NativeError):
    """What the answer was to keep to takes too much to go on with, or nothing can come next.

    Most such grammars are refused before their request begins; no other request is affected.
    """


class NativeDiedError(NativeError):
    """The process that runs the model died, and what it was doing with it.

    Only engines with ``isolation="process"`` raise it. They start another process and go on: send
    the request again. Where none can be started any more, there is :class:`EngineDeadError`.
    ``returncode`` is how the process ended: ``-n`` by signal n, otherwise its exit status.
    """

    def __init__(self, returncode: int, advice: str = "") -> None:
        super().__init__(f"the process that runs the model died ({_ending(returncode)}){advice}")
        self.returncode = returncode


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    known = -returncode in set(signal.Signals)
    name = f", {signal.Signals(-returncode).name}" if known else ""
    return f"signal {-returncode}{name}"


class MtpSessionError(NativeError):
    """Base of the errors of :class:`mtpbatch.native.MtpSession`."""


class MtpInitError(MtpSessionError):
    """The model's MTP heads are of a kind that llama.cpp cannot run."""


class MtpInvalidConfigError(MtpSessionError):
    """A value of :class:`mtpbatch.native.MtpSessionConfig` is out of range."""


class MtpIncompatibleContextsError(MtpSessionError):
    """The target and draft contexts do not fit together, or do not fit the config."""


class MtpBadSequenceError(MtpSessionError):
    """The sequence id is out of range, or the sequence is not at the position the call assumes."""


class MtpProcessError(MtpSessionError):
    """A decoded batch does not continue what the session has seen of its sequences."""


class MtpDraftError(MtpSessionError):
    """Drafting was asked for before the last draft was settled, or with values out of range."""


class MtpAcceptError(MtpSessionError):
    """``accept`` without a draft to accept from, or of more tokens than were drafted."""


class MtpStateError(MtpSessionError):
    """A sequence cannot be saved or forked now, or what was saved cannot be restored here."""


class LibraryMismatchError(MtpBatchError, ImportError):
    """The installed llama-cpp-python is not the version that mtpbatch was compiled against, or was
    built so that mtpbatch does not fit it."""


class InternalError(MtpBatchError):
    """mtpbatch broke one of its own rules. Nothing a caller does should ever raise this."""
