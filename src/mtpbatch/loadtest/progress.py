"""How a run stands, while it runs: a line that changes on a terminal, else one now and then."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import anyio

from mtpbatch.loadtest.answer import Tally
from mtpbatch.loadtest.driver import Load, Run
from mtpbatch.loadtest.overhead import quantile

if TYPE_CHECKING:
    from rich.console import Console

_ON_TERMINAL: Final = 0.5  # seconds between lines
_PLAIN: Final = 5.0
_RECENT: Final = 1000  # requests whose first chunks are looked at


class Progress:
    """Words on a run, its speed since they were last asked for."""

    def __init__(self, tally: Tally, load: Load) -> None:
        self._tally = tally
        self._load = load
        self._then = (0.0, 0)

    def line(self, elapsed: float) -> str:
        """One line, so many seconds after the run began."""
        tally = self._tally
        then, tokens = self._then
        self._then = elapsed, tally.tokens
        speed = (tally.tokens - tokens) / (elapsed - then) if elapsed > then else 0.0
        n_requests = self._load.n_requests
        first = tally.first_chunks[-_RECENT:]
        ttft = f"{quantile(first, 0.5) * 1e3:.0f}/{quantile(first, 0.99) * 1e3:.0f} ms"
        left = self._left(elapsed)
        return "  ".join(
            (
                f"{elapsed:.0f} s",
                f"done {tally.ended}{'' if n_requests is None else f'/{n_requests}'}",
                f"running {tally.running}",
                f"waiting {tally.waiting}",
                f"errors {tally.errors.total()}",
                f"{speed:.0f} tok/s",
                f"TTFT p50/p99 {ttft if first else '?'}",
                f"ETA {'?' if left is None else f'{left:.0f} s'}",
            )
        )

    def _left(self, elapsed: float) -> float | None:
        """Seconds until all are sent and done, at the speed so far; None: nobody can tell."""
        load, ended = self._load, self._tally.ended
        left = []
        if load.n_requests is not None and ended:
            left.append(elapsed * (load.n_requests - ended) / ended)
        if load.seconds is not None:
            left.append(max(0.0, load.seconds - elapsed))
        return min(left, default=None)


async def show(run: Run, load: Load) -> None:
    """Tell on stderr how a run stands, until cancelled."""
    progress = Progress(run.tally, load)
    console = _console()
    if console is None:
        while True:
            await anyio.sleep(_PLAIN)
            print(progress.line(run.elapsed), file=sys.stderr, flush=True)
    from rich.live import Live
    from rich.text import Text

    # Not by a thread of rich's own, which would take the GIL from the client now and then.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            line = Text(progress.line(run.elapsed), overflow="ellipsis", no_wrap=True)
            live.update(line, refresh=True)
            await anyio.sleep(_ON_TERMINAL)


def _console() -> Console | None:
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=True)
