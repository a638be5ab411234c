"""How much memory an engine takes, by part, found out without loading the model's weights.

llama.cpp makes the contexts that an engine would have and says what they would take; what this
library takes beside them is added. Meanwhile two things are really in memory: recurrent states, of
as many sequences as the config has, and llama.cpp's lists of who holds which cell.
"""

from __future__ import annotations

import os

import msgspec
from msgspec import Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.native.context import Context
from mtpbatch.native.devices import Device, Memory, devices
from mtpbatch.native.model import Model
from mtpbatch.native.opening import Opened, load_models, open_contexts
from mtpbatch.types import MAX_SEQUENCES, EngineConfig

_CELLS = "KV cells"
_SHORT = 4096  # tokens: longer ones take long to try, and tell no more
_FEW_TOKENS = 256  # llama.cpp rounds cells up to so many
_LISTED = 128  # bytes for each cell in llama.cpp's lists, with those of the heads' cells: about 100


class Part(Struct, frozen=True):
    """What takes memory."""

    name: str
    n_bytes: tuple[int, ...]
    """On each device, in their order."""
    with_use: bool = False
    """Whether it comes with use, and is at most so much, or is taken when the engine opens."""


class Growth(Struct, frozen=True):
    """What an engine takes on one device, in bytes, by its sequences and their context."""

    fixed: float
    per_sequence: float
    per_token: float
    """Of n_ctx, whatever n_seq is."""
    per_cell: float
    """Of n_seq times n_ctx."""

    def most_sequences(self, n_ctx: int, available: int) -> int:
        """How many sequences of so many tokens fit, at most 256; 0 if not even one does."""
        left = available - self.fixed - n_ctx * self.per_token
        return _times(self.per_sequence + n_ctx * self.per_cell, left, MAX_SEQUENCES)

    def longest_context(self, n_seq: int, available: int, most: int) -> int:
        """How many tokens of so many sequences fit, at most ``most``; 0 if none do."""
        left = available - self.fixed - n_seq * self.per_sequence
        return _times(self.per_token + n_seq * self.per_cell, left, most)


class Footprint(Struct, frozen=True):
    """The memory of an engine: its parts, and how these grow."""

    model: str
    """In a few words."""
    n_ctx_train: int
    """Longest context the model was trained for, in tokens."""
    config: EngineConfig
    """Nothing in it is left open."""
    drafted_by: str
    """What drafts, or would, in a few words."""
    no_drafts: str | None
    """Why nothing drafts although it was asked for."""
    devices: tuple[Device, ...]
    parts: tuple[Part, ...]
    growth: tuple[Growth, ...]
    """On each device, all parts together."""

    def total(self, device: int) -> int:
        """Bytes there, once all parts are taken."""
        return sum(part.n_bytes[device] for part in self.parts)

    def at_once(self, device: int) -> int:
        """Bytes there when the engine opens."""
        return sum(part.n_bytes[device] for part in self.parts if not part.with_use)


def footprint(path: str | os.PathLike[str], config: EngineConfig, *, available: int) -> Footprint:
    """What an engine of this config takes on each device.

    ``available``: bytes of the machine's memory. What takes more while it is planned is not tried.

    Raises what opening the engine would raise, and :class:`~mtpbatch.InvalidParameterError` for
    that.
    """
    _check_lists(config, available)
    model, assistant = load_models(path, config, weights=False)
    if model.keeps_recurrent_state:
        _check_states(model, assistant, config, available)
    on = devices()
    opened = open_contexts(model, assistant, config)
    resolved, no_drafts = opened.config, opened.no_drafts
    parts = _parts(opened, assistant, len(on))
    del opened  # recurrent states are in memory as long as their context lives
    assert resolved.n_ctx is not None
    assert resolved.n_cells is not None

    # Four engines like this one, each with all the cells that its sequences may need: what they
    # take tells the rest.
    few, many = sorted({resolved.n_seq, resolved.n_seq // 2 or 2})
    short = min(resolved.n_ctx, _SHORT)
    long = 2 * short
    n_batch = config.n_batch and max(config.n_batch, many * (1 + config.n_draft_max))
    full = msgspec.structs.replace(config, n_cells=None, n_batch=n_batch)

    def around(n_seq: int, n_ctx: int) -> list[Part]:
        config = msgspec.structs.replace(full, n_seq=n_seq, n_ctx=n_ctx)
        return _parts(open_contexts(model, assistant, config), assistant, len(on))

    few_short, few_long = around(few, short), around(few, long)
    many_short, many_long = around(many, short), around(many, long)

    def grown(device: int) -> Growth:
        a, b, c, d = (
            sum(part.n_bytes[device] for part in parts)
            for parts in (few_short, few_long, many_short, many_long)
        )
        per_cell = (d - c - b + a) / ((many - few) * (long - short))
        per_sequence = (c - a) / (many - few) - short * per_cell
        per_token = (b - a) / (long - short) - few * per_cell
        fixed = a - few * per_sequence - short * per_token - few * short * per_cell
        return Growth(fixed, per_sequence, per_token, per_cell)

    if model.keeps_recurrent_state:
        # The rest of its states does not grow with the length of sequences.
        cells = next(i for i, part in enumerate(parts) if part.name == _CELLS)
        states, n_more = parts[cells].n_bytes, few * (long - short)
        of_cells = tuple(
            (more - less) * resolved.n_cells // n_more
            for less, more in zip(few_short[cells].n_bytes, few_long[cells].n_bytes, strict=True)
        )
        rest = tuple(n - growing for n, growing in zip(states, of_cells, strict=True))
        parts[cells : cells + 1] = Part(_CELLS, of_cells), Part("recurrent states", rest)
    return Footprint(
        model=model.label,
        n_ctx_train=model.n_ctx_train,
        config=resolved,
        drafted_by=_drafted_by(model, assistant),
        no_drafts=no_drafts,
        devices=on,
        parts=tuple(part for part in parts if any(part.n_bytes)),
        growth=tuple(grown(device) for device in range(len(on))),
    )


def _drafted_by(model: Model, assistant: Model | None) -> str:
    if assistant:
        return f"{assistant.path.name}, an assistant that reads the model's memory"
    if model.n_mtp_heads > 1:
        return f"{model.n_mtp_heads} MTP heads, chained: one for each depth"
    return "one MTP head, for each depth anew" if model.n_mtp_heads else "nothing"


def _parts(opened: Opened, assistant: Model | None, n_devices: int) -> list[Part]:
    """What an engine's contexts and what stands beside them take."""

    def memory_of(context: Context | None) -> list[Memory]:
        nothing = Memory(0, 0, 0, 0, 0)
        return [context.memory_on(d) if context else nothing for d in range(n_devices)]

    target, draft = memory_of(opened.target), memory_of(opened.draft)
    of_draft = "of the draft model" if assistant else "of the MTP heads"
    draft_weights = [
        each.weights if assistant else 0 for each in draft
    ]  # the heads' are the model's
    hidden = [
        (t.hidden_rows if opened.draft else 0) + d.hidden_rows
        for t, d in zip(target, draft, strict=True)
    ]
    snapshots = [opened.config.snapshot_memory << 20] + [0] * (n_devices - 1)
    rows: list[tuple[str, list[int], bool]] = [
        ("weights", [each.weights for each in target], False),
        ("weights of the draft model", draft_weights, False),
        (_CELLS, [each.states for each in target], False),
        (f"{_CELLS} {of_draft}", [each.states for each in draft], False),
        ("compute buffers", [each.compute for each in target], False),
        (f"compute buffers {of_draft}", [each.compute for each in draft], False),
        ("logits", [each.logits for each in target], True),
        ("logits of drafts", [each.logits for each in draft], True),
        ("hidden rows, for drafts", hidden, True),
        ("snapshots", snapshots, True),
    ]
    return [Part(name, tuple(n_bytes), with_use) for name, n_bytes, with_use in rows]


def _check_lists(config: EngineConfig, available: int) -> None:
    n_cells = config.n_seq * (config.n_ctx or 0)  # by default they are few
    n_cells = min(config.n_cells or n_cells, n_cells)
    if n_cells * _LISTED > available:
        raise InvalidParameterError(
            "n_ctx",
            f"llama.cpp's lists of {n_cells} cells alone take {n_cells * _LISTED >> 20} MiB, but "
            f"{available >> 20} MiB are available: lower n_ctx, n_seq or n_cells",
        )


def _check_states(
    model: Model, assistant: Model | None, config: EngineConfig, available: int
) -> None:
    one = msgspec.structs.replace(config, n_seq=1, n_ctx=_FEW_TOKENS, n_cells=None)
    opened = open_contexts(model, assistant, one)
    needed = config.n_seq * opened.target.memory_on(0).states
    if needed > available:
        raise InvalidParameterError(
            "n_seq",
            f"recurrent states of {config.n_seq} sequences take {needed >> 20} MiB, but "
            f"{available >> 20} MiB are available: lower it, or n_draft_max, for which states are "
            f"kept as well",
        )


def _times(one: float, left: float, most: int) -> int:
    """How often it goes into what is left."""
    if one <= 0:
        return most if left >= 0 else 0
    return max(0, min(most, int(left / one)))
