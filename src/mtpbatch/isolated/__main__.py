"""The process that runs a model for an app: started by ``mtpbatch.isolated.process``.

usage: python -m mtpbatch.isolated PARENT STEPS NOTES GRAMMARS EMBEDDINGS TEXTS…

PARENT is the app's process id, the others are the file descriptors of sockets. The app's end is
this process's end: it sees the sockets hang up, and where the system can be asked to, it is killed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mtpbatch.isolated.channel import WAKE, Channel, HangUp, read_note
from mtpbatch.isolated.messages import (
    AddText,
    CloseEmbedder,
    Compile,
    Detokenize,
    DropText,
    Embed,
    EmbedderFacts,
    Exchange,
    Failure,
    Load,
    Loaded,
    OpenEmbedder,
    Prepare,
    Progress,
    Tokenize,
    portable,
)
from mtpbatch.native import Embedder, NativeBackend
from mtpbatch.types import Plan, StepResult

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *fds = map(int, sys.argv[1:])
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(request, signal.SIG_IGN)  # the app decides when it ends, and how
    _end_with(parent)
    faulthandler.enable()  # on stderr, which is the app's
    threading.excepthook = _end
    steps, notes, grammars, embeddings, *texts = (socket.socket(fileno=fd) for fd in fds)
    try:
        host = _Host(Channel(steps), notes)
    except HangUp:
        return
    threads = [
        threading.Thread(target=_answer, args=work, daemon=True)
        for work in (
            *((Channel(end), Tokenize | Detokenize | Prepare, host.text) for end in texts),
            (Channel(grammars), Compile, host.compile),
            (
                Channel(embeddings),
                OpenEmbedder | AddText | DropText | Embed | CloseEmbedder,
                host.embed,
            ),
        )
    ]
    for thread in threads:
        thread.start()
    _answer(host.steps, Exchange, host.exchange)
    for thread in threads:
        thread.join()
    host.close()


def _end_with(parent: int) -> None:
    """Have this process end with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            sys.exit()


def _end(failure: threading.ExceptHookArgs) -> None:
    """End this process because a thread has failed: the app would wait for its answers for ever."""
    try:
        threading.__excepthook__(failure)  # which tells it
    finally:
        os._exit(1)


def _answer(channel: Channel, kind: Any, answer: Callable[[Any], object]) -> None:
    """Answer the requests of that type on a channel, until it hangs up."""
    try:
        while True:
            request = channel.receive(kind)
            try:
                message = answer(request)
            except Exception as error:
                message = Failure.of(error)
            channel.send(message)
    except HangUp:
        channel.close()  # who sent what is no request waits for an answer


class _Host:
    """The backend, and what its user has of it."""

    def __init__(self, steps: Channel, notes: socket.socket) -> None:
        """Load the model that ``steps`` names, and tell of it there. Raises :class:`HangUp`."""
        self.steps = steps
        load = steps.receive(Load)
        draft_model = None if load.draft_model is None else os.fsdecode(load.draft_model)
        lora = {os.fsdecode(adapter): scale for adapter, scale in load.lora.items()}
        config = msgspec.structs.replace(load.config, draft_model=draft_model, lora=lora)
        try:
            self._backend = NativeBackend(Path(os.fsdecode(load.path)), config, self._report)
        except Exception as error:
            steps.send(Failure.of(error))
            raise HangUp from None
        self._grammars: dict[int, object] = {}
        self._embedder: Embedder | None = None
        threading.Thread(target=self._take_notes, args=(notes,), daemon=True).start()
        backend = self._backend
        loaded = Loaded(
            backend.facts,
            msgspec.structs.replace(backend.config, draft_model=None, lora={}),
            tuple(backend.token_bytes),
            portable(backend.description),
            backend.chat_template,
        )
        steps.send(Progress(1.0, loaded))

    def exchange(self, request: Exchange) -> list[StepResult]:
        plan = request.plan and self._with_grammars(request.plan)
        results = self._backend.exchange(plan, wait=request.wait, timeout=request.timeout)
        for number in request.forgotten:
            self._grammars.pop(number, None)  # it may have been another process's
        return results

    def text(self, request: Tokenize | Detokenize | Prepare) -> object:
        match request:
            case Tokenize(text, add_special):
                return self._backend.tokenize(text, add_special=add_special)
            case Detokenize(token_ids):
                return self._backend.detokenize(token_ids)
            case Prepare(params):
                return self._backend.prepare(params)

    def compile(self, request: Compile) -> None:
        self._grammars[request.number] = self._backend.compile_grammar(request.source)

    def embed(self, request: OpenEmbedder | AddText | DropText | Embed | CloseEmbedder) -> object:
        if isinstance(request, OpenEmbedder):
            self._embedder = self._backend.open_embedder()
            return EmbedderFacts(self._embedder.n_ctx, self._embedder.n_embd)
        embedder = self._embedder
        assert embedder is not None
        match request:
            case AddText(token_ids):
                return embedder.add(token_ids)
            case DropText(ticket):
                embedder.drop(ticket)
            case Embed():
                return [(ticket, vector.tobytes()) for ticket, vector in embedder.step()]
            case CloseEmbedder():
                embedder.close()
        return None

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        self._backend.close()

    def _with_grammars(self, plan: Plan) -> Plan:
        """The plan with grammars instead of their numbers."""
        if all(admission.grammar is None for admission in plan.admit):
            return plan
        admit = tuple(
            admission
            if admission.grammar is None
            else msgspec.structs.replace(admission, grammar=self._grammars[admission.grammar])
            for admission in plan.admit
        )
        return msgspec.structs.replace(plan, admit=admit)

    def _report(self, share: float) -> None:
        self.steps.send(Progress(share))

    def _take_notes(self, notes: socket.socket) -> None:
        while (note := read_note(notes)) is not None:
            if note == WAKE:
                self._backend.wake()
            else:
                self._backend.cancel(note)
        self._backend.stop()  # nobody waits for results any more


if __name__ == "__main__":
    main()
