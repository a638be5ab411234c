"""Figures to tables: medians over rounds, with the least and the greatest."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from benchmarks.workload import Load

Kv: TypeAlias = Literal["unified", "split"]
KV: tuple[Kv, ...] = ("unified", "split")
"""One pool of KV cells for all sequences, or an equal share for each."""
ADAPTIVE: Final = "auto"
"""The depth that mtpbatch chooses itself."""
Depth: TypeAlias = int | Literal["auto"]


class Side(enum.StrEnum):
    """Who is measured."""

    LLAMA_SERVER = "llama-server"
    MTPBATCH = "mtpbatch"
    IDEAL = "native ideal"


class Variant(Struct, frozen=True):
    """A side and its settings."""

    side: Side
    depth: Depth
    kv: Kv

    @property
    def label(self) -> str:
        draft = f"depth {self.depth}" if self.depth else "no MTP"
        if self.depth == ADAPTIVE:
            draft = "adaptive"
        return f"{self.side}, {draft}, {self.kv} cache"

    @property
    def fixed_depth(self) -> int:
        """Of whoever chooses none."""
        if not isinstance(self.depth, int):
            raise ValueError(f"{self.label} has no fixed depth")
        return self.depth


class Record(Struct, frozen=True):
    """One variant in one round."""

    variant: Variant
    round: int
    loads: dict[int, Load]
    """By the number of concurrent clients."""
    start_up: float | None = None
    """Seconds until it could take requests."""
    peak_memory: float | None = None
    """MiB."""
    first_token: list[float] = []
    """Seconds, of as many requests at once as the most clients."""


def spread(figures: Sequence[float], digits: int = 0) -> str:
    """``median (least to greatest)``."""
    middle = f"{statistics.median(figures):.{digits}f}"
    if len(figures) == 1:
        return middle
    return f"{middle} ({min(figures):.{digits}f} to {max(figures):.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_Choice: TypeAlias = tuple[Side, frozenset[Depth]]
"""A side, at its best of some depths."""


class Comparison:
    """The records of one model."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._by_variant: dict[Variant, list[Record]] = {}
        for record in records:
            self._by_variant.setdefault(record.variant, []).append(record)
        self._concurrency = list(records[0].loads)
        depths = {variant.depth for variant in self._by_variant}
        self._fixed = frozenset(depth for depth in depths if depth != ADAPTIVE)
        self._depths = sorted(depth for depth in depths if isinstance(depth, int))

    def speeds(self) -> str:
        rows = [
            [variant.label, *(spread(self._speeds(variant, c)) for c in self._concurrency)]
            for variant in self._by_variant
        ]
        return table(["tokens/s", *(f"{c} at once" for c in self._concurrency)], rows)

    def ratios(self) -> str:
        ours, server, ideal = Side.MTPBATCH, Side.LLAMA_SERVER, Side.IDEAL
        fixed = self._fixed
        adaptive: frozenset[Depth] = frozenset({ADAPTIVE})
        none: frozenset[Depth] = frozenset({0})
        rows: list[tuple[str, _Choice, _Choice]] = [
            ("best fixed mtpbatch / best llama-server", (ours, fixed), (server, fixed)),
            ("best fixed mtpbatch / best native ideal", (ours, fixed), (ideal, fixed)),
            ("best native ideal / best llama-server", (ideal, fixed), (server, fixed)),
            ("adaptive mtpbatch / best llama-server", (ours, adaptive), (server, fixed)),
            ("adaptive mtpbatch / best fixed mtpbatch", (ours, adaptive), (ours, fixed)),
            ("adaptive mtpbatch / mtpbatch without MTP", (ours, adaptive), (ours, none)),
        ]
        for depth in self._depths:
            at = f"at depth {depth}" if depth else "without MTP"
            this: frozenset[Depth] = frozenset({depth})
            rows.append((f"mtpbatch / llama-server, both {at}", (ours, this), (server, this)))
            rows.append((f"mtpbatch / native ideal, both {at}", (ours, this), (ideal, this)))
        return table(
            ["ratio", *(f"{c} at once" for c in self._concurrency)],
            (
                [name, *(self._ratio(above, below, c) for c in self._concurrency)]
                for name, above, below in rows
            ),
        )

    def drafting(self) -> str:
        """Tokens per step and acceptance, which must agree at equal depth."""
        rows = [
            [variant.label, *(self._drafting(variant, c) for c in self._concurrency)]
            for variant in sorted(self._by_variant, key=lambda variant: str(variant.depth))
            if variant.depth
        ]
        head = ["tokens per step · acceptance", *(f"{c} at once" for c in self._concurrency)]
        differences = ", ".join(f"{self._difference(c):.3f} at {c}" for c in self._concurrency)
        return (
            f"{table(head, rows)}\n\n"
            f"Greatest difference from mtpbatch's acceptance at equal depth: {differences}. "
            f"Batches of other shapes round differently, so that texts can part at a near-tie."
        )

    def processes(self) -> str:
        rows = []
        for variant, records in self._by_variant.items():
            if variant.side is Side.IDEAL:
                continue
            waits = [record.first_token for record in records]
            rows.append(
                [
                    variant.label,
                    spread([1000 * wait[0] for wait in waits]),
                    spread([1000 * statistics.median(wait) for wait in waits]),
                    spread([1000 * wait[-1] for wait in waits]),
                    spread([r.peak_memory for r in records if r.peak_memory is not None]),
                    spread([r.start_up for r in records if r.start_up is not None], 2),
                ]
            )
        arrivals = f"{max(self._concurrency)} arrivals at once: first token"
        head = [arrivals, "earliest, ms", "median, ms", "latest, ms", "peak MiB", "start-up, s"]
        return (
            f"{table(head, rows)}\n\n"
            f"mtpbatch's process holds its clients as well, and its start is that of Python too."
        )

    def parts(self) -> str:
        """What the time went into, where that is known."""
        rows = [
            [variant.label, *(self._parts(variant, c) for c in self._concurrency)]
            for variant in self._by_variant
            if variant.side is not Side.LLAMA_SERVER
        ]
        return table(["share of the time", *(f"{c} at once" for c in self._concurrency)], rows)

    def _speeds(self, variant: Variant, clients: int) -> list[float]:
        return [record.loads[clients].speed for record in self._by_variant[variant]]

    def _best(self, choice: _Choice, clients: int) -> Variant | None:
        """The fastest variant of a side at some depths, by the median."""
        side, depths = choice
        return max(
            (v for v in self._by_variant if v.side is side and v.depth in depths),
            key=lambda variant: statistics.median(self._speeds(variant, clients)),
            default=None,
        )

    def _ratio(self, above: _Choice, below: _Choice, clients: int) -> str:
        ours, theirs = self._best(above, clients), self._best(below, clients)
        if ours is None or theirs is None:
            return "not measured"
        pairs = zip(self._speeds(ours, clients), self._speeds(theirs, clients), strict=True)
        return spread([a / b for a, b in pairs], 2)

    def _total(self, variant: Variant, clients: int) -> Load:
        loads = [record.loads[clients] for record in self._by_variant[variant]]
        return Load(
            tokens=sum(load.tokens for load in loads),
            seconds=sum(load.seconds for load in loads),
            drafted=sum(load.drafted for load in loads),
            accepted=sum(load.accepted for load in loads),
        )

    def _acceptance(self, variant: Variant, clients: int) -> float:
        total = self._total(variant, clients)
        return total.accepted / max(total.drafted, 1)

    def _difference(self, clients: int) -> float:
        return max(
            abs(
                self._acceptance(variant, clients)
                - self._acceptance(Variant(Side.MTPBATCH, variant.depth, "unified"), clients)
            )
            for variant in self._by_variant
            if variant.depth != ADAPTIVE
        )

    def _drafting(self, variant: Variant, clients: int) -> str:
        per_step = self._total(variant, clients).tokens_per_step
        return f"{per_step:.2f} · {self._acceptance(variant, clients):.3f}"

    def _parts(self, variant: Variant, clients: int) -> str:
        loads = [record.loads[clients] for record in self._by_variant[variant]]
        shares = {
            name: statistics.median(load.parts[name] / load.seconds for load in loads)
            for name in loads[0].parts
        }
        shares["rest"] = 1 - sum(shares.values())
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)


def markdown(conditions: Mapping[str, str], records: Mapping[str, Sequence[Record]]) -> str:
    """The whole report."""
    sections = ["\n".join(f"- {name}: {value}" for name, value in conditions.items())]
    for model, of_model in records.items():
        comparison = Comparison(of_model)
        sections += [
            f"## {model}",
            comparison.speeds(),
            comparison.ratios(),
            comparison.drafting(),
            comparison.processes(),
            comparison.parts(),
        ]
    return "\n\n".join(sections) + "\n"
