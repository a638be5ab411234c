"""MtpSession: what waits while a sequence does not draft, and right drafts after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest

import loops
import random_model
from mtpbatch.native import Batch, Context, DraftRequest, Model, MtpSession, MtpSessionConfig

PROMPT = [40, 50, 60, 70, 80]
COUNT = 24
DEPTH = 3
CROWD = 64  # sequences that leave each of them room for 256 waiting pairs of 1024 floats


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model whose hidden rows are so wide that few of them may wait."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    shape = dataclasses.replace(
        random_model.RANDOM_SHAPE, vocab=300, width=1024, ff=64, layers=2, heads=1
    )
    random_model.write_random(path, shape, mix=0.3, seed=1)
    with Model(path) as model:
        yield model


def make(
    model: Model, *, n_seq: int = 4, p_min: float = 0.0, kv_unified: bool = True
) -> tuple[Context, MtpSession]:
    target = Context(
        model,
        n_seq=n_seq,
        n_ctx=768,
        n_rs_seq=DEPTH,
        n_outputs_max=64,
        kv_type="f32",
        n_threads=1,
        kv_unified=kv_unified,
    )
    config = MtpSessionConfig(n_seq, DEPTH, p_min=p_min)
    return target, MtpSession.with_config(target, Context.mtp(target), config)


def greedy_text(model: Model, count: int) -> list[int]:
    """PROMPT and the ``count`` tokens after it."""
    with make(model, n_seq=1)[0] as target:
        return [*PROMPT, *loops.greedy(target, 0, PROMPT, count)]


def unpaused(model: Model, text: Sequence[int]) -> loops.Stream:
    """The stream after a text that is all prompt."""
    target, session = make(model)
    return loops.drafted(target, session, {3: text}, COUNT, lambda *_: DEPTH)[3]


def feed_singly(target: Context, session: MtpSession, seq_id: int, tokens: Sequence[int]) -> None:
    for token in tokens:
        loops.feed(target, seq_id, [token], session)


@pytest.mark.parametrize("pause", [0, 1, 5, 300, 700])
@pytest.mark.parametrize("crowded", [False, True])
def test_drafts_after_a_pause_are_as_without(wide: Model, pause: int, crowded: bool) -> None:
    """Whether what was not drafted still waits, or filled the buffer once or twice."""
    text = greedy_text(wide, pause + 1)
    target, session = make(wide, n_seq=CROWD if crowded else 4)
    loops.feed(target, 3, PROMPT, session)
    feed_singly(target, session, 3, text[len(PROMPT) : -1])
    fills = (len(text) - 1) // 257 if crowded else 0
    assert session.statistics().rows == fills * 257
    paused = loops.drafted(target, session, {3: text[-1:]}, COUNT, lambda *_: DEPTH)[3]
    assert paused == unpaused(wide, text)
    assert paused.accepted > 0


def test_more_than_may_wait_is_taken_in_after_it_was_restored(wide: Model) -> None:
    """From a session of few sequences, each with more room, to one of many."""
    text = greedy_text(wide, 300)
    target, session = make(wide)
    loops.feed(target, 3, text[:-2], session)
    crowded, other = make(wide, n_seq=CROWD)
    other.restore(5, session.save(3))
    assert session.statistics().rows == other.statistics().rows == 0
    loops.feed(crowded, 5, text[-2:-1], other)
    assert other.statistics().rows == len(text) - 1
    streams = loops.drafted(crowded, other, {5: text[-1:]}, COUNT, lambda *_: DEPTH)
    assert streams[5] == unpaused(wide, text)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_others_that_draft_meanwhile_make_no_difference(tiny: Model, kv_unified: bool) -> None:
    """Sequences draft every step, sometimes, and only at the end, all in the same calls."""
    prompts = {0: [41, 52, 63], 1: PROMPT, 2: list(range(30, 60)), 3: [99]}
    every = {0: 1, 1: 7, 2: 2, 3: 1000}
    target, session = make(tiny, kv_unified=kv_unified)
    loops.drafted(target, session, prompts, 60, lambda s, step: DEPTH * (step % every[s] == 0))
    for s, prompt in prompts.items():
        assert_drafts_as_fresh(target, session, s, prompt)


def assert_drafts_as_fresh(
    target: Context, session: MtpSession, seq_id: int, prompt: Sequence[int]
) -> None:
    """A fresh session that gets the same text as one prompt drafts the same."""
    length = target.length(seq_id)
    fresh, other = make(target.model)
    text = [*prompt, *loops.greedy(fresh, 0, prompt, length - len(prompt) + 1)]
    loops.feed(fresh, 2, text[:length], other)
    expected = other.draft(2, length, text[length])
    assert len(expected) == DEPTH
    assert session.draft(seq_id, length, text[length]) == expected


def test_pauses_between_drafts_of_one_sequence(tiny: Model) -> None:
    """Draft, pause, draft, pause longer, and so on."""
    target, session = make(tiny)
    streams = loops.drafted(target, session, {1: PROMPT}, COUNT, lambda *_: DEPTH)
    for pause in (1, 5, 40):
        last = streams[1].tokens[-1]
        for _ in range(pause):
            last = loops.best(target, loops.feed(target, 1, [last], session))
        streams = loops.drafted(target, session, {1: [last]}, COUNT, lambda *_: DEPTH)
    assert_drafts_as_fresh(target, session, 1, PROMPT)


@pytest.mark.parametrize("p_min", [0.0, 0.3])
def test_a_draft_does_not_depend_on_the_depth_of_others(tiny: Model, p_min: float) -> None:
    """Each is the start of what the sequence drafts alone at full depth."""
    prompts = {0: [41, 52, 63], 1: PROMPT, 2: list(range(30, 60)), 3: [99]}

    def prepared() -> tuple[MtpSession, dict[int, int]]:
        target, session = make(tiny, p_min=p_min)
        return session, {
            s: loops.best(target, loops.feed(target, s, p, session)) for s, p in prompts.items()
        }

    alone = {}
    for s in prompts:
        session, lasts = prepared()
        alone[s] = session.draft(s, len(prompts[s]), lasts[s])
    for shift in range(4):
        session, lasts = prepared()
        depths = {s: (s + shift) % 4 for s in prompts}
        requests = [DraftRequest(s, len(prompts[s]), lasts[s], depths[s]) for s in prompts]
        drafts = session.draft_many(requests)
        assert drafts == [alone[s][: depths[s]] for s in prompts]


def test_one_batch_of_many_sequences_waits_for_each(tiny: Model) -> None:
    """Rows of several sequences in one decode go to the right ones."""
    texts = {0: [41, 52, 63], 2: [70] * 9, 3: list(range(30, 45))}
    target, session = make(tiny)
    batch = Batch()
    for s in (3, 0, 2):
        batch.add_sequence(texts[s], 0, s, outputs="none")
    target.decode(batch)
    session.process(batch)
    for s, text in texts.items():
        fresh, other = make(tiny)
        loops.feed(fresh, 1, text, other)
        assert session.draft(s, len(text), 77) == other.draft(1, len(text), 77)
