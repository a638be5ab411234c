"""What happens to a request until the scheduler has it, and who has not had a last event.

::

    callers' threads          helpers' threads          engine's thread
    submit ─┬───────────────────────────▶ enter ─┬─ inbox ──▶ arrived
            └─▶ tokenise, compile ──────▶ enter ─┤
                                                 └─ line ───▶ move_up

A request is prepared where it comes, unless that takes long; then it enters, if there is room for
its tokens (see ``backlog``), or stands in line, or is refused. Cancellations take the same inbox.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from mtpbatch._log import RequestLog
from mtpbatch._loops import EventLoop, Mailbox
from mtpbatch.backend import Backend
from mtpbatch.backlog import Backlog
from mtpbatch.exceptions import (
    EngineClosedError,
    EngineDeadError,
    InternalError,
    InvalidRequestError,
    MtpBatchError,
)
from mtpbatch.gate import Gate
from mtpbatch.generation import Generation
from mtpbatch.scheduler import Event
from mtpbatch.sequence import Sequence
from mtpbatch.speculation import draft_wish
from mtpbatch.structured.source import grammar_source
from mtpbatch.text import TextAssembler
from mtpbatch.timeouts import Timeouts
from mtpbatch.tokenizing import Prompt, Tokenizer, snapshot
from mtpbatch.types import Admission, GrammarSource, SamplingParams, has_dry


class Live(NamedTuple):
    """A request that has not had its last event."""

    generation: Generation
    mailbox: Post
    params: SamplingParams
    submitted: float
    followed: bool
    waits: bool
    """Whether it stands in line if there is no room."""
    build: Callable[..., Sequence]
    """Makes its sequence of its prompt's tokens, those of its bad words, and its grammar if it has
    one."""
    log: RequestLog


Post: TypeAlias = Mailbox[tuple[Live, Event]]
"""The way to those requests that come from one event loop."""


class Arrivals(NamedTuple):
    """What has come since somebody looked, of requests that have not ended."""

    entered: list[Sequence]
    refused: list[Event]
    cancelled: list[str]


class _Refusal(NamedTuple):
    request_id: str
    error: MtpBatchError


class _Cancellation(NamedTuple):
    request_id: str


class Intake:
    """An engine's requests, from when they are submitted until they have had their last event.

    Requests enter and leave ``live``, the backlog and the timeouts under the gate's lock, and
    loops get their mailboxes, which live as long as requests of theirs. ``busy_since`` is when a
    request was ready while none was.
    """

    def __init__(
        self, backend: Backend, tokenizer: Tokenizer, gate: Gate, clock: Callable[[], float]
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._gate = gate
        self._clock = clock
        self._tickets = itertools.count(1)
        self._inbox: SimpleQueue[Sequence | _Refusal | _Cancellation] = SimpleQueue()
        self._mailboxes: WeakValueDictionary[EventLoop, Post] = WeakValueDictionary()
        self._timeouts = Timeouts()
        config = backend.config
        self._backlog = Backlog(config.n_seq, config.max_waiting, config.max_waiting_tokens)
        self.live: dict[str, Live] = {}
        self.busy_since = 0.0

    @property
    def n_ready(self) -> int:
        """Requests that wait or run: not those that are being tokenised, or wait for a grammar."""
        return len(self._backlog)

    @property
    def n_rejected(self) -> int:
        """Requests that found no room and were not to wait for it."""
        return self._backlog.n_rejected

    # ---------------------------------------------------------- on the callers' threads

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        followed: bool,
        waits: bool = True,
        add_special: bool = True,
        shares_prompt: bool = False,
    ) -> Generation:
        """Take a request in, on the event loop that is to hear of it.

        ``followed``: somebody reads its deltas. ``waits``: it stands in line if there is no room,
        unless the config says otherwise. ``shares_prompt``: others of the same prompt come with it.
        """
        self._gate.check_accepting()
        try:
            loop = EventLoop.current()
        except RuntimeError:
            raise InvalidRequestError(
                "requests need a running event loop in their thread; call this from a coroutine"
            ) from None
        backend, tokenizer = self._backend, self._tokenizer
        given = prompt if isinstance(prompt, str) else snapshot("prompt", prompt)
        tokenizer.check_ids("stop_token_ids", params.stop_token_ids)
        tokenizer.check_ids("logit_bias", tuple(params.logit_bias))
        wish = draft_wish(params.speculation, backend.config, backend.facts)
        submitted, seed = self._clock(), drawn_seed(params)
        ticket = next(self._tickets)
        request_id = _name(ticket)
        source = grammar_source(params)

        def build(
            prompt: tuple[int, ...],
            bad_words: tuple[tuple[int, ...], ...] = (),
            grammar: object = None,
        ) -> Sequence:
            return Sequence(
                request_id,
                ticket,
                prompt,
                params,
                seed=seed,
                max_tokens=min(params.max_tokens, backend.facts.n_ctx - len(prompt)),
                bad_words=bad_words,
                wish=wish,
                n_draft_max=backend.facts.n_draft_max,
                followed=followed,
                assembler=TextAssembler(backend.token_bytes, params.stop, params.min_tokens),
                submitted=submitted,
                shares_prompt=shares_prompt,
                grammar=grammar,
            )

        live = Live(
            Generation(request_id, loop, self._gate.home, partial(self._cancel, ticket)),
            self._mailbox(loop),
            params,
            submitted,
            followed,
            waits and backend.config.on_full == "wait",
            build,
            RequestLog.of(request_id, params.metadata),
        )
        start: Callable[[], object]
        if source is None and not tokenizer.takes_long(given, params):
            token_ids = tokenizer.prompt_ids(given, add_special=add_special)
            start = partial(self._enter, build(token_ids, tokenizer.prepare(params)))
        else:
            prepare = partial(self._prepare, live, given, source, add_special=add_special)
            compiles = source is not None or has_dry(params)
            size = len(given) + sum(map(len, params.bad_words))
            start = partial(tokenizer.submit, prepare, size, compiles=compiles)
        live.log.debug("request.submitted", followed=followed, max_tokens=params.max_tokens)
        try:
            self._let_in(live, start)
        except MtpBatchError as error:
            live.log.debug("request.ended", error=str(error))
            raise
        return live.generation

    def _let_in(self, live: Live, start: Callable[[], object]) -> None:
        """From here on a request counts, if there is room for it."""
        request_id = live.generation.request_id
        with self._gate.lock:
            self._gate.check_accepting()
            if not (live.waits or self._backlog.has_room(len(self.live))):
                raise self._backlog.reject(len(self.live))
            self.live[request_id] = live
            self._timeouts.add(request_id, live.params, live.submitted)
            try:
                start()
            except BaseException:  # no room for so many tokens, or no thread to be had
                self.remove(request_id)
                raise
            self._backend.wake()  # it may be given up before anybody else is

    def _cancel(self, ticket: int) -> None:
        # No lock: this also runs where the garbage collector closes a waiting coroutine. The
        # backend is told as well, lest steps go on while the caller keeps the GIL.
        self._inbox.put(_Cancellation(_name(ticket)))
        self._backend.cancel(ticket)

    def _mailbox(self, loop: EventLoop) -> Post:
        with self._gate.lock:
            mailbox = self._mailboxes.get(loop)
            if mailbox is None:
                self._mailboxes[loop] = mailbox = Mailbox(loop, _receive)
        return mailbox

    # ---------------------------------------------- on these, or on a helper's thread

    def _prepare(
        self,
        live: Live,
        prompt: str | tuple[int, ...],
        source: GrammarSource | None,
        *,
        add_special: bool,
    ) -> None:
        """Tokenise what is long, or compile a grammar."""
        try:
            token_ids = self._tokenizer.prompt_ids(prompt, add_special=add_special)
            bad_words = self._tokenizer.prepare(live.params)
            grammar = None if source is None else self._tokenizer.compile_grammar(source)
            self._enter(live.build(token_ids, bad_words, grammar))
        except (EngineClosedError, EngineDeadError):
            pass  # the engine ends its requests itself
        except Exception as error:
            if not isinstance(error, MtpBatchError):
                failure = InternalError(f"preparing the request failed: {error!r}")
                failure.__cause__ = error
                error = failure
            self._inbox.put(_Refusal(live.generation.request_id, error))
            self._backend.wake()

    def _enter(self, sequence: Sequence) -> None:
        """Give a request, now that it has its tokens, the room that it needs."""
        with self._gate.lock:
            live = self.live.get(sequence.request_id)
            if live is None:  # it ended while it was tokenised
                return
            if not self.n_ready:
                self.busy_since = self._clock()
            if self._backlog.enter(sequence):
                live.generation._entry.set()
                self._inbox.put(sequence)
                self._backend.wake()
            elif live.waits:
                self._backlog.stand_in_line(sequence)
            else:
                raise self._backlog.reject(len(self.live) - 1)

    # ------------------------------------------------------------- for who has the turn

    def arrived(self) -> Arrivals:
        """What is in the inbox; who was cancelled while it was prepared has not entered."""
        arrivals = Arrivals([], [], [])
        while not self._inbox.empty():
            match self._inbox.get():
                case _Refusal(request_id, error):
                    if request_id in self.live:
                        arrivals.refused.append(Event(request_id, error=error))
                case _Cancellation(request_id):
                    arrivals.cancelled.append(request_id)
                case sequence:
                    if sequence.request_id in self.live:
                        arrivals.entered.append(sequence)
        return arrivals

    def move_up(self) -> list[Sequence]:
        """Those from the line that enter now."""
        with self._gate.lock:
            entered = self._backlog.move_up()
        for sequence in entered:
            self.live[sequence.request_id].generation._entry.set()
        return entered

    def begin(self, admissions: Iterable[Admission]) -> None:
        """These have a sequence id, perhaps not for the first time."""
        with self._gate.lock:
            for admission in admissions:
                request_id = _name(admission.ticket)
                self._backlog.begin(request_id)
                self._timeouts.begin(request_id)

    def expired(self) -> list[str]:
        """Those whose time is over."""
        with self._gate.lock:
            return self._timeouts.expired(self._clock())

    def orphans(self) -> list[str]:
        """Those whose event loop has closed."""
        with self._gate.lock:
            # By references, which takes half as long: this is looked at before every exchange.
            mailboxes = [ref() for ref in self._mailboxes.valuerefs()]
            if not any(mailbox is not None and mailbox.closed for mailbox in mailboxes):
                return []
            return [request_id for request_id, live in self.live.items() if live.mailbox.closed]

    def until_timeout(self) -> float | None:
        """Seconds until somebody's time is over; ``None`` if nobody's ever is."""
        with self._gate.lock:
            at = self._timeouts.next
        return None if at == math.inf else max(0.0, at - self._clock())

    def withdrawn(self, request_id: str) -> Sequence:
        """The sequence of a request that the scheduler has not, to be ended at once."""
        with self._gate.lock:
            in_line = self._backlog.leave(request_id)
        return in_line or self.live[request_id].build(())

    def remove(self, request_id: str) -> Live:
        """A request has had its last event, or will have none: it counts no more."""
        with self._gate.lock:
            self._timeouts.remove(request_id)
            self._backlog.leave(request_id)
            return self.live.pop(request_id)

    def everyone(self) -> list[tuple[str, Live]]:
        """All that have not ended."""
        with self._gate.lock:  # nobody enters while we look
            return list(self.live.items())


def drawn_seed(params: SamplingParams) -> int:
    """The seed of these parameters, or a fresh one."""
    return secrets.randbits(32) if params.seed is None else params.seed


def _name(ticket: int) -> str:
    return f"req-{ticket}"


def _receive(parcel: list[tuple[Live, Event]]) -> None:
    """On the loop of all of these requests."""
    for live, event in parcel:
        live.generation._receive(event, followed=live.followed)
