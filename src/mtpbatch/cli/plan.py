"""``mtpbatch plan``: the memory an engine takes, by part, and what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtpbatch.loading import model_path
from mtpbatch.machine import machine_memory
from mtpbatch.types import EngineConfig, parse

if TYPE_CHECKING:
    from mtpbatch.native.footprint import Footprint

_MIB = 1 << 20
_SHOWN = (
    *("n_seq", "n_ctx", "n_cells", "n_batch", "n_ubatch"),
    *("n_draft_max", "kv_type", "kv_unified"),
)


def run(model: str | None, config: Mapping[str, Any]) -> int:
    """Print it; the exit status, which is 1 if it does not fit."""
    # Only here: the native layer loads llama.cpp.
    from mtpbatch.native.footprint import footprint

    memory = machine_memory()
    with model_path(model) as path:
        plan = footprint(path, parse(EngineConfig, config), available=memory.available)
    available = [memory.available, *(device.free for device in plan.devices[1:])]
    limit = f", limited to {_mib(memory.limit)} MiB" if memory.limit else ""
    print(plan.model)
    print(", ".join(f"{name} {getattr(plan.config, name)}" for name in _SHOWN))
    if plan.no_drafts:
        print(f"without drafts: {plan.no_drafts}")
    print()
    for line in _table(plan, available):
        print(line)
    print(f"\nThis machine has {_mib(memory.total)} MiB{limit}. What Python and the app take comes")
    print("on top; so does what embed() takes, once it is used.\n")
    excess = [plan.total(d) - available[d] for d in range(len(plan.devices))]
    for line in _what_fits(plan, available):
        print(line)
    if max(excess) <= 0:
        return 0
    where = plan.devices[excess.index(max(excess))].name
    print(f"\nIt does NOT fit: {_mib(max(excess))} MiB too much on {where}. {_advice(plan)}")
    return 1


def _table(plan: Footprint, available: Sequence[int]) -> list[str]:
    names = [device.name for device in plan.devices]
    lines = [_row("MiB", names)]
    for part in plan.parts:
        numbers = [_mib(n_bytes) for n_bytes in part.n_bytes]
        lines.append(_row(part.name, numbers, "with use, at most" if part.with_use else ""))
    total = [_mib(plan.total(device)) for device in range(len(names))]
    return [*lines, _row("total", total), _row("available", [_mib(n) for n in available])]


def _row(name: str, columns: Sequence[str], remark: str = "") -> str:
    return f"  {name:<34}{''.join(f'{column:>12}' for column in columns)}  {remark}".rstrip()


def _what_fits(plan: Footprint, available: Sequence[int]) -> list[str]:
    """Sequences by their length, and the length of as many as were asked for."""
    n_seq, asked = plan.config.n_seq, plan.config.n_ctx
    assert asked is not None  # resolved
    growths = list(zip(plan.growth, available, strict=True))
    lengths = {asked, plan.n_ctx_train}
    length = 1024
    while length < plan.n_ctx_train:
        lengths.add(length)
        length *= 2
    lines = ["What fits, about, all else as above:", f"  {'n_ctx':>8}{'most n_seq':>12}"]
    for n_ctx in sorted(lengths):
        most = min(growth.most_sequences(n_ctx, left) for growth, left in growths)
        lines.append(f"  {n_ctx:>8}{most or '-':>12}")
    longest = min(growth.longest_context(n_seq, left, plan.n_ctx_train) for growth, left in growths)
    trained = ", all that the model was trained for" if longest == plan.n_ctx_train else ""
    return [*lines, f"  With n_seq {n_seq}, n_ctx can be up to {longest}{trained}."]


def _advice(plan: Footprint) -> str:
    largest = max(plan.parts, key=lambda part: max(part.n_bytes)).name
    return {
        "weights": "Take a smaller or more quantized model.",
        "snapshots": "Lower snapshot_memory.",
    }.get(largest, "Lower n_seq, n_ctx or n_cells, or take a smaller kv_type, such as q8_0.")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.1f}" if n_bytes < 100 * _MIB else f"{n_bytes / _MIB:,.0f}"
