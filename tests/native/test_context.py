"""Context: right logits, refusals that change nothing, and taking tokens back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import loops
from mtpbatch.exceptions import ContextError, DecodeError
from mtpbatch.native import Batch, Context, Model
from reference.qwen35_numpy import Reference

PROMPT = [40, 50, 60, 70, 80, 90, 100, 110, 35, 45]
PROMPTS = {0: PROMPT, 1: [99], 2: list(range(30, 60)), 3: [41, 52, 63]}

Logits = npt.NDArray[np.float32]


def make(model: Model, **params: Any) -> Context:
    given: dict[str, Any] = {
        "n_seq": 4,
        "n_ctx": 64,
        "n_rs_seq": 3,
        "kv_type": "f32",
        "n_threads": 1,
    }
    return Context(model, **(given | params))


@pytest.fixture
def context(tiny: Model) -> Context:
    return make(tiny)


def decode(context: Context, tokens: Sequence[int], seq_id: int = 0) -> Logits:
    """Decode tokens in one batch; return the logits of all rows."""
    batch = Batch()
    rows = batch.add_sequence(tokens, context.length(seq_id), seq_id, outputs="all")
    context.decode(batch)
    return np.stack([context.logits(row) for row in rows])


def assert_close(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Equal but for the order of summation; a wrong state shows in the first digits."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def row(token: int = 50, position: int = 0, seq_id: int = 0, *, output: bool = True) -> Batch:
    batch = Batch()
    batch.add(token, position, seq_id, output=output)
    return batch


# ------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_logits_are_those_of_the_reference(tiny: Model, tiny_path: Path, kv_unified: bool) -> None:
    """Several sequences in one batch, with all outputs."""
    context = make(tiny, kv_unified=kv_unified)
    reference = Reference(tiny_path)
    batch = Batch()
    rows = {s: batch.add_sequence(p, 0, s, outputs="all") for s, p in PROMPTS.items()}
    context.decode(batch)
    for s, prompt in PROMPTS.items():
        _, expected = reference.trunk(prompt)
        found = np.stack([context.logits(r) for r in rows[s]])
        assert_close(found, expected)
        assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_the_demo_model_computes_what_the_reference_computes(demo_f32_path: Path) -> None:
    with Model(demo_f32_path) as model, make(model) as context:
        tokens = model.tokenize("And it came to pass in those days, that")
        _, expected = Reference(demo_f32_path).trunk(tokens)
        found = decode(context, tokens)
    assert_close(found, expected)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("n_ubatch", [5, 64])
def test_how_a_text_is_cut_into_decodes_does_not_matter(tiny: Model, n_ubatch: int) -> None:
    whole = decode(make(tiny), PROMPTS[2])
    context = make(tiny, n_ubatch=n_ubatch)
    parts = [decode(context, PROMPTS[2][i : i + 7], seq_id=2) for i in range(0, 30, 7)]
    assert_close(np.concatenate(parts), whole)


def test_logits_are_a_copy_and_of_asked_rows_only(context: Context) -> None:
    batch = Batch()
    batch.add(50, 0, 0)
    batch.add(60, 1, 0, output=True)
    context.decode(batch)
    logits = context.logits(1)
    assert logits.shape == (context.model.n_vocab,)
    before = logits.copy()
    decode(context, [70])
    assert (logits == before).all()
    for wrong in (-1, 1, 64, 2**31 - 1, 2**40):
        with pytest.raises(ContextError, match=f"row {wrong} of the last batch has no logits"):
            context.logits(wrong)


def test_a_row_without_output_has_no_logits(context: Context) -> None:
    context.decode(row(output=False))
    with pytest.raises(ContextError, match="row 0"):
        context.logits(0)


def test_before_the_first_decode_there_are_no_logits(context: Context) -> None:
    with pytest.raises(ContextError):
        context.logits(0)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_kv_type_works(tiny: Model, kv_type: str) -> None:
    exact = decode(make(tiny), PROMPT)
    found = decode(make(tiny, kv_type=kv_type), PROMPT)
    assert np.isfinite(found).all()
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.98


def test_256_sequences_decode_at_once(tiny: Model) -> None:
    context = make(tiny, n_seq=256, n_ctx=8, n_batch=256, n_rs_seq=0, n_ubatch=256)
    batch = Batch()
    for s in range(256):
        batch.add(30 + s % 3, 0, s, output=True)
    context.decode(batch)
    expected = decode(make(tiny), [30])[0]
    assert_close(context.logits(255), expected)


# -------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"n_seq": 0}, "n_seq must be from 1 to 256, got 0"),
        ({"n_seq": -1}, "n_seq"),
        ({"n_seq": 257}, "n_seq must be from 1 to 256, got 257"),
        ({"n_seq": 2**40}, "out of range"),
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"n_ctx": -5}, "n_ctx"),
        ({"n_ctx": 2**31 - 1}, "n_ctx"),
        ({"n_ctx": 2**31}, "out of range"),
        ({"n_ctx": 2**31 - 1, "n_seq": 1}, "more memory than this machine has"),
        ({"n_ctx": 2**23 - 1, "n_seq": 256, "kv_unified": False}, "more memory"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"n_ctx": 2**20, "n_batch": 2**20, "n_ubatch": 2**20}, "n_ubatch=1048576"),
        ({"n_threads": 0}, "n_threads must be from 1 to 512"),
        ({"n_threads": 513}, "n_threads must be from 1 to 512"),
        ({"n_threads": 2**31 - 1}, "n_threads"),
        ({"n_rs_seq": -1}, "n_rs_seq"),
        ({"n_rs_seq": 2**31 - 1}, "n_rs_seq"),
        ({"n_ubatch": 4}, "must exceed n_rs_seq"),
        ({"n_batch": 4, "n_outputs_max": 4}, "must exceed n_rs_seq"),
        ({"n_seq": 1, "n_ctx": 4}, "must exceed n_rs_seq"),
        ({"n_outputs_max": 3}, "n_outputs_max must be at least n_seq"),
        (
            {"n_ctx": 40, "n_cells": 39},
            "n_cells must be from n_ctx=40 to n_ctx . n_seq=160, got 39",
        ),
        ({"n_ctx": 40, "n_cells": 161}, "n_cells must be from n_ctx=40 to n_ctx . n_seq=160"),
        ({"n_ctx": 40, "n_cells": 0}, "n_cells must be at least n_ctx, got 0"),
        ({"n_ctx": 40, "n_cells": 2**40}, "out of range"),
        ({"n_ctx": 40, "n_cells": 100, "kv_unified": False}, "needs kv_unified"),
        ({"kv_type": "f64"}, "kv_type must be one of f32"),
        ({"kv_type": None}, "kv_type"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(tiny: Model, params: dict[str, Any], named: str) -> None:
    with pytest.raises(ContextError, match=named):
        make(tiny, **params)


def test_the_least_context_works(tiny: Model) -> None:
    context = make(tiny, n_seq=1, n_ctx=1, n_batch=1, n_rs_seq=0, n_ubatch=1)
    decode(context, [50])
    with pytest.raises(ContextError, match="full"):
        decode(context, [50])


def test_n_rs_seq_is_granted_to_models_that_can_take_back_only(tiny: Model, dense: Model) -> None:
    assert make(tiny, n_rs_seq=2).n_rs_seq == 2
    assert make(dense, n_rs_seq=2).n_rs_seq == 0


def test_an_mtp_context_has_the_sizes_of_its_target(context: Context) -> None:
    draft = Context.mtp(context)
    assert draft.is_mtp
    assert not context.is_mtp
    for name in ("n_ctx", "n_seq", "n_batch", "n_ubatch", "n_threads", "n_cells"):
        assert getattr(draft, name) == getattr(context, name)
    with pytest.raises(ContextError, match="not an MTP one"):
        Context.mtp(draft)


def test_an_mtp_context_is_its_sessions_alone(context: Context) -> None:
    draft = Context.mtp(context)
    with pytest.raises(ContextError, match="decoded by its session"):
        draft.decode(row())
    with pytest.raises(ContextError, match="truncated by its session"):
        draft.truncate(0, 0)


def test_repr_and_use_after_close(tiny: Model) -> None:
    with make(tiny) as context:
        assert "(default) of tiny.gguf: 4 x 64 tokens" in repr(context)
    context.close()
    assert "closed" in repr(context)
    calls: list[Callable[[], object]] = [
        lambda: context.decode(row()),
        lambda: context.logits(0),
        lambda: context.length(0),
        lambda: context.truncate(0, 0),
        lambda: Context.mtp(context),
    ]
    for use in calls:
        with pytest.raises(ContextError, match="this Context is closed"):
            use()


def test_a_context_outlives_its_closed_model(tiny_path: Path) -> None:
    with Model(tiny_path) as model:
        context = make(model)
        expected = decode(context, PROMPT)
    with pytest.raises(ContextError, match="Model is closed"):
        make(model)
    context.truncate(0, 0)
    np.testing.assert_array_equal(decode(context, PROMPT), expected)


# ------------------------------------------------------------------------------ wrong batches


def rows_apart() -> Batch:
    batch = row(50, 4)
    batch.add(50, 0, 1)
    batch.add(50, 5, 0)
    return batch


def ragged() -> Batch:
    batch = row(50, 4)
    batch.tokens.append(5)
    return batch


def many(count: int, *, output: bool, position: int = 4) -> Batch:
    batch = Batch()
    for i in range(count):
        batch.add(50, position + i, 0, output=output)
    return batch


WRONG: dict[str, tuple[Callable[[], Batch], str]] = {
    "empty": (Batch, "1 to n_batch=20 rows, got 0"),
    "too many rows": (lambda: many(21, output=False), "got 21"),
    "too many outputs": (lambda: many(9, output=True), "n_outputs_max=8"),
    "token beyond the vocabulary": (lambda: row(300, 4), "no such token: 300"),
    "negative token": (lambda: row(-1, 4), "no such token: -1"),
    "sequence beyond n_seq": (lambda: row(50, 0, 4), "no such sequence: 4"),
    "negative sequence": (lambda: row(50, 0, -1), "no such sequence: -1"),
    "position skipped": (lambda: row(50, 5), "goes on at position 4, not 5"),
    "position repeated": (lambda: row(50, 3), "goes on at position 4, not 3"),
    "negative position": (lambda: row(50, -1), "not -1"),
    "first position missing": (lambda: row(50, 1, 1), "goes on at position 0, not 1"),
    "rows of a sequence apart": (rows_apart, "must stand together"),
    "columns of different lengths": (ragged, "differ in length"),
}


@pytest.mark.parametrize(("wrong", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_batch_changes_nothing(
    tiny: Model, wrong: Callable[[], Batch], reason: str
) -> None:
    context = make(tiny, n_batch=20, n_outputs_max=8)
    decode(context, PROMPT[:4])
    before = context.logits(3)
    with pytest.raises(ContextError, match=reason):
        context.decode(wrong())
    assert [context.length(s) for s in range(4)] == [4, 0, 0, 0]
    assert (context.logits(3) == before).all()
    assert_close(decode(context, PROMPT[4:]), decode(make(tiny), PROMPT)[4:])


def test_a_full_sequence_is_refused_and_its_neighbours_go_on(tiny: Model) -> None:
    context = make(tiny, n_ctx=8)
    decode(context, [50] * 7)
    with pytest.raises(ContextError, match="sequence 0 is full: n_ctx=8"):
        decode(context, [50, 50])
    decode(context, [50])
    with pytest.raises(ContextError, match="full"):
        decode(context, [50])
    for s in (1, 2, 3):
        decode(context, [50] * 8, seq_id=s)


@pytest.mark.parametrize("kind", ["tiny", "dense"])
def test_where_cells_run_out_nothing_has_changed(kind: str, request: pytest.FixtureRequest) -> None:
    """Not even by the sequences of the batch that would have found some."""
    model = request.getfixturevalue(kind)
    context = make(model, n_ctx=40, n_cells=50)
    expected = decode(make(model), PROMPT)
    decode(context, [50] * 40)
    decode(context, PROMPT[:4], seq_id=1)
    batch = Batch()
    batch.add_sequence(PROMPT[4:6], 4, 1)
    batch.add_sequence([50] * 5, 0, 2)
    with pytest.raises(DecodeError, match="batch of 7 rows: 44 of n_cells=50 are taken"):
        context.decode(batch)
    assert [context.length(s) for s in range(4)] == [40, 4, 0, 0]
    assert_close(decode(context, PROMPT[4:6], seq_id=1), expected[4:6])
    context.truncate(0, 0)
    decode(context, [50] * 40, seq_id=3)


@pytest.mark.parametrize("field", [0, 1, 2])
def test_a_number_too_large_for_a_row_is_refused_whole(field: int) -> None:
    values = [50, 0, 0]
    values[field] = 2**40
    batch = Batch()
    with pytest.raises(ContextError, match="1099511627776"):
        batch.add(*values)
    assert len(batch) == len(batch.seq_ids) == 0


def test_batches_can_be_read_and_cleared() -> None:
    batch = Batch()
    assert list(batch.add_sequence([5, 6, 7], 2, 1)) == [0, 1, 2]
    assert list(batch.outputs) == [0, 0, 1]
    assert list(batch.add_sequence([8], 0, 0, outputs="none")) == [3]
    assert repr(batch) == "<Batch: 4 rows of 2 sequence(s), 1 outputs>"
    batch.clear()
    assert len(batch) == len(batch.positions) == len(batch.seq_ids) == len(batch.outputs) == 0


@pytest.mark.parametrize("seq_id", [-1, 4, 2**31 - 1, 2**40])
def test_unknown_sequences_are_refused(context: Context, seq_id: int) -> None:
    with pytest.raises(ContextError):
        context.length(seq_id)
    with pytest.raises(ContextError):
        context.truncate(seq_id, 0)


# ------------------------------------------------------------------------------- taking back


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_after_taking_back_it_is_as_if_the_tokens_had_never_been(
    tiny: Model, taken: int, kv_unified: bool
) -> None:
    context = make(tiny, kv_unified=kv_unified)
    batch = Batch()
    for s in range(4):  # neighbours, whose states lie beside
        batch.add_sequence(PROMPT[:4], 0, s)
    context.decode(batch)
    decode(context, [*PROMPT[4 : 9 - taken], *[111] * taken], seq_id=2)
    context.truncate(2, 9 - taken)
    assert context.length(2) == 9 - taken
    decode(context, [77], seq_id=1)  # others go on in between
    found = decode(context, PROMPT[9 - taken :], seq_id=2)
    expected = decode(make(tiny), PROMPT)[9 - taken :]
    assert_close(found, expected)


def test_equal_rows_of_several_sequences_can_be_taken_back(tiny: Model) -> None:
    context = make(tiny)
    for s in (3, 0, 1):
        decode(context, PROMPT[:4], seq_id=s)
    batch = Batch()
    for s in (0, 1, 3):
        batch.add_sequence([PROMPT[4], 111, 112], 4, s)
    context.decode(batch)
    for s, length in ((0, 5), (1, 6), (3, 5)):
        context.truncate(s, length)
    expected = decode(make(tiny), PROMPT)
    for s in (3, 0):
        assert_close(decode(context, PROMPT[5:], seq_id=s), expected[5:])


class TestOnRecurrentLayersTakingBackIsRefused:
    """Each refusal leaves the sequence where it was, and able to go on."""

    def goes_on(self, context: Context, tokens: Sequence[int]) -> None:
        assert context.length(0) == len(tokens)
        found = decode(context, [77])[0]
        fresh = make(context.model)
        assert_close(found, decode(fresh, [*tokens, 77])[-1])

    def test_beyond_n_rs_seq(self, context: Context) -> None:
        decode(context, PROMPT)
        with pytest.raises(ContextError, match="cannot go back from 10 to 6"):
            context.truncate(0, 6)
        self.goes_on(context, PROMPT)

    def test_of_a_whole_decode(self, context: Context) -> None:
        decode(context, PROMPT[:8])
        decode(context, PROMPT[8:])
        with pytest.raises(ContextError, match="cannot go back from 10 to 8"):
            context.truncate(0, 8)
        self.goes_on(context, PROMPT)

    def test_twice(self, context: Context) -> None:
        decode(context, PROMPT)
        context.truncate(0, 9)
        with pytest.raises(ContextError, match="cannot go back"):
            context.truncate(0, 8)
        self.goes_on(context, PROMPT[:9])

    def test_after_another_sequence_was_decoded(self, context: Context) -> None:
        decode(context, PROMPT)
        decode(context, [99], seq_id=1)
        with pytest.raises(ContextError, match="the last decode only"):
            context.truncate(0, 9)
        self.goes_on(context, PROMPT)

    @pytest.mark.parametrize("other", [[99], [99] * 12])
    def test_if_the_decode_was_several_passes(self, context: Context, other: list[int]) -> None:
        """llama.cpp moves states between passes and leaves behind those kept for taking back."""
        batch = Batch()
        batch.add_sequence(PROMPT, 0, 0)
        batch.add_sequence(other, 0, 1)
        context.decode(batch)
        with pytest.raises(ContextError, match="if that was one pass"):
            context.truncate(0, 9)
        self.goes_on(context, PROMPT)

    def test_if_cells_are_split_and_ids_have_gaps(self, tiny: Model) -> None:
        context = make(tiny, kv_unified=False)
        batch = Batch()
        batch.add_sequence(PROMPT, 0, 0)
        batch.add_sequence(PROMPT, 0, 2)
        context.decode(batch)
        with pytest.raises(ContextError, match="if that was one pass"):
            context.truncate(0, 9)
        self.goes_on(context, PROMPT)

    def test_if_n_ubatch_cut_the_decode(self, tiny: Model) -> None:
        context = make(tiny, n_ubatch=16)
        batch = Batch()
        for s in range(2):
            batch.add_sequence(PROMPT, 0, s)
        context.decode(batch)
        with pytest.raises(ContextError, match="if that was one pass"):
            context.truncate(0, 9)
        self.goes_on(context, PROMPT)


def test_a_long_prompt_of_one_sequence_can_be_taken_back_from(tiny: Model) -> None:
    """Passes of one sequence alone move nothing."""
    context = make(tiny, n_ubatch=8)
    decode(context, [*PROMPTS[2], 111, 112])
    context.truncate(0, 30)
    expected = decode(make(tiny), [*PROMPTS[2], 77])[-1]
    assert_close(decode(context, [77])[0], expected)


def test_freeing_a_sequence_is_always_possible(context: Context) -> None:
    decode(context, PROMPT)
    decode(context, PROMPT)
    context.truncate(0, 0)
    assert context.length(0) == 0
    assert_close(decode(context, PROMPT), decode(make(context.model), PROMPT))


def test_truncating_to_what_is_there_or_more_does_nothing(context: Context) -> None:
    decode(context, PROMPT)
    for length in (10, 11, 2**31 - 1):
        context.truncate(0, length)
    context.truncate(0, 8)  # still possible
    assert context.length(0) == 8


@pytest.mark.parametrize("length", [-1, -(2**31), 2**40])
def test_truncating_to_an_impossible_length_is_refused(context: Context, length: int) -> None:
    decode(context, PROMPT)
    with pytest.raises(ContextError):
        context.truncate(0, length)
    assert context.length(0) == 10


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_attention_alone_can_go_back_anywhere(dense: Model, kv_unified: bool) -> None:
    context = make(dense, kv_unified=kv_unified)
    text = PROMPTS[2]
    expected = decode(make(dense), text)
    for s in range(4):
        decode(context, text, seq_id=s)
    for length in (29, 20, 20, 7, 1, 0):
        for s in (1, 3):
            context.truncate(s, length)
            found = decode(context, text[length : length + 1], seq_id=s)[0]
            assert_close(found, expected[length])
            context.truncate(s, length)


# ----------------------------------------------------------------------------------- threads


def test_threads_can_share_a_context(tiny: Model) -> None:
    """Calls wait for each other: each thread's sequence decodes as if alone."""
    context = make(tiny)
    expected = loops.greedy(make(tiny), 0, PROMPT, 20)
    texts: dict[int, list[int]] = {}
    lock = threading.Lock()

    def generate(seq_id: int) -> None:
        tokens: list[int] = []
        batch = Batch()
        batch.add_sequence(PROMPT, 0, seq_id)
        while len(tokens) < 20:
            with lock:  # a decode and the logits it left belong together
                context.decode(batch)
                tokens.append(loops.best(context, len(batch) - 1))
            batch = row(tokens[-1], context.length(seq_id), seq_id)
        texts[seq_id] = tokens

    threads = [threading.Thread(target=generate, args=[s]) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == dict.fromkeys(range(4), expected)
