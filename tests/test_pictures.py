"""The pictures of the documentation: up to date, and what the tools behind them do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

import drawings
import record_demo
from drawings import DRAWINGS, IMAGES, Drawing, measured

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_each_drawing_is_the_one_its_script_makes(draw: Callable[[], Drawing]) -> None:
    path = IMAGES / f"{draw.__name__}.svg"
    assert path.read_text() == draw().svg(), "run: python tools/drawings.py"


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.svg")), ids=lambda path: path.name)
def test_each_says_what_it_shows_and_has_colours_for_light_and_dark(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    title, style = root.find(f"{SVG}title"), root.find(f"{SVG}style")
    assert title is not None
    assert title.text
    assert style is not None
    assert "prefers-color-scheme:dark" in (style.text or "")
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")


def test_the_throughput_is_that_of_the_table() -> None:
    page = (drawings.DOCS / "performance.md").read_text()
    heading = "The wide model (all compute)"
    line = next(
        line
        for line in page.split(heading)[1].splitlines()
        if line.startswith("| mtpbatch, depth 3, split cache |")
    )
    shown = measured(page, heading)["mtpbatch, depth 3, split cache"]
    cells = " | ".join(f"{m:.0f} ({low:.0f} to {high:.0f})" for m, low, high in shown)
    assert line == f"| mtpbatch, depth 3, split cache | {cells} |"
    with pytest.raises(ValueError, match="no median"):
        measured(page.replace(line, line.replace("(", "[")), heading)


# --------------------------------------------------------------------------- recordings


def screen(rows: list[record_demo.Row]) -> list[str]:
    """What stands in each row."""
    lines = []
    for pieces in rows:
        line = ""
        for piece in pieces:
            line = line.ljust(piece.column) + piece.text
        lines.append(line.rstrip())
    return lines


def test_a_recording_has_what_was_on_the_screen_and_how_long() -> None:
    chunks = [
        (5.0, b"$ start\r\n"),  # waiting for the first output is no part of it
        (0.6, b"one \x1b[1;32mtw"),
        (0.0, b"o\x1b[0"),  # a sequence in two pieces
        (0.0, b"m \x1b[2mthree\x1b[0m\r\n"),
        (3.0, b"done"),
    ]
    taken = record_demo.frames(iter(chunks), columns=20, rows=4)
    assert screen(taken[0])[:2] == ["$ start", ""]
    assert screen(taken[-1])[:3] == ["$ start", "one two three", "done"]
    looks = [(p.text.strip(), p.colour, p.bold) for p in taken[-1][1]]
    assert looks == [("one", "ink", False), ("two", "green", True), ("three", "dim", False)]

    shown = record_demo.spans(taken)
    start, line, done = sorted(shown, key=lambda each: each.row)
    assert start.begin == 0
    assert line.begin == pytest.approx(0.6, abs=2 * record_demo.FRAME)
    wait = min(3.0, record_demo.LONGEST_WAIT)
    assert done.begin - line.begin == pytest.approx(wait, abs=2 * record_demo.FRAME)
    assert (
        start.end
        == line.end
        == done.end
        == len(taken) * record_demo.FRAME + (record_demo.LAST_SCREEN)
    )


def test_no_frame_is_taken_while_rich_draws_anew() -> None:
    redraw = b"\r\x1b[2K\x1b[1A\x1b[2K"
    chunks = [(0.0, b"a 1\nb 1\r\n")]
    for i in range(2, 9):
        chunks += [(0.4, redraw + b"\x1b[1A\x1b[2Ka %d" % i), (0.4, b"\r\nb %d\r\n" % i)]
    taken = record_demo.frames(iter(chunks), columns=10, rows=4)
    seen = [screen(rows)[:2] for rows in taken]
    assert len({tuple(lines) for lines in seen}) > 4
    for a, b in seen:
        assert a.split()[1:] == b.split()[1:]


def test_a_program_is_recorded_as_an_image_that_any_browser_reads(tmp_path: Path) -> None:
    program = "print('\\x1b[1;32m<accepted>\\x1b[0m & more')"
    command = [sys.executable, "-c", program]
    taken = record_demo.frames(record_demo.written(command, 30, 5), 30, 5)
    path = tmp_path / "program.svg"
    path.write_text(record_demo.svg(record_demo.spans(taken), "python & co", 30, 5))
    texts = [element.text for element in ElementTree.parse(path).iter(f"{SVG}text")]
    assert texts[1:] == ["<accepted>", "& more"]


def test_a_program_that_fails_makes_no_recording() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="exit status 3"):
        list(record_demo.written(command, 30, 5))
