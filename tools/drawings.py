"""The drawings of the documentation, as SVG that is readable in light and in dark.

    python tools/drawings.py

writes ``docs/images/drafting.svg``, ``step.svg``, ``lossless.svg``, ``costs.svg`` and
``throughput.svg``. The last one is drawn from the tables of ``docs/performance.md``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mtpbatch.testing import StepCost

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"

# Each drawing brings its own paper: whatever page it stands on, ink and paper go together.
LIGHT = {
    "paper": "#ffffff",
    "edge": "#d0d7de",
    "ink": "#1f2328",
    "soft": "#59636e",
    "given": "#eaeef2",
    "model": "#ddf4ff",
    "model-line": "#0969da",
    "head": "#fbefff",
    "head-line": "#8250df",
    "good": "#dafbe1",
    "good-line": "#1a7f37",
    "bad": "#ffebe9",
    "bad-line": "#cf222e",
}
DARK = {
    "paper": "#0d1117",
    "edge": "#3d444d",
    "ink": "#f0f6fc",
    "soft": "#9198a1",
    "given": "#262c36",
    "model": "#0c2d6b",
    "model-line": "#58a6ff",
    "head": "#2e1760",
    "head-line": "#bc8cff",
    "good": "#0f3d1c",
    "good-line": "#3fb950",
    "bad": "#5d1a1c",
    "bad-line": "#ff7b72",
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"

Anchor = Literal["start", "middle", "end"]


def _colours(scheme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in scheme.items())


@dataclass
class Drawing:
    """Shapes on a paper of its own, written in the order in which they are drawn."""

    width: int
    height: int
    about: str
    """What it shows, in words, for those who cannot see it."""
    shapes: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        colour: str = "ink",
        size: float = 15,
        anchor: Anchor = "middle",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"{weight} '
            f'style="fill:var(--{colour})">{html.escape(words, quote=False)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        *,
        fill: str = "given",
        line: str = "edge",
        size: float = 15,
        dashed: bool = False,
        bold: bool = False,
    ) -> None:
        """A box, with words in its middle."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"{dashes} '
            f'style="fill:var(--{fill});stroke:var(--{line})"/>'
        )
        if words:
            middle = y + height / 2 + size * 0.35
            self.text(x + width / 2, middle, words, size=size, bold=bold)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = "soft",
        width: float = 1.5,
        arrow: bool = False,
        dashed: bool = False,
    ) -> None:
        """A line through points, with an arrow's head at its end if wanted."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        head = f' marker-end="url(#{colour})"' if arrow else ""
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke-width="{width:g}"{dashes}{head} '
            f'style="stroke:var(--{colour})"/>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = "soft") -> None:
        self.line(points, colour=colour, arrow=True)

    def dot(self, x: float, y: float, *, colour: str, radius: float = 4) -> None:
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" style="fill:var(--{colour})"/>'
        )

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{colour}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" '
            f'style="fill:var(--{colour})"/></marker>'
            for colour in LIGHT
            if any(f"url(#{colour})" in shape for shape in self.shapes)
        )
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" font-family="{FONT}">',
                f"<title>{html.escape(self.about, quote=False)}</title>",
                f"<style>:root{{{_colours(LIGHT)}}}",
                f"@media(prefers-color-scheme:dark){{:root{{{_colours(DARK)}}}}}</style>",
                f"<defs>{heads}</defs>",
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" '
                'style="fill:var(--paper);stroke:var(--edge)"/>',
                *self.shapes,
                "</svg>\n",
            )
        )


# --------------------------------------------------------------------------- drafting


def drafting() -> Drawing:
    """One sequence drafts and verifies: a step of the demo model as it really was."""
    # Greedy, 32-bit floats, after "And Jesus answered and said unto them, What is this that".
    last, drafts = "thou", ("hast", "done", ",")
    d = Drawing(
        620,
        430,
        "The MTP head drafts three tokens, one after the other, from the model's hidden row and "
        "the token before each. The model checks all of them in one decode and agrees with two; "
        "the token it says in place of the third is kept as well.",
    )
    d.text(170, 33, "… What is this that", anchor="end", colour="soft")
    d.box(178, 14, 66, 28, last, fill="good", line="good-line", bold=True)
    d.text(254, 33, "sampled in the step before", anchor="start", colour="soft", size=13)

    d.text(20, 78, "1  The head drafts, token by token", anchor="start", bold=True)
    tops = [last, *drafts]
    for i, x in enumerate((95, 270, 445)):
        d.box(x, 92, 120, 28, tops[i], fill="good" if i == 0 else "head", line="head-line")
        d.box(x, 140, 120, 36, "MTP head", fill="head", line="head-line", bold=True)
        d.arrow((x + 60, 121), (x + 60, 138), colour="head-line")
        d.box(x, 196, 120, 28, drafts[i], fill="head", line="head-line", dashed=True)
        d.arrow((x + 60, 177), (x + 60, 194), colour="head-line")
        if i < 2:
            d.arrow((x + 121, 158), (x + 173, 158), colour="head-line")
            d.text(x + 122, 134, "hidden", size=12, colour="soft", anchor="start")
            d.text(x + 122, 150, "row", size=12, colour="soft", anchor="start")
            over = x + 164  # and up to the next one's token
            d.arrow((x + 121, 210), (over, 210), (over, 106), (x + 173, 106), colour="head-line")
    d.arrow((16, 158), (93, 158), colour="model-line")
    d.text(14, 150, "hidden row", size=12, colour="soft", anchor="start")
    d.text(14, 176, "of the", size=12, colour="soft", anchor="start")
    d.text(14, 191, "model", size=12, colour="soft", anchor="start")

    d.text(20, 260, "2  The model reads all four in one decode", anchor="start", bold=True)
    said = ("hast", "done", "?", "")
    d.box(20, 314, 580, 36, "the model: one decode, four rows", fill="model", line="model-line")
    for i, x in enumerate((30, 175, 320, 465)):
        d.box(x, 272, 125, 28, tops[i], fill="good" if i == 0 else "head", line="head-line")
        d.arrow((x + 62, 301), (x + 62, 312), colour="model-line")
        if said[i]:
            kept = "good" if i < 2 else "model"
            d.arrow((x + 62, 351), (x + 62, 362), colour="model-line")
            d.box(x, 364, 125, 28, said[i], fill=kept, line=f"{kept}-line", bold=True)
    d.text(92, 414, "= draft: kept ✓", size=13, colour="good-line")
    d.text(237, 414, "= draft: kept ✓", size=13, colour="good-line")
    d.text(382, 414, "≠ “,”: the model's", size=13, colour="bad-line")
    d.text(527, 382, "rests on a wrong “,”:", size=13, colour="soft")
    d.text(527, 399, "taken back ✗", size=13, colour="bad-line")
    return d


# ------------------------------------------------------------------------------- step


def step() -> Drawing:
    """One step of four sequences that want different things."""
    d = Drawing(
        620,
        500,
        "One step of four sequences. Two of them draft, three and one tokens deep; a third does "
        "not draft; a fourth is in the middle of its prompt. One decode of the model takes the "
        "rows of all four. Drafts that the model agrees with are kept, the others taken back.",
    )
    left, row, gap = 118, 24, 8
    lanes = ((88, "A"), (128, "B"), (168, "C"), (208, "D"))

    def cells(x: float, y: float, marks: str) -> None:
        looks = {
            "l": ("good", "good-line", ""),
            "d": ("head", "head-line", ""),
            "p": ("given", "soft", ""),
        }
        for i, mark in enumerate(marks):
            fill, line, words = looks[mark]
            d.box(x + i * (row + gap), y, row, row, words, fill=fill, line=line)

    d.text(20, 32, "1  Draft", anchor="start", bold=True)
    d.text(20, 52, "one decode of the MTP head for each depth,", anchor="start", size=13)
    d.text(20, 69, "for all sequences that go so deep", anchor="start", size=13)
    notes = ("drafts 3", "drafts 1", "drafts 0", "prompt")
    for (y, name), note in zip(lanes, notes, strict=True):
        d.text(20, y + 17, name, anchor="start", bold=True)
        d.text(38, y + 17, note, anchor="start", size=13, colour="soft")
    for i, lane_count in enumerate((2, 1, 1)):
        x = left + (i + 1) * (row + gap) - 3
        height = 36 if lane_count == 1 else 76
        d.box(x, 82, row + 6, height, fill="paper", line="head-line", dashed=True)
    cells(left, 88, "lddd")
    cells(left, 128, "ld")
    cells(left, 168, "l")
    cells(left, 208, "pppp")

    d.text(326, 32, "2  One decode of the model", anchor="start", bold=True)
    d.text(326, 52, "all rows of all sequences: the weights", anchor="start", size=13)
    d.text(326, 69, "are read once for eleven rows", anchor="start", size=13)
    d.box(320, 82, 280, 156, fill="model", line="model-line")
    for (y, _), marks in zip(lanes, ("lddd", "ld", "l", "pppp"), strict=True):
        d.arrow((left + 4 * (row + gap) + 6, y + 12), (318, y + 12))
        cells(404, y, marks)

    d.arrow((460, 239), (460, 268), colour="model-line")
    d.text(326, 290, "3  Sample each row, compare", anchor="start", bold=True)
    outcomes = {
        "A": ("✓✓+✗", "2 drafts + 1 sampled = 3 tokens"),
        "B": ("✓+", "1 draft + 1 sampled = 2 tokens"),
        "C": ("+", "1 sampled = 1 token"),
        "D": ("", "4 tokens of its prompt are read"),
    }
    fills = {"✓": "good", "+": "model", "✗": "bad"}
    for y, (name, (marks, words)) in zip((308, 344, 380, 416), outcomes.items(), strict=True):
        d.text(332, y + 17, name, anchor="start", bold=True)
        for i, mark in enumerate(marks):
            fill = fills[mark]
            d.box(356 + i * (row + gap), y, row, row, mark, fill=fill, line=f"{fill}-line")
        if not marks:
            d.text(356, y + 17, "nothing to sample yet", anchor="start", size=13, colour="soft")
        d.text(20, y + 17, name, anchor="start", bold=True)
        d.text(42, y + 17, words, anchor="start", size=14)
    d.text(20, 290, "4  What each sequence gains", anchor="start", bold=True)
    d.line(((304, 276), (304, 440)), colour="edge")

    keys = (
        ("good", "good-line", "last token; kept draft"),
        ("head", "head-line", "draft"),
        ("given", "soft", "prompt"),
        ("bad", "bad-line", "taken back"),
        ("model", "model-line", "sampled by the model"),
    )
    at = 20.0
    for fill, line, words in keys:
        d.box(at, 464, 14, 14, fill=fill, line=line)
        d.text(at + 20, 476, words, anchor="start", size=12, colour="soft")
        at += 40 + 6.1 * len(words)
    return d


# --------------------------------------------------------------------------- lossless


def lossless() -> Drawing:
    """The same random numbers for the same positions, with drafts and without."""
    d = Drawing(
        620,
        392,
        "Without drafts three decodes sample tokens a, b and c with the random numbers u1, u2 and "
        "u3. With drafts one decode has the rows of all three positions; each is sampled with the "
        "random number of its position, and drafts are kept only as long as they equal what was "
        "sampled. So the tokens are the same.",
    )
    d.text(20, 32, "Without drafts: three decodes", anchor="start", bold=True)
    names = ("a", "b", "c")
    reads = ("…", "a", "b")
    for i, x in enumerate((30, 225, 420)):
        line = "good-line" if i else "soft"
        d.box(x, 48, 40, 32, reads[i], fill="good" if i else "given", line=line)
        d.arrow((x + 41, 64), (x + 58, 64))
        d.box(x + 60, 48, 58, 32, "decode", fill="model", line="model-line", size=13)
        d.arrow((x + 119, 64), (x + 136, 64))
        d.box(x + 138, 48, 36, 32, names[i], fill="good", line="good-line", bold=True)
        d.text(x + 174, 100, f"sampled with u{i + 1}", size=12, colour="soft", anchor="end")

    d.text(20, 142, "With drafts a, b, x: one decode", anchor="start", bold=True)
    d.box(20, 204, 580, 32, "one decode, a row for each position", fill="model", line="model-line")
    drafts = ("…", "draft a", "draft b", "draft x")
    for i, x in enumerate((30, 175, 320, 465)):
        fill, line = ("head", "head-line") if i else ("given", "soft")
        d.box(x, 158, 120, 30, drafts[i], fill=fill, line=line)
        d.arrow((x + 60, 189), (x + 60, 202), colour="model-line")
    said = (("a", "u1", "= draft a: kept"), ("b", "u2", "= draft b: kept"))
    for i, (token, number, words) in enumerate(said):
        x = 30 + 145 * i
        d.arrow((x + 60, 237), (x + 60, 250), colour="model-line")
        d.box(x, 252, 120, 30, token, fill="good", line="good-line", bold=True)
        d.text(x + 60, 300, f"sampled with {number}", size=12, colour="soft")
        d.text(x + 60, 318, words, size=13, colour="good-line")
    d.arrow((380, 237), (380, 250), colour="model-line")
    d.box(320, 252, 120, 30, "c", fill="model", line="model-line", bold=True)
    d.text(380, 300, "sampled with u3", size=12, colour="soft")
    d.text(380, 318, "≠ draft x: c is kept", size=13, colour="bad-line")
    d.text(525, 270, "not looked at,", size=13, colour="soft")
    d.text(525, 288, "u4 not used,", size=13, colour="soft")
    d.text(525, 306, "x taken back", size=13, colour="bad-line")
    d.line(((20, 338), (600, 338)), colour="edge")
    d.text(310, 366, "Both ways: a, b, c, and the next token is sampled with u4.", bold=True)
    return d


# ------------------------------------------------------------------------------ charts


@dataclass
class Axes:
    """A chart's plane: values to places."""

    drawing: Drawing
    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_most: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        least, most = self.x_range
        return (
            self.left + (x - least) / (most - least) * self.width,
            self.top + (1 - y / self.y_most) * self.height,
        )

    def draw(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        d = self.drawing
        for y in y_ticks:
            at = self.place(self.x_range[0], y)
            d.line((at, (self.left + self.width, at[1])), colour="edge", width=1)
            d.text(self.left - 8, at[1] + 4, f"{y:g}", size=12, colour="soft", anchor="end")
        for x in x_ticks:
            at = self.place(x, 0)
            d.text(at[0], at[1] + 18, f"{x:g}", size=13, colour="soft")


# About the wide model on two CPUs, as benchmarks.simulate has it.
COST = StepCost(target_pass=5.5e-3, target_row=1.5e-3, draft_decode=0.7e-3, draft_row=0.15e-3)


def rate(n: int, depth: int, right: float) -> float:
    """Tokens per second of n sequences that all draft so deep, each draft being right at this rate
    if those before it were."""
    tokens = sum(right**i for i in range(depth + 1))
    # The first decode of the head takes in what the last step gave, the others one token each.
    draft_rows = [round(n * tokens), *(n for _ in range(depth - 1))][:depth]
    return n * tokens / sum(COST(n, [n * (1 + depth)], draft_rows))


def costs() -> Drawing:
    """What each depth would give, by how many sequences run and how well their text is drafted."""
    d = Drawing(
        620,
        372,
        "Tokens per second by draft depth, computed from the cost of a pass and a row. Alone, a "
        "sequence gains by drafting where seven drafts in ten are right. Sixteen together lose by "
        "it even where nine in ten are.",
    )
    looks = ((0.9, "good-line", 3.0), (0.7, "model-line", 2.0), (0.4, "bad-line", 1.2))
    for n, left in ((1, 20), (4, 220), (16, 420)):
        best = max(rate(n, depth, 0.9) for depth in range(6))
        most = 100.0 * (1 + int(max(best, rate(n, 0, 0.9)) // 100))
        axes = Axes(d, left + 38, 70, 132, 200, (0, 5), most)
        d.text(left + 104, 32, f"{n} at once", bold=True)
        d.text(left, 54, "tokens/s", anchor="start", size=12, colour="soft")
        axes.draw(range(6), [most * i / 4 for i in range(5)])
        for right, colour, width in looks:
            rates = [rate(n, depth, right) for depth in range(6)]
            d.line([axes.place(i, r) for i, r in enumerate(rates)], colour=colour, width=width)
            top = max(range(6), key=rates.__getitem__)
            d.dot(*axes.place(top, rates[top]), colour=colour, radius=5)
        d.text(left + 104, 306, "draft depth", size=12, colour="soft")
    for x, (right, colour, width) in zip((20, 175, 330), looks, strict=True):
        d.line(((x, 333), (x + 22, 333)), colour=colour, width=width)
        d.text(x + 30, 338, f"{right:.0%} are right", anchor="start", size=13)
    d.dot(496, 333, colour="soft", radius=5)
    d.text(508, 338, "best depth", anchor="start", size=13)
    words = "computed: 5.5 ms a pass, 1.5 ms a row; the head 0.7 ms a decode, 0.15 ms a row"
    d.text(20, 361, words, anchor="start", size=12, colour="soft")
    return d


# -------------------------------------------------------------------------- throughput

CLIENTS = (1, 4, 16)
Measured = tuple[float, float, float]  # median, least, greatest


def measured(page: str, heading: str) -> dict[str, list[Measured]]:
    """The rows of the table of tokens per second below a heading, by their names."""
    section = page.split(f"### {heading}\n", 1)[1]
    table = section.split("| tokens/s |", 1)[1].split("\n\n", 1)[0]
    rows = {}
    for line in table.splitlines()[2:]:
        name, *values = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = [_measured(value) for value in values]
    return rows


def _measured(cell: str) -> Measured:
    match = re.fullmatch(r"(\d+) \((\d+) to (\d+)\)", cell)
    if match is None:
        raise ValueError(f"docs/performance.md: no median with least and greatest: {cell!r}")
    median, least, greatest = (float(number) for number in match.groups())
    return median, least, greatest


BARS = (
    ("llama-server", "no MTP", "llama-server, no drafts", "given", "soft"),
    ("llama-server", "depth 3", "llama-server, MTP, 3 drafts", "bad", "bad-line"),
    ("mtpbatch", "no MTP", "mtpbatch, no drafts", "model", "model-line"),
    ("mtpbatch", "depth 3", "mtpbatch, MTP, 3 drafts", "head", "head-line"),
    ("mtpbatch", "adaptive", "mtpbatch, MTP, depth “auto” (the default)", "good", "good-line"),
)


def throughput() -> Drawing:
    """Beside llama-server on the same weights, by how many clients ask at once."""
    page = (DOCS / "performance.md").read_text()
    rows = measured(page, "The wide model (all compute)")
    d = Drawing(
        620,
        440,
        "Tokens per second of mtpbatch and llama-server, with and without MTP drafts, for 1, 4 and "
        "16 clients at once.",
    )
    d.text(20, 30, "Tokens per second, the wide model on two CPUs", anchor="start", bold=True)
    greatest = max(value[2] for values in rows.values() for value in values)
    most = 100 * (1 + greatest // 100)
    axes = Axes(d, 56, 50, 544, 230, (0, 3), most)
    axes.draw((), [100 * i for i in range(int(most // 100) + 1)])
    for group, clients in enumerate(CLIENTS):
        d.text(axes.place(group + 0.5, 0)[0], 300, f"{clients} at once", size=14)
        for i, (server, depth, _, fill, line) in enumerate(BARS):
            caches = [rows[f"{server}, {depth}, {cache} cache"] for cache in ("unified", "split")]
            median, low, high = max(values[group] for values in caches)
            x, y = axes.place(group + 0.08 + 0.17 * i, median)
            floor = axes.place(0, 0)[1]
            d.box(x, y, 26, floor - y, fill=fill, line=line)
            d.text(x + 13, floor - 7, f"{median:.0f}", size=11)
            ends = [axes.place(0, value)[1] for value in (low, high)]
            d.line(((x + 13, ends[0]), (x + 13, ends[1])), colour="ink", width=1)
    for i, (*_, words, fill, line) in enumerate(BARS):
        x, y = 20 + 290 * (i // 3), 322 + 24 * (i % 3)
        d.box(x, y, 14, 14, fill=fill, line=line)
        d.text(x + 22, y + 12, words, anchor="start", size=13)
    notes = (
        "Medians, of the better of two cache layouts each; lines: from the least to the greatest.",
        "Two rounds, 2026-11-30, with nothing else on the machine. From docs/performance.md.",
    )
    for y, words in zip((410, 427), notes, strict=True):
        d.text(20, y, words, anchor="start", size=12, colour="soft")
    return d


DRAWINGS: tuple[Callable[[], Drawing], ...] = (drafting, step, lossless, costs, throughput)


def main() -> None:
    for draw in DRAWINGS:
        path = IMAGES / f"{draw.__name__}.svg"
        path.write_text(draw().svg())
        print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
