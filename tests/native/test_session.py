"""MtpSession: its whole surface, right counts whatever goes on beside, and misuse refused."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import loops
from mtpbatch.exceptions import (
    ContextError,
    MtpAcceptError,
    MtpBadSequenceError,
    MtpBatchError,
    MtpDraftError,
    MtpIncompatibleContextsError,
    MtpInvalidConfigError,
    MtpProcessError,
    MtpSessionError,
)
from mtpbatch.native import (
    Batch,
    Context,
    DraftRequest,
    Model,
    MtpSession,
    MtpSessionConfig,
)

PROMPT = [40, 50, 60, 70, 80]
PROMPTS = {0: [41, 52, 63], 1: [70] * 9, 2: list(range(30, 60)), 3: [99]}
COUNT = 32
DEPTH = 3


def make_target(model: Model, *, n_seq: int = 4, n_ctx: int = 128, **params: Any) -> Context:
    given: dict[str, Any] = {"n_rs_seq": DEPTH, "kv_type": "f32", "n_threads": 1} | params
    return Context(model, n_seq=n_seq, n_ctx=n_ctx, **given)


def make_pair(model: Model, **params: Any) -> tuple[Context, Context]:
    target = make_target(model, **params)
    return target, Context.mtp(target)


def undrafted(model: Model, prompt: Sequence[int], count: int = COUNT) -> list[int]:
    with make_target(model, n_seq=1, n_ctx=2048) as context:
        return loops.greedy(context, 0, prompt, count)


def alone(model: Model, prompt: Sequence[int], count: int = COUNT) -> loops.Stream:
    """The stream of a prompt in a session of its own, at full depth."""
    target, draft = make_pair(model, n_seq=1)
    session = MtpSession(target, draft, 1, DEPTH)
    return loops.drafted(target, session, {0: prompt}, count, lambda *_: DEPTH)[0]


@pytest.fixture
def target(tiny: Model) -> Context:
    return make_target(tiny)


@pytest.fixture
def session(target: Context) -> MtpSession:
    return MtpSession(target, Context.mtp(target), 4, DEPTH)


@pytest.fixture
def still_works(tiny: Model, target: Context, session: MtpSession) -> Iterator[None]:
    """Afterwards the session drafts for a new generation on sequence 0 as if nothing had been."""
    yield
    target.truncate(0, 0)
    stream = loops.drafted(target, session, {0: PROMPT}, COUNT, lambda *_: DEPTH)[0]
    assert stream == alone(tiny, PROMPT)


def prefill(target: Context, session: MtpSession, seq_id: int = 0) -> tuple[Batch, int]:
    """Decode and process PROMPT; return its batch and the token sampled behind it."""
    batch = Batch()
    row = batch.add_sequence(PROMPT, 0, seq_id)[-1]
    target.decode(batch)
    session.process(batch)
    return batch, loops.best(target, row)


def verify_rows(target: Context, last: int, draft: Sequence[int], seq_id: int = 0) -> Batch:
    batch = Batch()
    batch.add_sequence([last, *draft], target.length(seq_id), seq_id, outputs="all")
    target.decode(batch)
    return batch


# ------------------------------------------------------------------------------- the surface


def test_defaults(target: Context) -> None:
    session = MtpSession(target, Context.mtp(target), 4, DEPTH)
    assert session.config == MtpSessionConfig(n_seq=4, n_draft_max=DEPTH, n_min=0, p_min=0.0)
    assert (session.n_seq, session.n_draft_max, session.n_min, session.p_min) == (4, DEPTH, 0, 0.0)
    assert session.need_embd is False
    assert session.need_embd_pre_norm is True


def test_with_config_keeps_what_was_given(target: Context) -> None:
    config = MtpSessionConfig(4, 2, n_min=1, p_min=0.25)
    session = MtpSession.with_config(target, Context.mtp(target), config)
    assert session.config == config
    assert (session.n_draft_max, session.n_min, session.p_min) == (2, 1, 0.25)


def test_repr_shows_config_and_counts_and_closing(session: MtpSession) -> None:
    assert "n_seq=4 n_draft_max=3" in repr(session)
    assert "0 of 0 drafted tokens accepted" in repr(session)
    session.close()
    assert repr(session) == "<MtpSession: closed>"


def test_context_manager_closes_and_close_is_idempotent(target: Context) -> None:
    with MtpSession(target, Context.mtp(target), 4, DEPTH) as session:
        assert not session.closed
    session.close()
    assert session.closed
    with pytest.raises(MtpSessionError, match="MtpSession is closed"):
        session.draft(0, 1, 1)


def test_begin_accepts_the_processed_prompt_only(target: Context, session: MtpSession) -> None:
    prefill(target, session)
    session.begin(0, PROMPT)
    with pytest.raises(MtpBadSequenceError, match="the prompt has 4 tokens"):
        session.begin(0, PROMPT[:-1])
    with pytest.raises(MtpBadSequenceError, match="no such sequence: 4"):
        session.begin(4, PROMPT)


def test_print_stats_prints_the_counts(
    tiny: Model, target: Context, session: MtpSession, capsys: pytest.CaptureFixture[str]
) -> None:
    session.print_stats()
    assert "none yet" in capsys.readouterr().out
    stream = loops.drafted(target, session, {0: PROMPT}, COUNT, lambda *_: DEPTH)[0]
    session.print_stats()
    printed = capsys.readouterr().out
    assert f"{stream.drafted} tokens drafted, {stream.accepted} accepted" in printed


def test_statistics_add_up(target: Context, session: MtpSession) -> None:
    streams = loops.drafted(target, session, PROMPTS, COUNT, lambda *_: DEPTH).values()
    s = session.statistics()
    assert s.drafted == sum(x.drafted for x in streams) == sum(s.drafted_by_depth)
    assert s.accepted == sum(x.accepted for x in streams) == sum(s.accepted_by_depth)
    assert s.drafts == s.drafted_by_depth[0]
    assert list(s.drafted_by_depth) == sorted(s.drafted_by_depth, reverse=True)
    assert all(a <= d for a, d in zip(s.accepted_by_depth, s.drafted_by_depth, strict=True))
    assert 0 < s.accepted < s.drafted
    assert s.rows >= s.drafted
    assert 0 < s.decodes <= s.drafted
    assert s.draft_time > 0
    assert s.process_time >= 0
    assert s.accept_time >= 0


def test_draft_many_takes_one_decode_per_depth(target: Context, session: MtpSession) -> None:
    lasts = {s: loops.best(target, loops.feed(target, s, p, session)) for s, p in PROMPTS.items()}
    before = session.statistics().decodes
    session.draft_many([DraftRequest(s, target.length(s), t) for s, t in lasts.items()])
    assert session.statistics().decodes - before == DEPTH


def test_any_thread_may_use_it(tiny: Model, target: Context, session: MtpSession) -> None:
    streams: list[loops.Stream] = []

    def generate() -> None:
        made = loops.drafted(target, session, {0: PROMPT}, COUNT, lambda *_: DEPTH)
        streams.append(made[0])

    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    assert streams == [alone(tiny, PROMPT)]


def test_threads_can_share_it(tiny: Model, target: Context, session: MtpSession) -> None:
    """Calls from several threads wait for each other and nothing is corrupted."""
    for s, prompt in PROMPTS.items():
        loops.feed(target, s, prompt, session)
    drafts: dict[int, list[int]] = {}

    def draft(seq_id: int) -> None:
        drafts[seq_id] = session.draft(seq_id, target.length(seq_id), 77)

    threads = [threading.Thread(target=draft, args=[s]) for s in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    other_target, other_draft = make_pair(tiny)
    other = MtpSession(other_target, other_draft, 4, DEPTH)
    for s, prompt in PROMPTS.items():
        loops.feed(other_target, s, prompt, other)
    assert drafts == {s: other.draft(s, other_target.length(s), 77) for s in PROMPTS}


# ------------------------------------------------------------------------------ right drafts


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_drafted_text_is_the_undrafted_text(tiny: Model, kv_unified: bool) -> None:
    target, draft = make_pair(tiny, kv_unified=kv_unified)
    session = MtpSession(target, draft, 4, DEPTH)
    streams = loops.drafted(target, session, PROMPTS, COUNT, lambda *_: DEPTH)
    for s, prompt in PROMPTS.items():
        assert streams[s].tokens == undrafted(tiny, prompt), s
    assert sum(stream.accepted for stream in streams.values()) > 10
    assert any(stream.accepted < stream.drafted for stream in streams.values())


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
@pytest.mark.parametrize("seq_id", [0, 2, 3])
def test_acceptance_depends_neither_on_the_id_nor_on_neighbours(
    tiny: Model, seq_id: int, kv_unified: bool
) -> None:
    expected = alone(tiny, PROMPT)
    for neighbours in ({}, PROMPTS, {s: list(range(90, 90 + 11 * s)) for s in range(1, 4)}):
        target, draft = make_pair(tiny, kv_unified=kv_unified)
        session = MtpSession(target, draft, 4, DEPTH)
        prompts = {**neighbours, seq_id: PROMPT}
        streams = loops.drafted(target, session, prompts, COUNT, lambda *_: DEPTH)
        assert streams[seq_id] == expected


def test_draft_many_drafts_what_single_calls_draft(tiny: Model) -> None:
    results = []
    for together in (True, False):
        target, draft = make_pair(tiny)
        session = MtpSession(target, draft, 4, DEPTH)
        requests = [
            DraftRequest(s, len(p), loops.best(target, loops.feed(target, s, p, session)))
            for s, p in PROMPTS.items()
        ]
        if together:
            results.append(session.draft_many(requests))
        else:
            results.append([session.draft(r.seq_id, r.n_past, r.id_last) for r in requests])
    assert results[0] == results[1]
    assert [len(draft) for draft in results[0]] == [DEPTH] * 4


def test_each_sequence_drafts_to_its_own_depth(target: Context, session: MtpSession) -> None:
    lasts = {s: loops.best(target, loops.feed(target, s, p, session)) for s, p in PROMPTS.items()}
    requests = [DraftRequest(s, len(PROMPTS[s]), t, s) for s, t in lasts.items()]
    shallow = session.draft_many(requests)
    assert [len(draft) for draft in shallow] == [0, 1, 2, 3]
    with pytest.raises(MtpAcceptError):  # nothing was drafted for the first
        session.accept(0, 0)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "split"])
def test_depths_that_change_every_step_leave_the_text_alone(tiny: Model, kv_unified: bool) -> None:
    target, draft = make_pair(tiny, kv_unified=kv_unified)
    session = MtpSession(target, draft, 4, DEPTH)
    streams = loops.drafted(target, session, PROMPTS, COUNT, lambda s, step: (s + step) % 4)
    assert {s: x.tokens for s, x in streams.items()} == {
        s: undrafted(tiny, p) for s, p in PROMPTS.items()
    }


def test_a_small_batch_draws_the_same_drafts(tiny: Model) -> None:
    """Draft decodes that need several batches, because many tokens wait, change nothing."""
    streams = []
    for n_batch in (128, 5):
        target, draft = make_pair(tiny, n_batch=n_batch, n_outputs_max=16)
        session = MtpSession(target, draft, 4, DEPTH)
        # At most 5 rows a step: the sequences draft one after the other.
        made = loops.drafted(target, session, {1: PROMPTS[2]}, COUNT, lambda *_: DEPTH)
        streams.append(made[1])
    assert streams[0] == streams[1]


def test_several_sequences_catch_up_through_a_small_batch(tiny: Model) -> None:
    drafts = []
    for n_batch in (512, 6):
        target, draft = make_pair(tiny, n_batch=n_batch, n_outputs_max=16)
        session = MtpSession(target, draft, 4, DEPTH)
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        requests = [DraftRequest(s, len(p), 77) for s, p in PROMPTS.items()]
        drafts.append(session.draft_many(requests))
    assert drafts[0] == drafts[1]


def test_p_min_ends_a_draft_before_an_unlikely_token(tiny: Model) -> None:
    def drafts(p_min: float, depth: int = DEPTH) -> list[list[int]]:
        target, draft = make_pair(tiny)
        config = MtpSessionConfig(4, depth, p_min=p_min)
        session = MtpSession.with_config(target, draft, config)
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        return session.draft_many([DraftRequest(s, len(p), 77) for s, p in PROMPTS.items()])

    full = drafts(0.0)
    lengths = set()
    for p_min in (0.1, 0.3, 0.5, 0.7, 0.9):
        for short, whole in zip(drafts(p_min), full, strict=True):
            assert short == whole[: len(short)]
            lengths.add(len(short))
    assert len(lengths) > 1  # some floors cut some drafts
    assert drafts(1.0) == [[], [], [], []]


def test_drafts_shorter_than_n_min_are_dropped(tiny: Model) -> None:
    def drafts(n_min: int) -> list[list[int]]:
        target, draft = make_pair(tiny)
        config = MtpSessionConfig(4, DEPTH, n_min=n_min)
        session = MtpSession.with_config(target, draft, config)
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        return session.draft_many([DraftRequest(s, len(PROMPTS[s]), 77, s) for s in PROMPTS])

    assert [len(d) for d in drafts(0)] == [0, 1, 2, 3]
    assert [len(d) for d in drafts(2)] == [0, 0, 2, 3]
    assert [len(d) for d in drafts(3)] == [0, 0, 0, 3]


def test_dropped_drafts_leave_later_ones_alone(tiny: Model) -> None:
    """A draft that came to nothing can be asked for again and changes no later one."""
    target, draft = make_pair(tiny)
    config = MtpSessionConfig(4, DEPTH, n_min=2)
    session = MtpSession.with_config(target, draft, config)

    def depth(seq_id: int, step: int) -> int:
        last = streams_last(target, session, seq_id)
        assert session.draft_many([DraftRequest(seq_id, target.length(seq_id), last, 1)]) == [[]]
        return DEPTH

    def streams_last(target: Context, session: MtpSession, seq_id: int) -> int:
        return 123  # any token: nothing comes of it

    stream = loops.drafted(target, session, {2: PROMPT}, COUNT - 1, depth)[2]
    assert stream.tokens == undrafted(tiny, PROMPT, COUNT - 1)
    plain = alone(tiny, PROMPT, COUNT - 1)
    assert abs(stream.accepted - plain.accepted) <= 1  # a last draft of one token is dropped


def test_drafts_stop_at_the_end_of_the_context(tiny: Model) -> None:
    target, draft = make_pair(tiny, n_ctx=10)
    session = MtpSession(target, draft, 4, DEPTH)
    for length, expected in ((5, 3), (6, 3), (7, 2), (8, 1), (9, 0), (10, 0)):
        target.truncate(0, 0)
        loops.feed(target, 0, [50] * length, session)
        found = session.draft(0, length, 60)
        assert len(found) == expected
        if length < 10:  # what was drafted fits
            loops.feed(target, 0, [60, *found], session)


# ------------------------------------------------------------------------------ lazy catch-up


def test_long_prompts_in_chunks_are_as_in_one(tiny: Model) -> None:
    prompt = list(itertools.islice(itertools.cycle(range(30, 117)), 700))
    streams = []
    for n_batch in (1024, 64, 7):
        target, draft = make_pair(tiny, n_ctx=768, n_batch=n_batch, n_outputs_max=16)
        session = MtpSession(target, draft, 4, DEPTH)
        made = loops.drafted(target, session, {1: prompt}, COUNT, lambda *_: DEPTH)
        streams.append(made[1])
    assert streams[0] == streams[1] == streams[2]


def test_drafting_from_another_token_than_the_one_decoded(tiny: Model) -> None:
    """The caller may change its mind between the draft and the decode."""
    target, draft = make_pair(tiny)
    session = MtpSession(target, draft, 4, DEPTH)
    last = loops.best(target, loops.feed(target, 0, PROMPT, session))
    assert session.draft(0, len(PROMPT), 123)
    batch = verify_rows(target, last, [])
    session.process(batch)
    session.accept(0, 0)
    token = loops.best(target, 0)
    assert session.draft(0, len(PROMPT) + 1, token) == fresh_draft(tiny, [*PROMPT, last], token)


def fresh_draft(model: Model, prompt: Sequence[int], last: int) -> list[int]:
    target, draft = make_pair(model)
    session = MtpSession(target, draft, 4, DEPTH)
    loops.feed(target, 0, prompt, session)
    return session.draft(0, len(prompt), last)


def test_a_draft_may_be_verified_in_part(tiny: Model) -> None:
    """Fewer drafted tokens decoded than drafted: what was not decoded counts as rejected."""
    target, draft = make_pair(tiny)
    session = MtpSession(target, draft, 4, DEPTH)
    last = loops.best(target, loops.feed(target, 0, PROMPT, session))
    found = session.draft(0, len(PROMPT), last)
    session.process(verify_rows(target, last, found[:1]))
    with pytest.raises(MtpAcceptError, match="from 0 to 1"):
        session.accept(0, 2)
    session.accept(0, 1)
    prompt = [*PROMPT, last, found[0]]
    assert session.draft(0, len(prompt), 77) == fresh_draft(tiny, prompt, 77)


def test_a_new_generation_starts_on_a_used_sequence(tiny: Model) -> None:
    target, draft = make_pair(tiny)
    session = MtpSession(target, draft, 4, DEPTH)
    loops.drafted(target, session, {0: [99] * 20}, COUNT, lambda *_: DEPTH)
    session.draft(0, target.length(0), 50)  # a draft that waits is forgotten with the rest
    target.truncate(0, 0)
    stream = loops.drafted(target, session, {0: PROMPT}, COUNT, lambda *_: DEPTH)[0]
    assert stream == alone(tiny, PROMPT)


# ------------------------------------------------------------------------------------ misuse


@pytest.mark.usefixtures("still_works")
class TestAcceptIsRefused:
    def test_without_a_draft(self, target: Context, session: MtpSession) -> None:
        prefill(target, session)
        with pytest.raises(MtpAcceptError, match="no draft"):
            session.accept(0, 0)

    def test_before_the_draft_was_processed(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        session.draft(0, len(PROMPT), last)
        with pytest.raises(MtpAcceptError, match="not verified"):
            session.accept(0, 0)

    def test_twice(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        draft = session.draft(0, len(PROMPT), last)
        session.process(verify_rows(target, last, draft))
        session.accept(0, 1)
        with pytest.raises(MtpAcceptError, match="no draft"):
            session.accept(0, 1)

    @pytest.mark.parametrize("count", [-1, DEPTH + 1, 2**31 - 1, -(2**31), 2**40])
    def test_of_a_wrong_count(self, target: Context, session: MtpSession, count: int) -> None:
        _, last = prefill(target, session)
        draft = session.draft(0, len(PROMPT), last)
        session.process(verify_rows(target, last, draft))
        with pytest.raises(MtpAcceptError):
            session.accept(0, count)
        session.accept(0, 0)

    @pytest.mark.parametrize("seq_id", [-1, 4, 2**31 - 1])
    def test_of_an_unknown_sequence(
        self, target: Context, session: MtpSession, seq_id: int
    ) -> None:
        with pytest.raises(MtpBadSequenceError, match="no such sequence"):
            session.accept(seq_id, 0)


@pytest.mark.usefixtures("still_works")
class TestDraftIsRefused:
    def test_while_a_draft_waits(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        draft = session.draft(0, len(PROMPT), last)
        with pytest.raises(MtpDraftError, match=r"process\(\) and accept\(\)"):
            session.draft(0, len(PROMPT), last)
        session.process(verify_rows(target, last, draft))
        with pytest.raises(MtpDraftError, match=r"accept\(\)"):
            session.draft(0, target.length(0), last)
        session.accept(0, 0)

    @pytest.mark.parametrize("n_past", [0, 4, 6, -1, 129, 2**31 - 1, -(2**31)])
    def test_at_a_wrong_position(self, target: Context, session: MtpSession, n_past: int) -> None:
        prefill(target, session)
        with pytest.raises(MtpBadSequenceError, match=f"n_past is {n_past}"):
            session.draft(0, n_past, 5)

    def test_before_anything_was_processed(self, session: MtpSession) -> None:
        with pytest.raises(MtpBadSequenceError):
            session.draft(0, 0, 5)

    @pytest.mark.parametrize("token", [-1, 300, 2**31 - 1, 2**40])
    def test_from_an_unknown_token(self, target: Context, session: MtpSession, token: int) -> None:
        prefill(target, session)
        with pytest.raises(MtpDraftError):
            session.draft(0, len(PROMPT), token)

    @pytest.mark.parametrize("seq_id", [-1, 4, 2**31 - 1])
    def test_for_an_unknown_sequence(self, session: MtpSession, seq_id: int) -> None:
        with pytest.raises(MtpBadSequenceError, match="no such sequence"):
            session.draft(seq_id, 5, 5)

    @pytest.mark.parametrize("depth", [-1, DEPTH + 1, 2**31 - 1])
    def test_at_a_wrong_depth(self, target: Context, session: MtpSession, depth: int) -> None:
        _, last = prefill(target, session)
        with pytest.raises(MtpDraftError, match="depth must be from 0 to n_draft_max=3"):
            session.draft_many([DraftRequest(0, len(PROMPT), last, depth)])

    def test_twice_in_one_call(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        request = DraftRequest(0, len(PROMPT), last)
        with pytest.raises(MtpDraftError, match="twice"):
            session.draft_many([request, request])

    def test_as_a_whole_if_one_request_is_wrong(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        good = DraftRequest(0, len(PROMPT), last)
        with pytest.raises(MtpBadSequenceError):
            session.draft_many([good, DraftRequest(1, 7, last)])
        assert session.statistics().drafted == 0
        session.draft_many([good])  # nothing waits


@pytest.mark.usefixtures("still_works")
class TestProcessIsRefused:
    def test_of_another_batch_than_the_last(self, target: Context, session: MtpSession) -> None:
        batch = Batch()
        batch.add_sequence(PROMPT, 0, 0)
        target.decode(batch)
        for other in ([*PROMPT[:-1], 9], PROMPT[:-1], [*PROMPT, 9]):
            wrong = Batch()
            wrong.add_sequence(other, 0, 0)
            with pytest.raises(MtpProcessError, match="not the batch"):
                session.process(wrong)
        session.process(batch)

    def test_before_any_decode(self, session: MtpSession) -> None:
        with pytest.raises(MtpProcessError):
            session.process(Batch())

    def test_of_a_prompt_twice(self, target: Context, session: MtpSession) -> None:
        batch, last = prefill(target, session)
        with pytest.raises(MtpProcessError, match="processed already"):
            session.process(batch)
        draft = session.draft(0, len(PROMPT), last)
        with pytest.raises(MtpProcessError, match="processed already"):
            session.process(batch)  # and the draft still waits
        session.process(verify_rows(target, last, draft))
        session.accept(0, 0)

    def test_of_a_later_batch_twice(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        batch = verify_rows(target, last, [])
        session.process(batch)
        with pytest.raises(MtpProcessError, match="processed already"):
            session.process(batch)

    def test_when_a_batch_was_missed(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        verify_rows(target, last, [])
        with pytest.raises(MtpProcessError, match="has taken in 5"):
            session.process(verify_rows(target, 50, []))

    def test_before_the_last_draft_was_accepted(self, target: Context, session: MtpSession) -> None:
        _, last = prefill(target, session)
        draft = session.draft(0, len(PROMPT), last)
        session.process(verify_rows(target, last, draft))
        batch = verify_rows(target, 50, [])
        with pytest.raises(MtpProcessError, match=r"accept\(\)"):
            session.process(batch)

    def test_and_its_other_sequences_stay_as_they_were(
        self, tiny: Model, target: Context, session: MtpSession
    ) -> None:
        """A batch is taken in as a whole or not at all."""
        prefill(target, session, 0)
        prefill(target, session, 1)
        verify_rows(target, 50, [], seq_id=1)  # missed
        batch = Batch()
        batch.add_sequence([60], len(PROMPT), 0)
        batch.add_sequence([60], len(PROMPT) + 1, 1)
        target.decode(batch)
        with pytest.raises(MtpProcessError, match="sequence 1"):
            session.process(batch)
        assert session.draft(0, len(PROMPT), 60) == fresh_draft(tiny, PROMPT, 60)


def test_a_batch_decoded_before_the_session_is_refused(tiny: Model) -> None:
    target, draft = make_pair(tiny)
    batch = Batch()
    batch.add_sequence(PROMPT, 0, 0)
    target.decode(batch)
    with pytest.raises(MtpBadSequenceError, match="sequence 0"):
        MtpSession(target, draft, 4, DEPTH)
    target.truncate(0, 0)
    session = MtpSession(target, draft, 4, DEPTH)
    with pytest.raises(MtpProcessError, match="before this session"):
        session.process(batch)
    target.decode(batch)
    session.process(batch)
    assert session.draft(0, len(PROMPT), 60) == fresh_draft(tiny, PROMPT, 60)


# ------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MtpSessionConfig(4, 0), "n_draft_max"),
        (MtpSessionConfig(4, -1), "n_draft_max"),
        (MtpSessionConfig(4, 33), "n_draft_max"),
        (MtpSessionConfig(4, 2**40), "out of range"),
        (MtpSessionConfig(4, DEPTH, n_min=-1), "n_min"),
        (MtpSessionConfig(4, DEPTH, n_min=DEPTH + 1), "n_min"),
        (MtpSessionConfig(4, DEPTH, p_min=float("nan")), "p_min"),
        (MtpSessionConfig(4, DEPTH, p_min=-0.1), "p_min"),
        (MtpSessionConfig(4, DEPTH, p_min=2.0), "p_min"),
        (MtpSessionConfig(4, DEPTH, p_min=float("inf")), "p_min"),
        (MtpSessionConfig(0, DEPTH), "n_seq"),
        (MtpSessionConfig(-1, DEPTH), "n_seq"),
    ],
    ids=repr,
)
def test_values_out_of_range_are_refused(
    target: Context, config: MtpSessionConfig, named: str
) -> None:
    with pytest.raises(MtpInvalidConfigError, match=named):
        MtpSession.with_config(target, Context.mtp(target), config)


class TestContextsAreRefused:
    def test_if_n_seq_differs(self, target: Context) -> None:
        with pytest.raises(MtpIncompatibleContextsError, match="n_seq=3 differs"):
            MtpSession(target, Context.mtp(target), 3, DEPTH)

    def test_if_the_target_is_an_mtp_context(self, target: Context) -> None:
        draft = Context.mtp(target)
        with pytest.raises(MtpIncompatibleContextsError, match="target is an MTP"):
            MtpSession(draft, draft, 4, DEPTH)

    def test_if_the_draft_is_a_default_context(self, tiny: Model, target: Context) -> None:
        for draft in (target, make_target(tiny)):
            with pytest.raises(MtpIncompatibleContextsError, match="must be an MTP context"):
                MtpSession(target, draft, 4, DEPTH)

    def test_if_the_draft_is_of_another_target(self, tiny: Model, target: Context) -> None:
        draft = Context.mtp(make_target(tiny))
        with pytest.raises(MtpIncompatibleContextsError, match="another target"):
            MtpSession(target, draft, 4, DEPTH)

    def test_if_they_are_of_two_models(self, tiny_path: Path, target: Context) -> None:
        with Model(tiny_path) as other:
            draft = Context.mtp(make_target(other))
            with pytest.raises(MtpIncompatibleContextsError, match="another target"):
                MtpSession(target, draft, 4, DEPTH)

    def test_if_too_few_states_are_kept(self, tiny: Model) -> None:
        target, draft = make_pair(tiny, n_rs_seq=DEPTH - 1)
        with pytest.raises(MtpIncompatibleContextsError, match="n_rs_seq of at least"):
            MtpSession(target, draft, 4, DEPTH)
        MtpSession(target, draft, 4, DEPTH - 1)

    def test_if_the_draft_context_is_taken(self, target: Context) -> None:
        """Two sessions on one draft context would overwrite each other's entries."""
        draft = Context.mtp(target)
        first = MtpSession(target, draft, 4, DEPTH)
        with pytest.raises(MtpIncompatibleContextsError, match="another session"):
            MtpSession(target, draft, 4, DEPTH)
        first.close()
        MtpSession(target, draft, 4, DEPTH)

    def test_if_one_is_closed(self, target: Context) -> None:
        draft = Context.mtp(target)
        draft.close()
        with pytest.raises(ContextError, match="closed"):
            MtpSession(target, draft, 4, DEPTH)


def test_a_refused_session_leaves_the_contexts_usable(tiny: Model) -> None:
    target, draft = make_pair(tiny)
    with pytest.raises(MtpSessionError):
        MtpSession(target, draft, 4, 0)
    session = MtpSession(target, draft, 4, DEPTH)
    stream = loops.drafted(target, session, {0: PROMPT}, COUNT, lambda *_: DEPTH)[0]
    assert stream == alone(tiny, PROMPT)


def test_a_model_without_heads_has_no_mtp_context(dense: Model) -> None:
    with pytest.raises(ContextError, match="no MTP heads"):
        Context.mtp(make_target(dense))


def test_a_second_session_takes_over_from_a_closed_one(tiny: Model) -> None:
    target, draft = make_pair(tiny)
    with MtpSession(target, draft, 4, DEPTH) as first:
        loops.drafted(target, first, PROMPTS, COUNT, lambda *_: DEPTH)
    for s in PROMPTS:
        target.truncate(s, 0)
    second = MtpSession(target, draft, 4, DEPTH)
    stream = loops.drafted(target, second, {0: PROMPT}, COUNT, lambda *_: DEPTH)[0]
    assert stream == alone(tiny, PROMPT)


# ---------------------------------------------------------------------------------- lifetime


def test_it_keeps_what_it_needs(tiny_path: Path) -> None:
    """Closing contexts and model first is harmless: the session still drafts."""
    model = Model(tiny_path)
    target, draft = make_pair(model)
    session = MtpSession(target, draft, 4, DEPTH)
    loops.feed(target, 0, PROMPT, session)
    target.close()
    draft.close()
    model.close()
    assert len(session.draft(0, len(PROMPT), 60)) == DEPTH
    assert session.statistics().drafted == DEPTH
    session.close()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_everything_can_be_closed_in_any_order(tiny_path: Path, order: tuple[int, ...]) -> None:
    model = Model(tiny_path)
    target, draft = make_pair(model, n_seq=1, n_ctx=16)
    session = MtpSession(target, draft, 1, DEPTH)
    closers: list[Callable[[], None]] = [model.close, target.close, draft.close, session.close]
    loops.feed(target, 0, PROMPT, session)
    session.draft(0, len(PROMPT), 60)
    for i in order:
        closers[i]()
        with contextlib.suppress(MtpBatchError):
            session.draft(0, len(PROMPT), 60)
    assert model.closed
    assert target.closed
    assert draft.closed
    assert session.closed


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_closing_frees_the_memory(tiny_path: Path) -> None:
    """200 rounds of model, contexts and session: each takes about 3 MB while it lives."""

    def cycle() -> None:
        with (
            Model(tiny_path) as model,
            make_target(model, n_seq=1, n_ctx=256) as target,
            Context.mtp(target) as draft,
            MtpSession(target, draft, 1, DEPTH) as session,
        ):
            loops.feed(target, 0, PROMPT, session)
            session.draft(0, len(PROMPT), 60)

    for _ in range(20):
        cycle()
    before = resident_kib()
    for _ in range(200):
        cycle()
    assert resident_kib() - before < 40_000  # a leak of a tenth of each round would be more
