"""What the live page shows of an engine, put together while somebody looks.

Reports come on the engine's thread, as often as it steps; there they are only laid aside. Ten times
a second the viewers' event loop makes one frame of them, for all viewers, so that what the page
costs depends neither on how fast steps are nor on how many look. Viewers fetch frames when they
are ready for them: nobody keeps any for one that is slow. With the last viewer the watching ends.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from mtpbatch.engine import Engine
from mtpbatch.exceptions import (
    EngineDeadError,
    EngineError,
    EngineStalledError,
    NativeDiedError,
)
from mtpbatch.types import EngineStats, StepReport
from mtpbatch.watching import RequestAdmitted, RequestEnded

INTERVAL: Final = 0.1  # seconds from frame to frame
_DUE: Final = 0.9 * INTERVAL  # viewers do not wake up to the millisecond
_SLOT: Final = 0.025  # seconds: on a screen that shows 20 of them, less is no wider than a pixel
_MOST_NOTES: Final = 2048  # that wait for a frame; if that is late, the oldest are left out
_KEPT_FRAMES: Final = 20  # who is further behind leaves some out

State: TypeAlias = Literal["serving", "stalled", "restarting", "draining", "closed", "dead"]


class Part(Struct, array_like=True, gc=False):
    """What a slot's steps did for one request."""

    seq_id: int
    request_id: str
    n_steps: int = 0
    n_prompt: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_generated: int = 0
    n_tokens: int = 0
    """Tokens that it holds by then."""


class Slot(Struct, array_like=True):
    """One step, or as many in a row as began within some milliseconds."""

    begin: int
    end: int
    parts: list[Part]


class Setup(Struct, frozen=True):
    """What a page is laid out by."""

    feed: str
    """Another one, another server: nothing goes on from what was told before."""
    n_draft_max: int
    snapshot_limit: int
    """Bytes of host memory that snapshots may take."""


class Frame(Struct, frozen=True, omit_defaults=True):
    """What happened in a tenth of a second. Times are milliseconds since the feed was made."""

    now: int
    state: State
    stats: EngineStats | None
    """None once the engine is dead."""
    setup: Setup | None = None
    """Only in the first frame of a viewer, and in the next one after it has missed some; these
    tell of all lanes."""
    lanes: dict[int, RequestAdmitted | None] = {}
    """By sequence id, who has got one, or that nobody has it any more."""
    slots: list[Slot] = []
    ends: dict[str, str] = {}
    """By request id, why a request has given up its sequence id: its finish reason, or "paused"."""


class _Left(Struct, frozen=True, gc=False):
    request_id: str
    reason: str


_Note: TypeAlias = RequestAdmitted | StepReport | _Left


class _Notebook:
    """A watcher that lays aside what it is told, a bounded number of notes."""

    def __init__(self) -> None:
        self._notes: deque[_Note] = deque(maxlen=_MOST_NOTES)

    def admitted(self, request: RequestAdmitted) -> None:
        self._notes.append(request)

    def paused(self, request_id: str) -> None:
        self._notes.append(_Left(request_id, "paused"))

    def stepped(self, report: StepReport) -> None:
        self._notes.append(report)

    def ended(self, request: RequestEnded) -> None:
        reason = "error" if request.completion is None else request.completion.finish_reason
        self._notes.append(_Left(request.request_id, reason))

    def take(self) -> list[_Note]:
        """What was noted since the last time, from another thread than the engine's."""
        taken: list[_Note] = []
        with suppress(IndexError):
            while len(taken) < _MOST_NOTES:  # else one that never stops writing would be read on
                taken.append(self._notes.popleft())
        return taken


class Feed:
    """An engine's frames, for all who look. All calls belong to one event loop.

    State: ``_notebook`` is on the engine until ``_watching`` is closed, while there are viewers.
    ``_runs`` are the requests that have a sequence id, by it, as far as frames have told.
    ``_frames`` are the last of ``_n_frames`` frames, encoded; the newest was made at ``_made``.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: the engine's."""
        self._engine = engine
        self._clock = clock
        self._start = clock()
        self._name = secrets.token_hex(8)
        self._n_viewers = 0
        self._watching = ExitStack()
        self._notebook = _Notebook()
        self._runs: dict[int, RequestAdmitted] = {}
        self._frames: deque[bytes] = deque(maxlen=_KEPT_FRAMES)
        self._n_frames = 0
        self._made = -math.inf

    @property
    def over(self) -> bool:
        """Whether nothing more can come of the engine: it is closed or dead, or has drained."""
        state, stats = self._look()
        drained = state == "draining" and stats is not None and not stats.running + stats.waiting
        return drained or state in ("closed", "dead")

    @contextmanager
    def viewer(self) -> Iterator[Viewer]:
        """Look on, until the block is left."""
        if not self._n_viewers:
            self._notebook = _Notebook()
            self._runs.clear()
            with suppress(EngineError):  # where the engine has ended, frames say so
                self._watching.enter_context(self._engine.watch(self._notebook))
        self._n_viewers += 1
        try:
            yield Viewer(self)
        finally:
            self._n_viewers -= 1
            if not self._n_viewers:
                self._watching.close()

    def _take(self, n_taken: int | None) -> tuple[int, list[bytes]]:
        """How many frames there have been, and those that a viewer has not taken yet, which has
        had the first ``n_taken``, or none at all. If it has missed some, it begins again."""
        now = self._clock()
        if now - self._made >= _DUE:
            self._made = now
            self._frames.append(msgspec.json.encode(self._frame()))
            self._n_frames += 1
        if n_taken is None or self._n_frames - n_taken > len(self._frames):
            return self._n_frames, [msgspec.json.encode(self._first_frame())]
        n_old = len(self._frames) - (self._n_frames - n_taken)
        return self._n_frames, list(islice(self._frames, n_old, None))

    def _frame(self) -> Frame:
        lanes: dict[int, RequestAdmitted | None] = {}
        ends: dict[str, str] = {}
        reports: list[StepReport] = []
        for note in self._notebook.take():
            if isinstance(note, StepReport):
                reports.append(note)
            elif isinstance(note, RequestAdmitted):
                for seq_id in self._vacate(note.request_id):  # it has moved
                    lanes[seq_id] = None
                self._runs[note.seq_id] = lanes[note.seq_id] = note
            else:
                for seq_id in self._vacate(note.request_id):
                    lanes[seq_id] = None
                    ends[note.request_id] = note.reason
        return Frame(
            self._milliseconds(self._clock()),
            *self._look(),
            lanes=lanes,
            slots=slots(reports, self._milliseconds),
            ends=ends,
        )

    def _first_frame(self) -> Frame:
        facts, config = self._engine.model, self._engine.config
        return Frame(
            self._milliseconds(self._clock()),
            *self._look(),
            setup=Setup(self._name, facts.n_draft_max, config.snapshot_memory << 20),
            lanes={seq_id: self._runs.get(seq_id) for seq_id in range(facts.n_seq)},
        )

    def _vacate(self, request_id: str) -> list[int]:
        """The sequence id that a request has given up, if it had one."""
        vacated = [s for s, run in self._runs.items() if run.request_id == request_id]
        for seq_id in vacated:
            del self._runs[seq_id]
        return vacated

    def _look(self) -> tuple[State, EngineStats | None]:
        """How the engine is, and its figures."""
        engine = self._engine
        try:
            stats = engine.stats()
        except EngineDeadError:
            return "dead", None
        if engine.closed:
            return "closed", stats
        try:
            engine.check_health()
        except EngineStalledError:
            return "stalled", stats
        except NativeDiedError:
            return "restarting", stats
        except EngineError:  # since a moment ago
            return "closed", stats
        return ("draining" if engine.draining else "serving"), stats

    def _milliseconds(self, at: float) -> int:
        return round(1000 * (at - self._start))


class Viewer:
    """One who looks at a feed."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._n_taken: int | None = None

    def take(self) -> list[bytes]:
        """The frames since the last time, in JSON; some are left out if that is long ago."""
        self._n_taken, frames = self._feed._take(self._n_taken)
        return frames


def slots(reports: Iterable[StepReport], milliseconds: Callable[[float], int]) -> list[Slot]:
    """Steps on a time line, the parts of those added up that began within the same slot.

    Reports say when results were taken in, which is when the step ended or, where results come
    together, later: then each ended before the next one began.
    """
    spans: list[tuple[float, float, StepReport]] = []
    latest = math.inf
    for report in reversed(list(reports)):
        end = min(report.at, latest)
        begin = end - report.draft_time - report.target_time - report.sample_time
        latest = begin - report.gap_time
        spans.append((begin, end, report))

    found: list[Slot] = []
    parts: dict[tuple[int, str], Part] = {}
    slot_end = -math.inf
    for begin, end, report in reversed(spans):
        if begin >= slot_end:
            slot_end = begin + _SLOT
            parts = {}
            found.append(Slot(milliseconds(begin), 0, []))
        found[-1].end = milliseconds(end)
        for step in report.sequences:
            part = parts.get((step.seq_id, step.request_id))
            if part is None:
                part = parts[step.seq_id, step.request_id] = Part(step.seq_id, step.request_id)
                found[-1].parts.append(part)
            part.n_steps += 1
            part.n_prompt += step.n_prompt
            part.n_drafted += step.n_drafted
            part.n_accepted += step.n_accepted
            part.n_generated += step.n_generated
            part.n_tokens = step.n_tokens
    return found
