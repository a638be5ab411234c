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

    ::

        try:
            done = await engine.generate("In the beginning", max_tokens=8)
        except mtpbatch.MtpBatchError as error:
            done = error.completion
    """

    completion: Completion | None = None
    """None if no request had started."""

    def __reduce__(self) -> tuple[Any, ...]:
        # So that errors reach other processes whole: what __init__ takes is not what some keep.
        return _made_anew, (type(self), self.args), self.__dict__


def _made_anew(kind: type[MtpBatchError], args: tuple[object, ...]) -> MtpBatchError:
    return kind.__new__(kind, *args)


class InvalidRequestError(MtpBatchError, ValueError):
    """The arguments of a call are wrong; nothing was started and no other request is affected.

    What to do: mend the call as the message says.

    ::

        try:
            await engine.generate([])
        except mtpbatch.InvalidRequestError as error:
            print(error)  # also a ValueError
    """


class InvalidParameterError(InvalidRequestError):
    """One parameter is unknown, has the wrong type or is out of range.

    ``parameter`` is its name as the caller wrote it.

    What to do: give a value that the message allows; for an unknown parameter it has the name
    that was probably meant.

    ::

        try:
            await engine.generate("In the", top_p=2)
        except mtpbatch.InvalidParameterError as error:
            assert error.parameter == "top_p"
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter


class PromptTooLongError(InvalidParameterError):
    """The prompt leaves no room in a sequence's context for even one generated token.

    What to do: shorten the prompt, or open the engine with a larger ``n_ctx``.

    ::

        prompt = [65] * 10_000
        try:
            await engine.generate(prompt)
        except mtpbatch.PromptTooLongError as error:
            await engine.generate(prompt[-error.n_ctx // 2 :], max_tokens=8)
    """

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

    What to do: mend the messages if the template refuses them; with a model file whose template
    is missing or broken, make the prompt yourself and call ``generate``.

    ::

        try:
            await engine.chat(messages, max_tokens=8)
        except mtpbatch.ChatTemplateError:
            await engine.generate("USER: Hello ASSISTANT:", max_tokens=8)
    """


class EngineError(MtpBatchError):
    """The engine cannot take or finish the call.

    What to do: it depends on which one it is: see the classes below.

    ::

        try:
            engine.submit("In the beginning", max_tokens=8)
        except mtpbatch.EngineError as error:
            print("not now:", error)
    """


class EngineOverloaded(EngineError):
    """Too many requests wait already, and this call does not wait for room. Nothing was started.

    Attributes, of that moment: ``running`` and ``waiting`` requests; ``waiting_tokens``, those of
    the prompts that wait; and the limits ``max_waiting`` and ``max_waiting_tokens`` of
    :class:`~mtpbatch.EngineConfig`, ``None`` for no limit.

    What to do: try again later (over HTTP: 429 with ``Retry-After``), let the task wait for
    room with ``on_full="wait"``, raise the limits, or add engines.

    ::

        try:
            generation = engine.submit("In the beginning", max_tokens=8)
        except mtpbatch.EngineOverloaded as error:
            print(f"{error.waiting} of {error.max_waiting} wait already")
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
    """The engine was closed, or takes no new requests because it is being drained.

    What to do: send the request to another engine; when an app shuts down, it is what requests
    that come too late get.

    ::

        async with mtpbatch.Engine.open() as other:
            await other.drain()
            try:
                await other.generate("too late")
            except mtpbatch.EngineClosedError:
                print("it takes no more")
    """


class EngineDeadError(EngineError):
    """The engine's thread ended because of an error (see ``__cause__``); open a new engine.

    With ``isolation="process"`` this is also the end when the process that runs the model died too
    often in a row; the cause is then the last death, or why no other process could be started.

    What to do: open a new engine, or have the supervisor restart the process; ``__cause__``
    says what to mend, and ``isolation="process"`` survives a model that crashes.

    ::

        try:
            engine.check_health()
        except mtpbatch.EngineDeadError as error:
            raise SystemExit(f"start again: {error.__cause__}")
    """


class EngineStalledError(EngineError):
    """No step has ended for too long although there are requests.

    ``seconds`` is how long, ``n_requests`` how many requests have not ended.

    What to do: raise ``stall_timeout`` if a step of this model can take so long; otherwise
    restart the process, since a native call that hangs cannot be ended. Engines with
    ``isolation="process"`` and a ``step_timeout`` kill and restart the model's process themselves.

    ::

        try:
            engine.check_health(stall_timeout=30)
        except mtpbatch.EngineStalledError as error:
            print(f"{error.n_requests} requests wait for {error.seconds} s")
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

    What to do: open the engine in the process that uses it, or start workers with the ``spawn``
    method.

    ::

        import multiprocessing

        workers = multiprocessing.get_context("spawn")  # each opens an engine of its own
    """


class NativeError(MtpBatchError):
    """A call into llama.cpp was refused or failed; the message carries its reason.

    What to do: as the message says; where memory ran out, lower ``n_ctx``, ``n_seq`` or
    ``n_cells``, or take a smaller model or ``kv_type``.

    ::

        try:
            done = await engine.generate("In the beginning", max_tokens=8)
        except mtpbatch.NativeError as error:
            print("llama.cpp says:", error)
    """


class ModelLoadError(NativeError):
    """The model file could not be loaded.

    What to do: check the path, and that the download is whole; a file that this llama.cpp does
    not know needs another conversion, or another release of mtpbatch.

    ::

        try:
            async with mtpbatch.Engine.open("no-such-file.gguf"):
                ...
        except mtpbatch.ModelLoadError as error:
            print(error)
    """


class ContextError(NativeError):
    """A context could not be created, or was asked for something it cannot do.

    What to do: mend the setting that the message names; where memory ran out, lower ``n_ctx``,
    ``n_seq`` or ``n_cells``.

    ::

        from mtpbatch.native import Context, Model

        try:
            Context(Model("model.gguf"), n_seq=1000)
        except mtpbatch.ContextError as error:
            print(error)
    """


class DecodeError(NativeError):
    """A decode failed. A request that took part in it has ended; see the native API's docs of what
    else it means there.

    What to do: send the request again. If it fails again, the model file or the backend is at
    fault; the log has ``step.failed`` with the reason.

    ::

        try:
            done = await engine.generate("In the beginning", max_tokens=8)
        except mtpbatch.DecodeError as error:
            print("send it again; so far:", error.completion)
    """


class GrammarError(NativeError):
    """What the answer was to keep to takes too much to go on with, or nothing can come next.

    Most such grammars are refused before their request begins; no other request is affected.

    What to do: make the grammar smaller or less ambiguous, and see that ``bad_words`` and
    ``logit_bias`` leave it a way to go on.

    ::

        try:
            await engine.generate("A number:", regex="[0-9]+", max_tokens=8)
        except mtpbatch.GrammarError as error:
            print("a simpler grammar would do:", error)
    """


class NativeDiedError(NativeError):
    """The process that runs the model died, and what it was doing with it.

    Only engines with ``isolation="process"`` raise it. They start another process and go on. Where
    none can be started any more, there is :class:`EngineDeadError`. ``returncode`` is how the
    process ended: ``-n`` by signal n, otherwise its exit status. ``why`` says that the
    engine killed it because it was stuck, and is empty otherwise.

    What to do: send the request again; if the same request kills it again, refuse that request
    and report it.

    ::

        try:
            done = await engine.generate("In the beginning", max_tokens=8)
        except mtpbatch.NativeDiedError:
            done = await engine.generate("In the beginning", max_tokens=8)  # by another process
    """

    def __init__(self, returncode: int, advice: str = "", *, why: str = "") -> None:
        how = f"{_ending(returncode)}: {why}" if why else _ending(returncode)
        super().__init__(f"the process that runs the model died ({how}){advice}")
        self.returncode = returncode
        self.why = why


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    known = -returncode in set(signal.Signals)
    name = f", {signal.Signals(-returncode).name}" if known else ""
    return f"signal {-returncode}{name}"


class MtpSessionError(NativeError):
    """Base of the errors of :class:`mtpbatch.native.MtpSession`.

    What to do: these are mistakes in a loop of one's own, but for ``MtpInitError``: follow the
    order of calls that the session's documentation has. An engine raises none of them.

    ::

        from mtpbatch.native import Context, Model, MtpSession

        with Model("model.gguf") as model, Context(model, n_ctx=256, n_rs_seq=3) as target:
            with MtpSession(target, Context.mtp(target), n_seq=1, n_draft_max=3) as session:
                try:
                    session.accept(0, 1)  # nothing was drafted
                except mtpbatch.MtpSessionError as error:
                    assert isinstance(error, mtpbatch.MtpAcceptError)
    """


class MtpInitError(MtpSessionError):
    """The model's MTP heads are of a kind that llama.cpp cannot run.

    What to do: open the engine with ``n_draft_max=0``, or use a model of another architecture.
    """


class MtpInvalidConfigError(MtpSessionError):
    """A value of :class:`mtpbatch.native.MtpSessionConfig` is out of range.

    What to do: give a value that the message allows.
    """


class MtpIncompatibleContextsError(MtpSessionError):
    """The target and draft contexts do not fit together, or do not fit the config.

    What to do: make the draft context for this target, with settings that the message names.
    """


class MtpBadSequenceError(MtpSessionError):
    """The sequence id is out of range, or the sequence is not at the position the call assumes.

    What to do: see that every decode of the target is processed once, and truncate both to the
    same length.
    """


class MtpProcessError(MtpSessionError):
    """A decoded batch does not continue what the session has seen of its sequences.

    What to do: call ``process`` after every decode of the target, with that very batch.
    """


class MtpDraftError(MtpSessionError):
    """Drafting was asked for before the last draft was settled, or with values out of range.

    What to do: settle the last draft with ``process`` and ``accept`` before the next.
    """


class MtpAcceptError(MtpSessionError):
    """``accept`` without a draft to accept from, or of more tokens than were drafted.

    What to do: accept once after each draft, from 0 to as many tokens as were verified.
    """


class MtpStateError(MtpSessionError):
    """A sequence cannot be saved or forked now, or what was saved cannot be restored here.

    What to do: settle what is under way before saving; restore only into a session over the
    same model and settings, with room.
    """


class LibraryMismatchError(MtpBatchError, ImportError):
    """The installed llama-cpp-python is not the version that mtpbatch was compiled against, or was
    built so that mtpbatch does not fit it.

    What to do: run the ``pip install`` of the message; mtpbatch works with exactly one version.

    ::

        try:
            import mtpbatch
        except ImportError as error:  # which it is as well
            print(error)
    """


class InternalError(MtpBatchError):
    """mtpbatch broke one of its own rules. Nothing a caller does should ever raise this.

    What to do: report it, with the traceback.

    ::

        try:
            done = await engine.generate("In the beginning", max_tokens=8)
        except mtpbatch.InternalError as error:
            raise SystemExit(f"please report it: {error}")
    """
