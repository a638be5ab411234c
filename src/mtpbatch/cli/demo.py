"""``mtpbatch demo``: eight prompts at once, live, and what drafting gained."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

from mtpbatch.engine import Engine
from mtpbatch.types import Delta

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PROMPTS = (
    "In the beginning",
    "And Moses said unto the children of Israel,",
    "And Jesus answered and said unto them,",
    "And it came to pass in those days, that",
    "class Server:\n    def __init__(self",
    '    def close(self):\n        """Close the',
    "import os\nimport sys\n\ndef main():\n",
    "def read_config(path):\n",
)
# A little chance keeps so small a model from going round in circles; the seed makes it the same
# text every time.
PARAMS: dict[str, Any] = {
    "max_tokens": 72,
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 3,
    "ignore_eos": True,
}
DEPTH = 3
# Left to itself the engine would soon stop drafting, for which this model is too small.
DRAFTED = PARAMS | {"speculation": DEPTH}
REPEATS = 5  # timed runs of each kind, taken in turn; the median counts


class Measurement(Struct, frozen=True):
    """One timed run of all prompts at once."""

    tokens: int
    tokens_per_step: float
    """Tokens that a sequence gains from one decode, on average."""
    tokens_per_second: float
    acceptance_by_depth: tuple[float, ...]
    """Share of the drafted tokens at each depth that were accepted; empty without drafts."""


async def demo() -> None:
    """Show the eight generations, then measure them with and without drafts."""
    async with Engine.open(n_seq=len(PROMPTS), n_draft_max=DEPTH) as engine:
        print(f"{engine!r}\n")
        if _rich_terminal():
            await _show_live(engine)
        else:
            await _show_plain(engine)
        _print_table(*await _measure(engine))


def _rich_terminal() -> bool:
    """Whether to draw: on a terminal, with the ``cli`` extra installed."""
    if not sys.stdout.isatty():
        return False
    try:
        import rich.live  # noqa: F401
    except ImportError:
        return False
    return True


async def _show_plain(engine: Engine) -> None:
    completions = await engine.generate_many(PROMPTS, **DRAFTED)
    for prompt, done in zip(PROMPTS, completions, strict=True):
        print(f"--- {done.accepted} of {done.drafted} drafted tokens accepted")
        print(f"{prompt}{done.text}\n")


# ------------------------------------------------------------------------------- live


class _Lane:
    """One prompt's rows on the screen: its text so far, by where each token came from."""

    def __init__(self, prompt: str, token_bytes: Sequence[bytes]) -> None:
        self._pieces = [(prompt, "dim")]
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, delta: Delta) -> None:
        for i, token in enumerate(delta.token_ids):
            style = "bold green" if i < delta.n_accepted else "default"
            self._pieces.append((self._decoder.decode(self._token_bytes[token]), style))

    def render(self, console: Console, n_rows: int) -> RenderableType:
        """The last rows of the text, line breaks shown as a sign."""
        from rich.console import Group
        from rich.text import Text

        text = Text()
        for piece, style in self._pieces:
            text.append(piece.replace("\n", "⏎"), style)
        return Group(*text.wrap(console, console.width)[-n_rows:])


async def _show_live(engine: Engine) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.rule import Rule

    console = Console()
    lanes = [_Lane(prompt, engine.token_bytes) for prompt in PROMPTS]
    legend = "[dim]prompt[/]   [bold green]accepted draft[/]   sampled by the model"

    def screen() -> RenderableType:
        n_rows = max(1, (console.height - 2) // len(lanes) - 1)
        rows: list[RenderableType] = [legend]
        for lane in lanes:
            rows += [Rule(style="dim"), lane.render(console, n_rows)]
        return Group(*rows)

    async def follow(lane: _Lane, prompt: str) -> None:
        async with engine.stream(prompt, **DRAFTED) as deltas:
            async for delta in deltas:
                lane.add(delta)
                # The demo model outruns the eye: let each step be seen.
                await anyio.sleep(0.04)

    with Live(get_renderable=screen, console=console, refresh_per_second=25):
        async with anyio.create_task_group() as tasks:
            for lane, prompt in zip(lanes, PROMPTS, strict=True):
                tasks.start_soon(follow, lane, prompt)
    console.print()


# --------------------------------------------------------------------------- measured


async def _measure(engine: Engine) -> tuple[Measurement, Measurement]:
    """With drafts and without, in turn, nothing drawn meanwhile; of each the median run."""
    drafted, plain = [], []
    for _ in range(REPEATS):
        drafted.append(await _run(engine, DEPTH))
        plain.append(await _run(engine, 0))
    drafted, plain = (
        sorted(runs, key=lambda run: run.tokens_per_second) for runs in (drafted, plain)
    )
    return drafted[REPEATS // 2], plain[REPEATS // 2]


async def _run(engine: Engine, depth: int) -> Measurement:
    before = engine.stats()
    begin = time.perf_counter()
    completions = await engine.generate_many(PROMPTS, speculation=depth, **PARAMS)
    seconds = time.perf_counter() - begin
    after = engine.stats()
    tokens = sum(len(done.token_ids) for done in completions)
    return Measurement(
        tokens,
        tokens / sum(done.steps for done in completions),
        tokens / seconds,
        tuple(
            (after.accepted_by_depth[d] - before.accepted_by_depth[d])
            / (after.drafted_by_depth[d] - before.drafted_by_depth[d])
            for d in range(depth)
        ),
    )


def _print_table(drafted: Measurement, plain: Measurement) -> None:
    by_depth = "  ".join(f"{share:.0%}" for share in drafted.acceptance_by_depth)
    ratio = drafted.tokens_per_second / plain.tokens_per_second
    rows = (
        ("", f"drafting {DEPTH}", "no drafts"),
        ("tokens", f"{drafted.tokens}", f"{plain.tokens}"),
        ("tokens per step", f"{drafted.tokens_per_step:.2f}", f"{plain.tokens_per_step:.2f}"),
        ("accepted at depth 1, 2, 3", by_depth, ""),
        ("tokens/s", f"{drafted.tokens_per_second:.0f}", f"{plain.tokens_per_second:.0f}"),
    )
    print(f"{len(PROMPTS)} prompts at once, medians of {REPEATS} runs of each kind in turn")
    for name, left, right in rows:
        print(f"  {name:<28}{left:>16}{right:>12}".rstrip())
    print(
        f"  drafting / no drafts: {ratio:.2f} in tokens/s. Drafting pays where a decode of the "
        f"model costs far more\n  than a draft, which it does not in this model of four tiny "
        f"layers; tokens per step is what carries over."
    )
