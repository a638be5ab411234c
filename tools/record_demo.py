"""Record what a command shows on a terminal, as an animated SVG for the README.

    python tools/record_demo.py             # mtpbatch demo, to docs/images/demo.svg
    python tools/record_demo.py --output FILE.svg -- COMMAND …

The command runs on a pseudo-terminal of its own and all that it writes is kept with its time; long
waits are shortened. The SVG needs no script: it plays in a loop wherever images are shown, in light
and dark. It stands still, on the last screen, where a browser lets images know that its user wants
no motion. Needs pyte (the extra ``test``).
"""

from __future__ import annotations

import argparse
import fcntl
import html
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"
COLUMNS, ROWS = 106, 34
FRAME = 0.16  # seconds: what changes more often is not shown
SETTLED = 0.5  # seconds without output: the screen is complete
REDRAW = re.compile(
    rb"(?=\r\x1b\[2K\x1b\[1A)"
)  # how rich begins to draw anew: what stood was complete
LONGEST_WAIT = 1.0  # seconds: longer ones are cut to this
LAST_SCREEN = 6.0  # seconds that the end stays

WIDE, HIGH, SIZE = 8.2, 17.5, 13.5  # of a character cell, and its font, in pixels
MARGIN, TITLE = 14, 34

# Of the terminal's colours those that the commands use; others are shown as ordinary text.
LIGHT = {"paper": "#ffffff", "edge": "#d0d7de", "ink": "#1f2328", "dim": "#818b98"}
DARK = {"paper": "#0d1117", "edge": "#3d444d", "ink": "#e6edf3", "dim": "#7d8590"}
LIGHT |= {"green": "#1a7f37", "red": "#cf222e", "blue": "#0969da"}
DARK |= {"green": "#3fb950", "red": "#ff7b72", "blue": "#58a6ff"}


@dataclass(frozen=True)
class Piece:
    """Characters of a row that look alike."""

    column: int
    text: str
    colour: str
    bold: bool


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class Shown:
    """A row's content, and from when until when it stands there."""

    row: int
    pieces: Row
    begin: float
    end: float


def written(command: Sequence[str], columns: int, rows: int) -> Iterator[tuple[float, bytes]]:
    """What a command writes to a terminal of this size, in the pieces it comes in, each with the
    seconds since the one before."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    with subprocess.Popen(
        command, stdin=secondary, stdout=secondary, stderr=secondary, env=environment
    ) as process:
        os.close(secondary)
        last = time.monotonic()
        while True:
            try:
                chunk = os.read(primary, 65536)
            except OSError:  # on Linux: the other end was closed
                break
            if not chunk:
                break
            now = time.monotonic()
            yield now - last, chunk
            last = now
        os.close(primary)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")


def frames(chunks: Iterator[tuple[float, bytes]], columns: int, rows: int) -> list[list[Row]]:
    """The screen at each tick of ``FRAME``, as it was when it was last complete."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    taken: list[list[Row]] = []
    now = 0.0
    rest = b""

    def take() -> None:
        while len(taken) * FRAME <= now:
            taken.append(_rows(screen))

    for i, (waited, chunk) in enumerate(chunks):
        if i > 0:  # it begins with the first output
            now += min(waited, LONGEST_WAIT)
            if waited >= SETTLED:
                take()
        text = rest + chunk
        whole = re.sub(rb"(\r|\r?\x1b(\[[\d;]*)?|\r\x1b\[2K[\x1b\[]*)\Z", b"", text)
        rest = text[len(whole) :]  # the begin of a sequence whose end comes next
        before, *drawn = REDRAW.split(whole)
        stream.feed(_with_dim(before))
        for each in drawn:
            take()
            stream.feed(_with_dim(each))
    stream.feed(_with_dim(rest))
    taken.append(_rows(screen))
    return taken


def _with_dim(output: bytes) -> bytes:
    """Dim text as dark grey, since pyte knows the one and not the other."""

    def grey(match: re.Match[bytes]) -> bytes:
        return b"\x1b[" + re.sub(rb"(?<![\d;])2(?![\d;])", b"90", match[1]) + b"m"

    return re.sub(rb"\x1b\[([\d;]*)m", grey, output)


def _rows(screen: pyte.Screen) -> list[Row]:
    return [_pieces(screen, row) for row in range(screen.lines)]


def _pieces(screen: pyte.Screen, row: int) -> Row:
    pieces: list[Piece] = []
    for column in range(screen.columns):
        cell = screen.buffer[row][column]
        colour = {"brightblack": "dim"}.get(cell.fg, cell.fg)
        colour = colour if colour in LIGHT else "ink"
        if pieces and (pieces[-1].colour, pieces[-1].bold) == (colour, cell.bold):
            before = pieces[-1]
            pieces[-1] = Piece(before.column, before.text + cell.data, colour, cell.bold)
        else:
            pieces.append(Piece(column, cell.data, colour, cell.bold))
    return tuple(piece for piece in pieces if piece.text.strip())


def spans(taken: Sequence[Sequence[Row]]) -> list[Shown]:
    """What stands where and how long, so that a row that stays is written once."""
    shown: list[Shown] = []
    for row in range(len(taken[0])):
        begin = 0
        for i in range(1, len(taken) + 1):
            if i == len(taken) or taken[i][row] != taken[begin][row]:
                if taken[begin][row]:
                    last = i == len(taken)
                    end = i * FRAME + (LAST_SCREEN if last else 0)
                    shown.append(Shown(row, taken[begin][row], begin * FRAME, end))
                begin = i
    return shown


def svg(shown: Sequence[Shown], title: str, columns: int, rows: int) -> str:
    """An image in which each row stands while it stood on the terminal."""
    seconds = max(each.end for each in shown)
    width, height = 2 * MARGIN + columns * WIDE, TITLE + MARGIN + rows * HIGH
    times = sorted({(each.begin, each.end) for each in shown})
    names = {span: f"k{i}" for i, span in enumerate(times)}
    css = [
        f":root{{{_colours(LIGHT)}}}",
        f"@media(prefers-color-scheme:dark){{:root{{{_colours(DARK)}}}}}",
        f"text{{font:{SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',"
        "monospace;white-space:pre}",
        f".s{{visibility:hidden;animation:{seconds:.2f}s step-end infinite}}.last"
        "{visibility:visible}",
        *(f".{name}{{animation-name:{name}}}" for name in names.values()),
        *(_keyframes(names[span], *span, seconds) for span in times),
        "@media(prefers-reduced-motion:reduce){.s{animation:none}}",
        *(f".{name}{{fill:var(--{name})}}" for name in LIGHT),
        ".b{font-weight:700}",
    ]
    body = []
    for each in shown:
        kind = "s last" if each.end == seconds else "s"
        pieces = "".join(_text(piece, each.row) for piece in each.pieces)
        body.append(f'<g class="{kind} {names[each.begin, each.end]}">{pieces}</g>')
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img">',
            f"<title>{html.escape(title)}</title>",
            "<style>" + "\n".join(css) + "</style>",
            f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8" '
            'style="fill:var(--paper);stroke:var(--edge)"/>',
            f'<text x="{MARGIN}" y="23" class="dim">$ <tspan class="ink b">'
            f"{html.escape(title)}</tspan></text>",
            *body,
            "</svg>\n",
        )
    )


def _colours(scheme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in scheme.items())


def _keyframes(name: str, begin: float, end: float, seconds: float) -> str:
    first = "visible" if begin == 0 else "hidden"
    steps = f"0%{{visibility:{first}}}"
    if begin:
        steps += f"{100 * begin / seconds:.2f}%{{visibility:visible}}"
    if end < seconds:
        steps += f"{100 * end / seconds:.2f}%{{visibility:hidden}}"
    return f"@keyframes {name}{{{steps}}}"


def _text(piece: Piece, row: int) -> str:
    text = piece.text.rstrip()
    column = piece.column + len(text) - len(text.lstrip())
    text = text.lstrip()
    x, y = MARGIN + column * WIDE, TITLE + (row + 0.75) * HIGH
    bold = " b" if piece.bold else ""
    # Whatever font there is, columns stay where they were.
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" textLength="{len(text) * WIDE:.1f}" '
        f'class="{piece.colour}{bold}">{html.escape(text, quote=False)}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("command", nargs="*", default=["mtpbatch", "demo"], metavar="COMMAND")
    options = parser.parse_args()
    size = options.columns, options.rows
    taken = frames(written(options.command, *size), *size)
    options.output.write_text(svg(spans(taken), " ".join(options.command), *size))
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB, {len(taken)} frames")


if __name__ == "__main__":
    main()
