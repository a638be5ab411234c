"""Executor: sequences saved, parked and resumed, in as many KV cells as there are.

What comes of them is what comes of the same requests left alone, token for token.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import loops
import random_model
from mtpbatch import scheduler
from mtpbatch.exceptions import DecodeError, InternalError, InvalidParameterError
from mtpbatch.native import Context, Executor, Model, MtpSession
from mtpbatch.native.backend import NativeBackend
from mtpbatch.sequence import Sequence as RequestedSequence
from mtpbatch.speculation import DraftWish
from mtpbatch.text import TextAssembler
from mtpbatch.types import (
    NO_RESULT,
    Admission,
    Completion,
    EngineConfig,
    EntryResult,
    Park,
    Plan,
    PlanEntry,
    Resume,
    SamplingParams,
    Save,
    StepResult,
)

DEPTH = 3
PROMPT = tuple(range(40, 71))
OTHER = tuple(range(90, 101))
MAX_TOKENS = 40
SAMPLED = SamplingParams(
    temperature=1.0, seed=7, repetition_penalty=1.1, frequency_penalty=0.2, dry_multiplier=0.5
)


class Setting(NamedTuple):
    model: Model
    kv_unified: bool
    n_draft: int

    def open(self, **params: Any) -> tuple[Context, Executor]:
        given: dict[str, Any] = {
            "n_seq": 4,
            "n_ctx": 128,
            "n_rs_seq": DEPTH,
            "kv_type": "f32",
            "n_threads": 1,
            "kv_unified": self.kv_unified,
        }
        target = Context(self.model, **(given | params))
        session = None
        if self.model.n_mtp_heads:
            session = MtpSession(target, Context.mtp(target), target.n_seq, DEPTH)
        return target, Executor(target, session)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """MTP heads that take turns, and a sliding window that texts outgrow."""
    path = tmp_path_factory.mktemp("models") / "chain.gguf"
    random_model.write_random_step35(path, vocab=300, window=12, mix=0.3)
    with Model(path) as model:
        yield model


SETTINGS = [
    f"{model}, {cache}, {drafts}"
    for model in ("demo", "tiny", "glm", "chain", "dense")
    for cache in ("unified", "split")
    for drafts in ("drafts", "no drafts")
    if (model, drafts) != ("dense", "drafts") and (model, cache) != ("chain", "unified")
]


def make_setting(request: pytest.FixtureRequest) -> Setting:
    model, cache, drafts = request.param.split(", ")
    depth = DEPTH if drafts == "drafts" else 0
    return Setting(request.getfixturevalue(model), cache == "unified", depth)


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return make_setting(request)


@pytest.fixture(params=[name for name in SETTINGS if "unified" in name])
def unified(request: pytest.FixtureRequest) -> Setting:
    """Sequences take from one pool of cells, which can run out."""
    return make_setting(request)


@pytest.fixture(params=[name for name in SETTINGS if name.startswith(("glm", "dense"))])
def attention(request: pytest.FixtureRequest) -> Setting:
    """Models that can be cut back anywhere."""
    return make_setting(request)


@pytest.fixture(params=[SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    sampling: SamplingParams = request.param
    return sampling


def admit(
    seq_id: int,
    params: SamplingParams = SamplingParams(),  # noqa: B008
    *,
    max_tokens: int = MAX_TOKENS,
    snapshot: int = 0,
    n_reused: int = 0,
    drafts: bool = True,
) -> Admission:
    """A request whose ticket is 100 more than the id it begins on."""
    seed = params.seed or 0
    return Admission(seq_id, params, seed, (), max_tokens, drafts, 100 + seq_id, snapshot, n_reused)


def feed(seq_id: int, tokens: Sequence[int], *, sample: bool = True) -> PlanEntry:
    return PlanEntry(seq_id, tuple(tokens), sample, 0)


def go_on(seq_id: int, n_draft: int) -> PlanEntry:
    return PlanEntry(seq_id, (), True, n_draft)


def plan(*entries: PlanEntry, **parts: Any) -> Plan:
    given: dict[str, Any] = {"release": (), "admit": ()} | parts
    return Plan(entries=entries, **given)


def steps(executor: Executor, seq_id: int, n_draft: int, count: int) -> list[EntryResult]:
    """So many steps of a sequence, or until it has finished."""
    results: list[EntryResult] = []
    while len(results) < count and not (results and results[-1].finish_reason):
        results += loops.execute(executor, plan(go_on(seq_id, n_draft))).entries
    return results


def tokens_of(results: Sequence[EntryResult]) -> list[int]:
    return [token for result in results for token in result.token_ids]


def undisturbed(
    setting: Setting, params: SamplingParams, prompt: Sequence[int] = PROMPT
) -> list[EntryResult]:
    """A request left alone, step by step."""
    _, executor = setting.open()
    admission = admit(0, params)
    results = list(loops.execute(executor, plan(feed(0, prompt), admit=(admission,))).entries)
    return results + steps(executor, 0, setting.n_draft, 999)


def begun(
    setting: Setting, params: SamplingParams, count: int = 5, **sizes: Any
) -> tuple[Context, Executor, list[EntryResult], list[EntryResult]]:
    """A request on id 0 and another on 1, some steps later; and what they gave."""
    target, executor = setting.open(**sizes)
    first = loops.execute(
        executor,
        plan(feed(0, PROMPT), feed(1, OTHER), admit=(admit(0, params), admit(1, params))),
    ).entries
    one, other = [first[0]], [first[1]]
    for _ in range(count):
        result = loops.execute(executor, plan(go_on(0, setting.n_draft), go_on(1, setting.n_draft)))
        one.append(result.entries[0])
        other.append(result.entries[1])
    return target, executor, one, other


def park(executor: Executor, seq_id: int, snapshot: int) -> None:
    """In a plan of its own, which has a result if anything is saved."""
    results = executor.exchange(plan(park=(Park(seq_id, snapshot),)), wait=snapshot > 0)
    assert [len(result.saved) for result in results] == [1] * (snapshot > 0)


# ------------------------------------------------------------------------- parked and resumed


def test_from_its_snapshot_a_request_goes_on_as_if_it_had_never_paused(
    setting: Setting, params: SamplingParams
) -> None:
    """On another id, after a newcomer has used its own; the same drafts are accepted."""
    target, executor, one, other = begun(setting, params)
    n_held = target.length(0)
    result = loops.execute(
        executor,
        plan(
            go_on(1, setting.n_draft),
            feed(0, [99, 98, 97]),
            park=(Park(0, 5),),
            admit=(msgspec.structs.replace(admit(0), ticket=7),),
        ),
    )
    [(snapshot, n_bytes)] = result.saved
    assert snapshot == 5
    assert n_bytes > n_held * setting.model.n_embd
    assert result.save_time > 0
    other.append(result.entries[0])
    steps(executor, 0, setting.n_draft, 4)
    other += steps(executor, 1, setting.n_draft, 3)
    result = loops.execute(
        executor,
        plan(
            go_on(1, setting.n_draft),
            go_on(2, setting.n_draft),
            release=(0,),
            resume=(Resume(2, 100, 5),),
        ),
    )
    assert result.save_time > 0
    assert (result.lost, result.saved) == ((), ())
    other.append(result.entries[0])
    one.append(result.entries[1])
    one += steps(executor, 2, setting.n_draft, 999)
    other += steps(executor, 1, setting.n_draft, 999)
    assert one == undisturbed(setting, params)
    assert other == undisturbed(setting, params, OTHER)


def test_without_a_snapshot_its_tokens_are_computed_again(
    setting: Setting, params: SamplingParams
) -> None:
    """In two chunks. From there it drafts as a request does that has them as its prompt."""
    expected = tokens_of(undisturbed(setting, params))
    target, executor, one, other = begun(setting, params)
    loops.execute(executor, plan(park=(Park(0, 0),)))
    other += steps(executor, 1, setting.n_draft, 3)
    assert target.length(0) == 0
    again = (*PROMPT, *tokens_of(one))
    first = plan(
        go_on(1, setting.n_draft), feed(2, again[:20], sample=False), resume=(Resume(2, 100, 0),)
    )
    result = loops.execute(executor, first)
    assert result.saved == ()
    assert result.entries[1] == NO_RESULT
    other.append(result.entries[0])
    one += loops.execute(executor, plan(feed(2, again[20:]))).entries
    rest = steps(executor, 2, setting.n_draft, 999)
    assert tokens_of(one + rest) == expected
    assert rest[-1].finish_reason == "length"
    other += steps(executor, 1, setting.n_draft, 999)
    assert tokens_of(other) == tokens_of(undisturbed(setting, params, OTHER))

    if params.temperature == 0:
        _, executor = setting.open()
        admission = admit(0, max_tokens=MAX_TOKENS - len(again) + len(PROMPT))
        loops.execute(executor, plan(feed(0, again), admit=(admission,)))
        assert steps(executor, 0, setting.n_draft, 999) == rest


def test_tokens_to_compute_again_wait_for_their_next_chunk(setting: Setting) -> None:
    """Though the plan with the first one runs ahead, and they had been complete before."""
    target, executor, one, other = begun(setting, SAMPLED)
    park(executor, 0, 0)
    again = (*PROMPT, *tokens_of(one))
    first = plan(
        go_on(1, setting.n_draft),
        feed(0, again[:20], sample=False),
        resume=(Resume(0, 100, 0),),
        run_ahead=99,
    )
    results = executor.exchange(first, wait=True)
    while not other[-1].finish_reason:
        other += [result.entries[0] for result in results]
        assert all(result.entries[1] == NO_RESULT for result in results)
        results = executor.exchange(None, wait=not other[-1].finish_reason)
    assert target.length(0) == 20
    one += loops.execute(executor, plan(feed(0, again[20:]))).entries
    one += steps(executor, 0, setting.n_draft, 999)
    assert tokens_of(one) == tokens_of(undisturbed(setting, SAMPLED))


@pytest.mark.parametrize("snapshot", [0, 9])
def test_parked_again_and_again(setting: Setting, snapshot: int) -> None:
    """At every step, onto any id; in the end nobody holds a cell."""
    expected = tokens_of(undisturbed(setting, SAMPLED))
    target, executor, one, _ = begun(setting, SAMPLED, count=1)
    seq_id, turn = 0, 0
    while not one[-1].finish_reason:
        park(executor, seq_id, snapshot)
        turn += 1
        seq_id = (0, 2, 3)[turn % 3]
        entry = go_on(seq_id, setting.n_draft)
        if not snapshot:
            entry = feed(seq_id, (*PROMPT, *tokens_of(one)))
        resume = plan(entry, resume=(Resume(seq_id, 100, snapshot),))
        one += loops.execute(executor, resume).entries
        if snapshot:
            loops.execute(executor, plan(drop=(snapshot,)))
    assert tokens_of(one) == expected
    assert turn > 5
    loops.execute(executor, plan(release=(seq_id, 1)))
    four = plan(*(feed(s, [50 + s]) for s in range(4)), admit=tuple(admit(s) for s in range(4)))
    loops.execute(executor, four)
    assert [target.length(s) for s in range(4)] == [1] * 4


def test_in_the_middle_of_its_prompt(setting: Setting, params: SamplingParams) -> None:
    expected = undisturbed(setting, params)
    _, executor = setting.open()
    loops.execute(executor, plan(feed(0, PROMPT[:9], sample=False), admit=(admit(0, params),)))
    loops.execute(executor, plan(feed(1, OTHER), park=(Park(0, 1),), admit=(admit(1),)))
    resume = plan(feed(0, PROMPT[9:]), resume=(Resume(0, 100, 1),))
    one = list(loops.execute(executor, resume).entries)
    assert tokens_of(one + steps(executor, 0, setting.n_draft, 999)) == tokens_of(expected)


def test_progress_of_stop_texts_is_kept(setting: Setting) -> None:
    """One that is half complete when the request is parked ends it all the same."""
    tokens = tokens_of(undisturbed(setting, SAMPLED))
    pieces = [setting.model.token_bytes(token) for token in tokens]
    text = b"".join(pieces[5:9]).decode()
    assert text not in b"".join(pieces[:8]).decode()
    for snapshot in (0, 1):
        _, executor = setting.open()
        admission = admit(0, msgspec.structs.replace(SAMPLED, stop=(text,)))
        one = list(loops.execute(executor, plan(feed(0, PROMPT), admit=(admission,))).entries)
        one += steps(executor, 0, 0, 6)
        assert tokens_of(one) == tokens[:7]
        entry = go_on(0, 0) if snapshot else feed(0, (*PROMPT, *tokens[:7]))
        loops.execute(executor, plan(feed(1, [50]), park=(Park(0, snapshot),), admit=(admit(1),)))
        one += loops.execute(executor, plan(entry, resume=(Resume(0, 100, snapshot),))).entries
        one += loops.execute(executor, plan(go_on(0, 0))).entries
        assert tokens_of(one) == tokens[:9]
        result = loops.execute(executor, plan(go_on(0, 0), go_on(1, 0)))
        assert result.entries[0] == NO_RESULT


# ----------------------------------------------------------- moved: both in the same plan


def test_who_moves_goes_on_as_if_it_had_stayed(setting: Setting, params: SamplingParams) -> None:
    """While plans run ahead, to an id that is released at once and from one that is taken again."""
    _, executor, one, other = begun(setting, params)
    loops.execute(executor, plan(feed(3, [50, 51]), admit=(admit(3),)))
    plans = [
        plan(go_on(0, setting.n_draft), go_on(1, setting.n_draft), number=1),
        plan(
            go_on(1, setting.n_draft),
            go_on(3, setting.n_draft),
            feed(0, [99, 98, 97]),
            park=(Park(0, 5), Park(1, 6)),
            release=(3,),
            resume=(Resume(1, 100, 5), Resume(3, 101, 6)),
            admit=(msgspec.structs.replace(admit(0), ticket=7),),
            number=2,
        ),
        plan(go_on(1, setting.n_draft), go_on(3, setting.n_draft), drop=(5, 6), number=3),
    ]
    results = take_all(executor, plans)
    assert [len(result.saved) for result in results] == [0, 2, 0]
    assert [result.lost for result in results] == [()] * 3
    for result in results:
        one.append(result.entries[0])
        other.append(result.entries[1])
    one += steps(executor, 1, setting.n_draft, 999)
    other += steps(executor, 3, setting.n_draft, 999)
    assert one == undisturbed(setting, params)
    assert other == undisturbed(setting, params, OTHER)


@pytest.mark.parametrize("name", ["demo", "glm", "chain"])
def test_who_is_left_on_scattered_ids_moves_and_gives_the_same_tokens(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's plans, in a cache of equal shares. They are the tokens of llama.cpp alone."""
    monkeypatch.setattr(scheduler, "_RUN_AHEAD", 1)  # steps do not run away from who makes plans
    model: Model = request.getfixturevalue(name)
    config = EngineConfig(n_seq=8, n_ctx=128, n_threads=1, kv_type="f32", kv_unified=False)
    backend = NativeBackend(model.path, config)
    makes_plans = scheduler.Scheduler(backend.facts, snapshot_bytes=2**30)
    snapshots = makes_plans._snapshots
    snapshots.report(snapshots.take(100, 0.0), 10**6)  # before a size is known only one would move
    prompts = [[40 + number, *OTHER] for number in range(8)]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(ignore_eos=True)
        one = RequestedSequence(
            str(number),
            number,
            tuple(prompt),
            params,
            seed=0,
            max_tokens=100 if number in (1, 4, 7) else 4,
            wish=DraftWish(backend.facts.n_draft_max, adaptive=False),
            n_draft_max=backend.facts.n_draft_max,
            followed=True,
            assembler=TextAssembler(backend.token_bytes, ()),
            submitted=0.0,
        )
        makes_plans.add(one)
    moved = []
    ended: list[Completion] = []
    while len(ended) < 8:
        made = makes_plans.schedule(0.0)
        if made is not None and made.park:
            old = [entry.seq_id for entry in made.park]
            moved.append((old, [entry.seq_id for entry in made.resume]))
        for result in backend.exchange(made, wait=made is None):
            events = makes_plans.update(result, 0.0)
            ended += [event.completion for event in events if event.completion]
    backend.close()
    assert moved[0] == ([4, 7], [0, 2])
    assert sum(completion.accepted for completion in ended) > 20
    for completion in ended:
        alone = Context(model, n_seq=1, n_ctx=128, n_threads=1, kv_type="f32")
        expected = loops.greedy(alone, 0, completion.prompt_token_ids, len(completion.token_ids))
        assert list(completion.token_ids) == expected
        alone.close()


def test_who_ended_before_it_moved_can_still_be_saved(setting: Setting) -> None:
    """The plan is made before that is known; what comes next begins with all of it."""
    expected = tokens_of(undisturbed(setting, SamplingParams()))
    target, executor = setting.open()
    loops.execute(executor, plan(feed(0, PROMPT), admit=(admit(0, max_tokens=3),)))
    ended = [result.finish_reason for result in steps(executor, 0, 0, 2)]
    assert ended == [None, "length"]
    n_held = target.length(0)
    moves = plan(go_on(2, 0), park=(Park(0, 1),), resume=(Resume(2, 100, 1),))
    assert loops.execute(executor, moves).entries == (NO_RESULT,)
    assert (target.length(0), target.length(2)) == (0, n_held)
    first = plan(
        feed(1, expected[2:3]),
        save=(Save(2, 2),),
        release=(2,),
        admit=(admit(1, max_tokens=MAX_TOKENS - 3, snapshot=2, n_reused=n_held),),
    )
    rest = [*loops.execute(executor, first).entries, *steps(executor, 1, setting.n_draft, 999)]
    assert tokens_of(rest) == expected[3:]


# --------------------------------------------------------------------- started from a snapshot


def save_after(executor: Executor, prompt: Sequence[int], **parts: Any) -> StepResult:
    """Prefill a prompt on id 0 and save it as snapshot 1."""
    admission = admit(0, **parts)
    loops.execute(executor, plan(feed(0, prompt, sample=False), admit=(admission,)))
    [result] = executor.exchange(plan(save=(Save(0, 1),), number=77), wait=True)
    return result


def test_a_plan_that_only_saves_has_a_result(setting: Setting) -> None:
    _, executor = setting.open()
    result = save_after(executor, PROMPT)
    assert (result.plan, result.entries, result.error) == (77, (), None)
    [(snapshot, n_bytes)] = result.saved
    assert (snapshot, n_bytes > 0) == (1, True)
    assert result.save_time > 0


def test_a_prompt_that_begins_with_a_snapshot(setting: Setting, params: SamplingParams) -> None:
    """Several at once, and the one that was saved: the same tokens and drafts as from the start."""
    expected = undisturbed(setting, params)
    _, executor = setting.open()
    save_after(executor, PROMPT[:20], params=params)
    admissions = tuple(admit(s, params, snapshot=1, n_reused=20) for s in (1, 2))
    one = plan(*(feed(s, PROMPT[20:]) for s in (0, 1, 2)), admit=admissions)
    streams = [[result] for result in loops.execute(executor, one).entries]
    loops.execute(executor, plan(drop=(1,)))
    while not streams[0][-1].finish_reason:
        together = plan(*(go_on(s, setting.n_draft) for s in (0, 1, 2)))
        for stream, result in zip(streams, loops.execute(executor, together).entries, strict=True):
            stream.append(result)
    assert streams == [expected] * 3


def test_a_conversation_that_goes_on(setting: Setting) -> None:
    """What a finished request has decoded is the next one's beginning: saved as it is released."""
    target, executor = setting.open()
    first = list(loops.execute(executor, plan(feed(0, PROMPT), admit=(admit(0),))).entries)
    first += steps(executor, 0, setting.n_draft, 999)
    n_held = target.length(0)
    text = [*PROMPT, *tokens_of(first)]
    by_draft = first[-1].n_accepted == len(first[-1].token_ids)
    assert n_held == len(text) - 1 + by_draft, "the last token is held only if it was drafted"
    more = [*text[n_held:], 80, 81, 82]
    [result] = executor.exchange(plan(save=(Save(0, 3),), release=(0,)), wait=True)
    assert result.saved[0][1] > 0
    assert target.length(0) == 0
    second = list(
        loops.execute(
            executor, plan(feed(3, more), admit=(admit(3, snapshot=3, n_reused=n_held),))
        ).entries
    )
    second += steps(executor, 3, setting.n_draft, 999)
    expected = undisturbed(setting, SamplingParams(), [*text, 80, 81, 82])
    assert tokens_of(second) == tokens_of(expected)


def test_attention_alone_reuses_a_part(attention: Setting, params: SamplingParams) -> None:
    """The first tokens of a snapshot, and another end. They wait for the head still."""
    prompt = (*PROMPT[:13], *OTHER)
    expected = undisturbed(attention, params, prompt)
    for n_reused in (1, 12, 13):
        target, executor = attention.open()
        save_after(executor, PROMPT)
        admission = admit(2, params, snapshot=1, n_reused=n_reused)
        one = list(
            loops.execute(executor, plan(feed(2, prompt[n_reused:]), admit=(admission,))).entries
        )
        assert target.length(2) == len(prompt)
        one += steps(executor, 2, attention.n_draft, 999)
        assert one == expected


def test_what_waits_is_cut_too(attention: Setting) -> None:
    """Of a snapshot that the head has taken in up to a point, and is cut before or behind it.

    Only before it the head lacks a hidden row, and is not misled by that.
    """
    target, executor, one, _ = begun(attention, SamplingParams())
    n_taken_in = target.length(0)
    one += steps(executor, 0, 0, 10)
    n_held = target.length(0)
    executor.exchange(plan(save=(Save(0, 1),)), wait=True)
    text = (*PROMPT, *tokens_of(one))
    for n_reused in (n_taken_in - DEPTH - 1, n_taken_in, n_held - 1, n_held):
        prompt = (*text[:n_reused], *OTHER)
        expected = undisturbed(attention, SamplingParams(), prompt)
        admission = admit(2, snapshot=1, n_reused=n_reused)
        another = list(loops.execute(executor, plan(feed(2, OTHER), admit=(admission,))).entries)
        another += steps(executor, 2, attention.n_draft, 999)
        loops.execute(executor, plan(release=(2,)))
        if n_reused >= n_taken_in:
            assert another == expected
        else:
            assert tokens_of(another) == tokens_of(expected)
            accepted = [sum(entry.n_accepted for entry in all_) for all_ in (another, expected)]
            assert accepted[0] >= 0.8 * accepted[1]


def test_what_is_not_reused_holds_no_cells(glm: Model) -> None:
    """Neither of the model nor of its head."""
    setting = Setting(glm, kv_unified=True, n_draft=DEPTH)
    target, executor = setting.open(n_ctx=72, n_cells=80)
    save_after(executor, [50] * 60, max_tokens=1)
    reusing = admit(1, snapshot=1, n_reused=5)
    loops.execute(executor, plan(feed(1, [51]), release=(0,), admit=(reusing,)))
    assert target.length(1) == 6
    long = plan(feed(2, [52] * 60), admit=(admit(2, max_tokens=12),))
    one = list(loops.execute(executor, long).entries)
    one += steps(executor, 2, DEPTH, 999)
    assert len(tokens_of(one)) == 12


def test_who_never_drafts_starts_from_who_did(setting: Setting) -> None:
    """And nothing is kept for it from then on; the other way round it is refused."""
    expected = tokens_of(undisturbed(setting, SamplingParams()))
    _, executor = setting.open()
    save_after(executor, PROMPT[:20])
    silent = admit(1, snapshot=1, n_reused=20, drafts=False)
    drafting = admit(2, snapshot=1, n_reused=20)
    both = plan(feed(1, PROMPT[20:]), feed(2, PROMPT[20:]), admit=(silent, drafting))
    one = [loops.execute(executor, both).entries[0]]
    [result] = executor.exchange(plan(save=(Save(1, 2), Save(2, 3))), wait=True)
    [(_, n_silent), (_, n_drafting)] = result.saved
    assert (n_silent < n_drafting) == (setting.model.n_mtp_heads > 0)
    one += steps(executor, 1, 0, 999)
    assert tokens_of(one) == expected
    wrong = plan(feed(3, [50]), admit=(admit(3, snapshot=2, n_reused=len(PROMPT)),))
    if setting.model.n_mtp_heads:
        with pytest.raises(InternalError, match="a request that never did"):
            executor.exchange(wrong, wait=False)
    else:
        loops.execute(executor, wrong)


# ------------------------------------------------------------------------------------- long churn


@dataclasses.dataclass(slots=True, eq=False)
class Life:
    """One request of the churn."""

    prompt: tuple[int, ...]
    expected: list[int]
    ticket: int
    n_fed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    parked_with: int = 0
    again: bool = False
    """Whether all its tokens are fed again."""

    @property
    def text(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    @property
    def n_held(self) -> int:
        """Tokens it has decoded, while it is not over."""
        return len(self.text) - 1 if self.tokens and not self.again else self.n_fed

    def entry(self, seq_id: int, n_most: int, n_draft: int) -> PlanEntry:
        known = self.text if self.again else self.prompt
        chunk = known[self.n_fed : self.n_fed + n_most]
        self.n_fed += len(chunk)
        self.again = self.again and self.n_fed < len(known)
        return PlanEntry(seq_id, chunk, self.n_fed >= len(known), n_draft)


def test_any_mix_of_it_all_gives_the_tokens_of_requests_left_alone(setting: Setting) -> None:
    """Requests are parked, resumed, saved and started from what fits, in chunks, on any id."""
    draw = random.Random(1)
    prompts = [PROMPT, (*PROMPT[:20], *OTHER), OTHER, (*OTHER, 33, 34)]
    texts = [(p, tokens_of(undisturbed(setting, SAMPLED, p))) for p in prompts]
    target, executor = setting.open()
    numbers = itertools.count(1)
    running: dict[int, Life] = {}
    parked: list[Life] = []
    kept: dict[int, tuple[int, ...]] = {}
    done: list[int] = []
    n_done, n_started, n_reused = 0, 0, 0
    while n_done < 8:
        saves, parks, drops, resumes, admissions = [], [], [], [], []
        for seq_id, life in list(running.items()):
            match draw.choice(("go on",) * 8 + ("save", "park", "drop state")):
                case "save":
                    saves.append(Save(seq_id, next(numbers)))
                    kept[saves[-1].snapshot] = life.text[: life.n_held]
                case "park":
                    life.parked_with = next(numbers)
                    kept[life.parked_with] = life.text[: life.n_held]
                    parks.append(Park(seq_id, life.parked_with))
                    parked.append(running.pop(seq_id))
                case "drop state":
                    life.n_fed, life.again = 0, len(life.tokens) > 0
                    life.parked_with = 0
                    parks.append(Park(seq_id, 0))
                    parked.append(running.pop(seq_id))
        for number in list(kept):
            if draw.random() < 0.1 and all(life.parked_with != number for life in parked):
                drops.append(number)
                del kept[number]
        free = [s for s in range(4) if s not in running]
        draw.shuffle(free)
        for seq_id in free[: draw.randint(0, 4)]:
            if parked and draw.random() < 0.6:
                life = parked.pop(draw.randrange(len(parked)))
                resumes.append(Resume(seq_id, life.ticket, life.parked_with))
            else:
                life = Life(*draw.choice(texts), ticket=next(numbers))
                number, n = best_start(setting, kept, life.prompt)
                life.n_fed = n
                n_reused += n > 0
                admission = admit(seq_id, SAMPLED, snapshot=number, n_reused=n)
                admissions.append(msgspec.structs.replace(admission, ticket=life.ticket))
                n_started += 1
            running[seq_id] = life
        entries = [
            life.entry(s, draw.randint(1, 25), draw.randint(0, setting.n_draft))
            for s, life in running.items()
        ]
        one = plan(
            *entries,
            release=tuple(done),
            save=tuple(saves),
            park=tuple(parks),
            drop=tuple(drops),
            admit=tuple(admissions),
            resume=tuple(resumes),
        )
        done = []
        if not entries:
            executor.exchange(one, wait=any(park.snapshot for park in parks))
            continue
        result = loops.execute(executor, one)
        assert all(n_bytes for _, n_bytes in result.saved)
        assert result.lost == ()
        for (seq_id, life), outcome in zip(list(running.items()), result.entries, strict=True):
            life.tokens += outcome.token_ids
            assert life.tokens == life.expected[: len(life.tokens)]
            if outcome.finish_reason:
                done.append(seq_id)
                del running[seq_id]
                n_done += 1
            else:
                assert target.length(seq_id) == life.n_held
    assert n_started > n_reused > 0


def best_start(
    setting: Setting, kept: Mapping[int, Sequence[int]], prompt: Sequence[int]
) -> tuple[int, int]:
    """The snapshot with the longest beginning of a prompt, and how long it is."""
    found = (0, 0)
    for number, tokens in kept.items():
        n = 0
        while n < min(len(tokens), len(prompt) - 1) and tokens[n] == prompt[n]:
            n += 1
        if n > found[1] and (
            n == len(tokens) or setting.model.architecture in ("glm4moe", "llama")
        ):
            found = (number, n)
    return found


# ------------------------------------------------------------------------------- cells run out


def test_a_plan_is_repeated_for_as_long_as_there_are_cells(
    unified: Setting, params: SamplingParams
) -> None:
    """Then the wait ends; one is parked, the other goes on, and the first one after it."""
    expected = [tokens_of(undisturbed(unified, params, p)) for p in (PROMPT, OTHER)]
    n_cells = 100
    target, executor = unified.open(n_ctx=72, n_cells=n_cells)
    streams: list[list[EntryResult]] = [[], []]

    def take(results: list[StepResult], *which: int) -> None:
        for result in results:
            assert result.error is None
            for i, entry in zip(which, result.entries, strict=result.plan > 0):
                streams[i].append(entry)

    entries = (
        PlanEntry(0, PROMPT, True, unified.n_draft),
        PlanEntry(1, OTHER, True, unified.n_draft),
    )
    admissions = (admit(0, params), admit(1, params))
    take(
        executor.exchange(
            plan(*entries, admit=admissions, number=1, run_ahead=999, followed=False), wait=True
        ),
        0,
        1,
    )
    n_next = 2 * (1 + unified.n_draft)
    while target.length(0) + target.length(1) + n_next <= n_cells:
        take(executor.exchange(None, wait=True), 0, 1)
    take(executor.exchange(None, wait=False), 0, 1)
    assert target.length(0) + target.length(1) <= n_cells
    assert not any(stream[-1].finish_reason for stream in streams)
    executor.wake()
    assert executor.exchange(None, wait=True) == []

    with_park = plan(
        go_on(1, unified.n_draft), park=(Park(0, 1),), number=2, run_ahead=999, followed=False
    )
    take(executor.exchange(with_park, wait=True), 1)
    while not streams[1][-1].finish_reason:
        take(executor.exchange(None, wait=True), 1)
    resume = plan(
        go_on(0, unified.n_draft),
        release=(1,),
        resume=(Resume(0, 100, 1),),
        number=3,
        run_ahead=999,
        followed=False,
    )
    results = executor.exchange(resume, wait=True)
    while not streams[0][-1].finish_reason:
        take([result for result in results if result.plan == 3], 0)
        results = executor.exchange(None, wait=not streams[0][-1].finish_reason)
    assert [tokens_of(stream) for stream in streams] == expected


def test_a_step_that_finds_no_cells_fails_before_it_begins(unified: Setting) -> None:
    target, executor = unified.open(n_ctx=40, n_cells=70)
    loops.execute(executor, plan(feed(0, [50] * 30), admit=(admit(0, max_tokens=2),)))
    loops.execute(executor, plan(feed(1, [50] * 30), admit=(admit(1, max_tokens=9),)))
    with pytest.raises(DecodeError, match="the step needs 71 KV cells, of n_cells=70"):
        loops.execute(executor, plan(feed(2, [50] * 11), admit=(admit(2, max_tokens=2),)))
    assert [target.length(s) for s in range(4)] == [30, 30, 0, 0]


def test_no_more_cells_are_drafted_into_than_there_are(unified: Setting) -> None:
    """To the last cell, drafts included."""
    n_rows = 1 + unified.n_draft
    n_cells = 60
    _, executor = unified.open(n_ctx=50, n_cells=n_cells)
    length = n_cells - 30 - n_rows
    loops.execute(executor, plan(feed(0, [50] * 30), admit=(admit(0, max_tokens=2),)))
    loops.execute(executor, plan(feed(1, [51] * length), admit=(admit(1, max_tokens=20),)))
    [result] = loops.execute(executor, plan(go_on(1, unified.n_draft))).entries
    assert result.token_ids
    with pytest.raises(DecodeError, match="KV cells"):
        loops.execute(executor, plan(go_on(1, unified.n_draft)))


@pytest.mark.parametrize("kind", ["demo", "dense"])
def test_holes_take_what_is_restored(kind: str, request: pytest.FixtureRequest) -> None:
    """Sequences took one cell each in turn; those that left left holes of one cell."""
    setting = Setting(request.getfixturevalue(kind), kv_unified=True, n_draft=0)
    expected = tokens_of(undisturbed(setting, SamplingParams()))
    target, executor, one, _ = begun(setting, SamplingParams(), n_seq=8, n_cells=256)
    park(executor, 0, 1)
    many = range(2, 8)
    admissions = tuple(admit(s, max_tokens=100) for s in many)
    loops.execute(
        executor, plan(*(feed(s, [50 + s]) for s in many), release=(1,), admit=admissions)
    )
    while target.length(2) < 256 // 6:
        loops.execute(executor, plan(*(go_on(s, 0) for s in many)))
    resume = plan(go_on(0, 0), go_on(3, 0), release=(2, 4, 6), resume=(Resume(0, 100, 1),))
    one.append(loops.execute(executor, resume).entries[0])
    one += steps(executor, 0, 0, 999)
    assert tokens_of(one) == expected


# ------------------------------------------------------------------------------------ failures


def test_what_was_lost_cannot_be_saved_and_who_starts_from_it_is_lost(unified: Setting) -> None:
    """The others go on."""
    target, executor = unified.open(n_ctx=72, n_cells=80)
    loops.execute(executor, plan(feed(0, [50] * 20, sample=False), admit=(admit(0),)))
    with pytest.raises(DecodeError):
        loops.execute(
            executor, plan(feed(0, [50] * 12), feed(1, [50] * 49), admit=(admit(1, max_tokens=9),))
        )
    saving = plan(feed(2, OTHER), save=(Save(0, 8),), release=(0, 1), admit=(admit(2),))
    result = loops.execute(executor, saving)
    assert result.saved == ((8, 0),)
    other = [result.entries[0]]
    admission = admit(3, snapshot=8, n_reused=32, max_tokens=2)
    starting = plan(go_on(2, unified.n_draft), feed(3, [50]), admit=(admission,))
    result = loops.execute(executor, starting)
    assert result.lost == (3,)
    assert result.entries[1] == NO_RESULT
    assert target.length(3) == 0
    other.append(result.entries[0])
    other += steps(executor, 2, unified.n_draft, 999)
    assert other == undisturbed(unified, SamplingParams(), OTHER)


def test_a_restore_that_finds_no_cells_loses_that_sequence_alone(unified: Setting) -> None:
    target, executor = unified.open(n_ctx=72, n_cells=85)
    save_after(executor, PROMPT[:-1])  # 30 cells
    starts = {s: admit(s, snapshot=1, n_reused=30, max_tokens=20) for s in (1, 2, 3)}
    last = PROMPT[-1:]
    both = plan(feed(1, last), feed(2, last), release=(0,), admit=(starts[1], starts[2]))
    result = loops.execute(executor, both)
    assert result.lost == ()
    one = [result.entries[0]]
    result = loops.execute(
        executor, plan(feed(3, last), go_on(1, unified.n_draft), admit=(starts[3],))
    )
    assert result.lost == (3,)
    assert result.entries[0] == NO_RESULT
    one.append(result.entries[1])
    assert [target.length(s) for s in (0, 3)] == [0, 0]
    loops.execute(executor, plan(release=(2, 3)))
    one += steps(executor, 1, unified.n_draft, 999)
    assert tokens_of(one) == tokens_of(undisturbed(unified, SamplingParams()))[:20]


def test_who_could_not_be_restored_is_parked_once_more_and_computed_again(
    unified: Setting, params: SamplingParams
) -> None:
    """How it samples is not lost."""
    expected = tokens_of(undisturbed(unified, params))
    _, executor, one, _ = begun(unified, params, n_ctx=72, n_cells=80)
    park(executor, 0, 1)
    filling = plan(feed(2, [50] * 60), release=(1,), admit=(admit(2, max_tokens=9),))
    loops.execute(executor, filling)
    resume = plan(go_on(0, 0), go_on(2, 0), resume=(Resume(0, 100, 1),))
    result = loops.execute(executor, resume)
    assert (result.lost, result.entries[0]) == ((0,), NO_RESULT)
    again = plan(
        feed(0, [*PROMPT, *tokens_of(one)]),
        park=(Park(0, 0),),
        release=(2,),
        drop=(1,),
        resume=(Resume(0, 100, 0),),
    )
    one += loops.execute(executor, again).entries
    one += steps(executor, 0, unified.n_draft, 999)
    assert tokens_of(one) == expected


def test_a_request_that_is_cancelled_while_it_is_parked_stays_cancelled(setting: Setting) -> None:
    target, executor, _, _ = begun(setting, SamplingParams())
    n_held = target.length(0)
    park(executor, 0, 1)
    executor.cancel(100)
    assert executor.exchange(None, wait=True) == []
    result = loops.execute(executor, plan(go_on(2, 0), go_on(1, 0), resume=(Resume(2, 100, 1),)))
    assert result.entries[0] == NO_RESULT
    assert result.entries[1].token_ids
    assert result.lost == ()
    assert target.length(2) == n_held, "it has its state, and takes no part"
    park(executor, 1, 2)
    executor.cancel(101)
    assert executor.exchange(None, wait=True) == []
    again = plan(feed(0, OTHER), resume=(Resume(0, 101, 0),))
    assert loops.execute(executor, again).entries == (NO_RESULT,)


def test_a_parked_request_can_be_forgotten(setting: Setting) -> None:
    """Its ticket and its snapshot's number are free again."""
    _, executor, _, _ = begun(setting, SamplingParams())
    park(executor, 0, 1)
    loops.execute(executor, plan(forget=(100,), drop=(1,)))
    with pytest.raises(InternalError, match="ticket 100, which is not parked"):
        executor.exchange(plan(go_on(2, 0), resume=(Resume(2, 100, 1),)), wait=False)
    loops.execute(executor, plan(feed(0, PROMPT), admit=(admit(0),)))
    park(executor, 0, 1)
    resume = plan(go_on(2, 0), resume=(Resume(2, 100, 1),))
    expected = undisturbed(Setting(setting.model, setting.kv_unified, 0), SamplingParams())
    assert loops.execute(executor, resume).entries == (expected[1],)


# ------------------------------------------------------------------------ plans that wait


def take_all(executor: Executor, plans: Sequence[Plan]) -> list[StepResult]:
    """Results of plans that are handed over at once, up to the last one's."""
    results: list[StepResult] = []
    for one in plans:
        results += executor.exchange(one, wait=False)
    while not results or results[-1].plan != plans[-1].number:
        results += executor.exchange(None, wait=True)
    return results


def test_a_plan_that_only_releases_leaves_the_report_to_the_plan_that_saved(
    setting: Setting,
) -> None:
    """It is begun beside that one, before its step."""
    _, executor, _, _ = begun(setting, SamplingParams())
    waiting = (
        plan(feed(2, [50] * 60, sample=False), admit=(admit(2, max_tokens=2),), number=1),
        plan(go_on(0, 0), save=(Save(1, 5),), number=2),
        plan(release=(1,)),
        plan(go_on(0, 0), number=3),
    )
    saved = {result.plan: len(result.saved) for result in take_all(executor, waiting)}
    assert saved == {1: 0, 2: 1, 3: 0}


def test_what_is_released_early_was_saved_before(setting: Setting) -> None:
    """Plans handed over at once: each snapshot is of its plan's moment, whoever leaves after."""
    expected = tokens_of(undisturbed(setting, SamplingParams()))
    for _ in range(10):
        target, executor = setting.open()
        n = len(PROMPT)
        plans = [
            plan(feed(0, PROMPT), feed(1, OTHER), admit=(admit(0), admit(1)), number=1),
            plan(go_on(0, 0), go_on(1, 0), number=2),
            plan(go_on(1, 0), save=(Save(0, 1),), release=(0,), number=3),
            plan(
                feed(2, expected[1:2]),
                go_on(1, 0),
                admit=(admit(2, snapshot=1, n_reused=n + 1),),
                number=4,
            ),
            plan(park=(Park(2, 2),), release=(1,), number=5),
            plan(go_on(0, 0), resume=(Resume(0, 102, 2),), number=6),
        ]
        results = take_all(executor, plans)
        assert [result.plan for result in results] == [1, 2, 3, 4, 5, 6]
        assert tokens_of([results[i].entries[0] for i in (0, 1)]) == expected[:2]
        assert tokens_of([results[i].entries[0] for i in (3, 5)]) == expected[2:4]
        assert results[4].entries == ()
        assert [len(result.saved) for result in results] == [0, 0, 1, 0, 1, 0]
        assert target.length(1) == target.length(2) == 0


def test_who_is_resumed_by_a_plan_that_waits_is_released_after_it(setting: Setting) -> None:
    for _ in range(10):
        target, executor, _, _ = begun(setting, SamplingParams(), count=1)
        plans = [
            plan(go_on(1, 0), park=(Park(0, 1),), number=1),
            plan(go_on(1, 0), go_on(0, 0), resume=(Resume(0, 100, 1),), number=2),
            plan(go_on(1, 0), release=(0,), number=3),
        ]
        results = take_all(executor, plans)
        assert results[1].entries[1].token_ids
        assert target.length(0) == 0


def test_a_save_waits_for_the_step_of_the_plan_before(setting: Setting) -> None:
    """Also one of a plan without entries, which is otherwise carried out at once."""
    for _ in range(10):
        _, executor = setting.open()
        reused = admit(1, snapshot=1, n_reused=20)
        plans = [
            plan(feed(0, PROMPT[:20], sample=False), admit=(admit(0),), number=1),
            plan(save=(Save(0, 1),), number=2),
            plan(feed(1, PROMPT[20:]), admit=(reused,), number=3),
        ]
        results = take_all(executor, plans)
        assert [result.plan for result in results] == [1, 2, 3]
        assert results[2].lost == ()


# -------------------------------------------------------------------------------- wrong plans

WRONG = {
    "not active": (plan(save=(Save(3, 9),)), "sequence 3 is saved but not active"),
    "0 is no snapshot": (plan(save=(Save(0, 0),)), "0 is no snapshot's number"),
    "a number twice": (plan(save=(Save(0, 1),)), "there is a snapshot 1 already"),
    "parked twice": (plan(park=(Park(0, 0), Park(0, 0))), "parked but not active"),
    "unknown sequence": (plan(park=(Park(9, 0),)), "there is no sequence 9"),
    "parked and planned": (plan(go_on(0, 0), park=(Park(0, 0),)), "sequence 0 is not active"),
    "parked and released": (plan(park=(Park(0, 0),), release=(0,)), "released but not active"),
    "of one ticket": (plan(park=(Park(2, 0),)), "ticket 101 is parked already"),
    "no snapshot to drop": (plan(drop=(2,)), "snapshot 2 is dropped, but there is none"),
    "dropped twice": (plan(drop=(1, 1)), "snapshot 1 is dropped, but there is none"),
    "nobody to forget": (plan(forget=(100,)), "no request of ticket 100 is parked"),
    "nobody to resume": (
        plan(go_on(3, 0), resume=(Resume(3, 100, 0),)),
        "ticket 100, which is not parked",
    ),
    "resumed on a taken id": (
        plan(go_on(0, 0), resume=(Resume(0, 101, 7),)),
        "sequence 0 is resumed but active",
    ),
    "resumed twice": (
        plan(go_on(1, 0), go_on(3, 0), resume=(Resume(1, 101, 7), Resume(3, 101, 7))),
        "ticket 101, which is not parked",
    ),
    "from another's snapshot": (
        plan(go_on(3, 0), resume=(Resume(3, 101, 1),)),
        "was not parked with snapshot 1",
    ),
    "from what is dropped": (
        plan(go_on(3, 0), drop=(7,), resume=(Resume(3, 101, 7),)),
        "there is no snapshot 7",
    ),
    "resumed without an entry": (
        plan(go_on(0, 0), resume=(Resume(3, 101, 7),)),
        "sequence 3 is resumed without an entry",
    ),
    "computed again from nothing": (
        plan(go_on(3, 0), resume=(Resume(3, 101, 0),)),
        "sequence 3 needs tokens of its prompt",
    ),
    "more tokens than it can have": (
        plan(feed(3, [50] * 60), resume=(Resume(3, 101, 0),)),
        "resumes with more tokens than it can have",
    ),
    "prompt of who resumes with all": (
        plan(feed(3, [50]), resume=(Resume(3, 101, 7),)),
        "has its whole prompt already",
    ),
    "from no snapshot": (
        plan(feed(3, [50]), admit=(admit(3, snapshot=6, n_reused=5),)),
        "there is no snapshot 6",
    ),
    "reused from nothing": (
        plan(feed(3, [50]), admit=(admit(3, n_reused=5),)),
        "reuses tokens of no snapshot",
    ),
    "nothing reused": (
        plan(feed(3, [50]), admit=(admit(3, snapshot=1),)),
        "reuses 0 tokens of a snapshot that has at most 70",
    ),
    "more reused than there can be": (
        plan(feed(3, [50]), admit=(admit(3, snapshot=1, n_reused=72),)),
        "reuses 72 tokens of a snapshot that has at most 70",
    ),
    "no room for the rest": (
        plan(feed(3, [50] * 60), admit=(admit(3, snapshot=1, n_reused=35),)),
        "would outgrow n_ctx=128",
    ),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_plan_changes_nothing(tiny: Model, wrong: Plan, words: str) -> None:
    """0 runs and is snapshot 1; 1 is parked with snapshot 7, and 2 has the same ticket."""
    setting = Setting(tiny, kv_unified=True, n_draft=DEPTH)
    _, executor, one, other = begun(setting, SamplingParams())
    namesake = msgspec.structs.replace(admit(2), ticket=101)
    result = loops.execute(
        executor,
        plan(
            go_on(0, DEPTH),
            feed(2, [50]),
            save=(Save(0, 1),),
            park=(Park(1, 7),),
            admit=(namesake,),
        ),
    )
    one.append(result.entries[0])
    with pytest.raises(InternalError, match=words):
        executor.exchange(wrong, wait=False)
    other += loops.execute(executor, plan(go_on(3, DEPTH), resume=(Resume(3, 101, 7),))).entries
    other += steps(executor, 3, DEPTH, 999)
    one += steps(executor, 0, DEPTH, 999)
    assert one == undisturbed(setting, SamplingParams())
    assert other == undisturbed(setting, SamplingParams(), OTHER)


def test_a_model_that_cannot_cut_says_so(tiny: Model) -> None:
    setting = Setting(tiny, kv_unified=True, n_draft=DEPTH)
    _, executor = setting.open()
    save_after(executor, PROMPT)
    wrong = plan(feed(1, [50]), admit=(admit(1, snapshot=1, n_reused=30),))
    with pytest.raises(InternalError, match="has 31 or more, and the model cannot cut it"):
        executor.exchange(wrong, wait=False)


def test_what_the_rules_cannot_know_loses_the_sequence(tiny: Model) -> None:
    """How long the snapshot of a generating sequence is."""
    setting = Setting(tiny, kv_unified=True, n_draft=0)
    target, executor, _, _ = begun(setting, SamplingParams(), count=3)
    executor.exchange(plan(save=(Save(0, 1),)), wait=True)
    n_held = target.length(0)
    for n_reused in (n_held - 1, n_held + 1):
        one = plan(feed(2, [50]), admit=(admit(2, snapshot=1, n_reused=n_reused),))
        result = loops.execute(executor, one)
        assert result.lost == (2,)
        assert result.entries == (NO_RESULT,)
        assert target.length(2) == 0
        loops.execute(executor, plan(release=(2,)))
    one = plan(feed(2, [50]), admit=(admit(2, snapshot=1, n_reused=n_held),))
    assert loops.execute(executor, one).entries[0].token_ids


# ------------------------------------------------------------------------- as an engine opens it


def facts(path: Path, **config: Any) -> Any:
    backend = NativeBackend(path, EngineConfig(**config))
    try:
        assert backend.config.n_cells == backend.facts.n_cells
        return backend.facts
    finally:
        backend.close()


def test_the_cells_of_an_engine(demo_path: Path, dense_path: Path) -> None:
    assert facts(demo_path, n_seq=4, n_ctx=100).n_cells == 400
    assert facts(demo_path, n_seq=4, n_ctx=100, n_cells=250).n_cells == 250
    assert facts(demo_path, n_seq=4, n_ctx=100, n_cells=999).n_cells == 400
    assert facts(demo_path, n_seq=4, n_ctx=100, kv_unified=False).n_cells == 400
    small = facts(dense_path, n_seq=4, n_cells=200)
    assert (small.n_ctx, small.n_cells, small.n_batch) == (200, 200, 200)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"n_ctx": 100, "n_cells": 99}, "must be at least n_ctx=100"),
        ({"n_seq": 32, "n_ctx": 100, "n_cells": 120}, r"n_seq \* \(1 \+ n_draft_max\) = 128"),
        ({"n_ctx": 100, "n_cells": 200, "kv_unified": False}, "needs kv_unified, which is off"),
    ],
    ids=str,
)
def test_cells_that_cannot_be_are_refused(
    demo_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words) as caught:
        NativeBackend(demo_path, EngineConfig(**config))
    assert caught.value.parameter == "n_cells"


def test_equal_shares_leave_no_choice_of_cells(tmp_path: Path) -> None:
    random_model.write_random_step35(tmp_path / "chain.gguf")
    with pytest.raises(InvalidParameterError, match="drafts with equal shares only: set n_draft_m"):
        NativeBackend(tmp_path / "chain.gguf", EngineConfig(n_seq=2, n_ctx=64, n_cells=100))
