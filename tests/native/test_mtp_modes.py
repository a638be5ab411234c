"""The three kinds of MTP heads: one reused, several chained, an assistant that shares memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest

import loops
import mtpbatch
import random_model
from mtpbatch.exceptions import (
    ContextError,
    InvalidParameterError,
    MtpIncompatibleContextsError,
    MtpInitError,
    MtpInvalidConfigError,
)
from mtpbatch.native import Context, DraftRequest, Model, MtpSession, MtpSessionConfig
from mtpbatch.native.opening import open_contexts
from tinymtp import gguf_file
from tinymtp.shape import Shape

KINDS = ["reused", "chained", "assistant"]
PROMPTS = {0: [41, 52, 63], 1: [70] * 9, 2: list(range(30, 60))}
COUNT = 40
DEPTH = 3
WINDOW = 16  # of sliding-window attention: the texts outgrow it
SMALL: dict[str, Any] = {"vocab": 300, "window": WINDOW, "seed": 1}


class Drafting(NamedTuple):
    """A model, and its assistant if it has one."""

    model: Model
    assistant: Model | None = None

    def open(
        self, *, n_seq: int = 3, depth: int = DEPTH, p_min: float = 0.0, **params: Any
    ) -> tuple[Context, MtpSession]:
        given: dict[str, Any] = {
            "n_ctx": 192,
            "n_rs_seq": DEPTH,
            "kv_type": "f32",
            "n_threads": 1,
        } | params
        target = Context(self.model, n_seq=n_seq, kv_unified=False, **given)
        config = MtpSessionConfig(n_seq, depth, p_min=p_min)
        draft = Context.mtp(target, self.assistant)
        return target, MtpSession.with_config(target, draft, config)


def write(kind: str, folder: Path, mix: float) -> list[Path]:
    paths = [folder / f"{kind}-{mix}.gguf", folder / f"{kind}-{mix}-assistant.gguf"]
    if kind == "reused":
        shape = dataclasses.replace(random_model.RANDOM_SHAPE, vocab=300, width=64, ff=64, layers=2)
        random_model.write_random(paths[0], shape, mix=mix, seed=1)
    elif kind == "chained":
        random_model.write_random_step35(paths[0], mtp_heads=DEPTH, mix=mix, **SMALL)
    else:
        random_model.write_random_gemma4(*paths, mix=mix, **SMALL)
        return paths
    return paths[:1]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def drafting(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Drafting:
    """Heads that are right some of the time."""
    return Drafting(*map(Model, write(kind, tmp_path_factory.mktemp("models"), 0.3)))


@pytest.fixture(scope="module")
def agreeing(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Drafting:
    """Heads that are always right: the next token follows from the last one alone."""
    return Drafting(*map(Model, write(kind, tmp_path_factory.mktemp("models"), 0.0)))


def undrafted(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    with Context(model, n_ctx=512, kv_type="f32", n_threads=1) as context:
        return loops.greedy(context, 0, prompt, count)


@pytest.mark.parametrize("seq_ids", [[0], [2], [0, 1, 2]], ids=str)
def test_text_is_that_of_undrafted_decoding(drafting: Drafting, seq_ids: list[int]) -> None:
    """With depths that differ, change every step, and are 0 at times."""
    target, session = drafting.open()
    prompts = {s: PROMPTS[s] for s in seq_ids}
    streams = loops.drafted(target, session, prompts, COUNT, lambda s, step: (s + step) % 4)
    for s, prompt in prompts.items():
        assert streams[s].tokens == undrafted(drafting.model, prompt, COUNT), s


def test_heads_that_agree_are_accepted(agreeing: Drafting) -> None:
    target, session = agreeing.open()
    streams = loops.drafted(target, session, PROMPTS, COUNT, lambda *_: DEPTH)
    for s, prompt in PROMPTS.items():
        assert streams[s].tokens == undrafted(agreeing.model, prompt, COUNT), s
        assert streams[s].accepted == streams[s].drafted > COUNT / 2


def test_acceptance_depends_neither_on_the_id_nor_on_neighbours(drafting: Drafting) -> None:
    streams = []
    for s, neighbours in itertools.product((0, 2), ({}, PROMPTS)):
        target, session = drafting.open()
        prompts = {**neighbours, s: PROMPTS[1]}
        streams.append(loops.drafted(target, session, prompts, COUNT, lambda *_: DEPTH)[s])
    assert all(stream == streams[0] for stream in streams)
    assert streams[0].accepted > 0


def assert_drafts_as_fresh(
    drafting: Drafting, target: Context, session: MtpSession, prompts: Mapping[int, Sequence[int]]
) -> None:
    """A fresh session that gets a sequence's text as one prompt drafts the same."""
    for s, prompt in prompts.items():
        length = target.length(s)
        text = [*prompt, *undrafted(drafting.model, prompt, length - len(prompt) + 1)]
        fresh, other = drafting.open()
        loops.feed(fresh, 1, text[:length], other)
        expected = other.draft(1, length, text[length])
        assert len(expected) == DEPTH
        assert session.draft(s, length, text[length]) == expected


@pytest.mark.parametrize("every", [1, 2, 7, 1000], ids=lambda n: f"every {n}")
def test_drafts_are_those_of_a_fresh_session(drafting: Drafting, every: int) -> None:
    """Whatever was drafted, to which depth, accepted, rejected or left undrafted before."""
    target, session = drafting.open()
    loops.drafted(
        target,
        session,
        PROMPTS,
        COUNT,
        lambda s, step: (s + step // every) % 3 + 1 if step % every == 0 else 0,
    )
    assert_drafts_as_fresh(drafting, target, session, PROMPTS)


def test_small_batches_draw_the_same_drafts(drafting: Drafting) -> None:
    """What waits is spread over several decodes of each head."""
    drafts = []
    for n_batch in (512, 6):
        target, session = drafting.open(n_batch=n_batch, n_outputs_max=16)
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        requests = [DraftRequest(s, len(p), 77) for s, p in PROMPTS.items()]
        drafts.append(session.draft_many(requests))
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("head", range(DEPTH))
def test_each_head_of_a_chain_drafts_at_its_depth(tmp_path: Path, head: int) -> None:
    """One that is damaged changes no draft before its own, and its own."""

    def drafts() -> list[list[int]]:
        target, session = Drafting(Model(path)).open()
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        return session.draft_many([DraftRequest(s, len(p), 77) for s, p in PROMPTS.items()])

    [path] = write("chained", tmp_path, 0.3)
    sound = drafts()
    file = gguf.GGUFReader(path, "r+")
    name = f"blk.{2 + head}.nextn.eh_proj.weight"  # after the two layers of the trunk
    [weight] = [tensor.data for tensor in file.tensors if tensor.name == name]
    weight[:] = weight[::-1].copy()
    file.data.flush()
    del file, weight
    for before, after in zip(sound, drafts(), strict=True):
        assert after[:head] == before[:head]
        assert after[head] != before[head]


def test_p_min_and_depth_cut_drafts_short(drafting: Drafting) -> None:
    def drafts(p_min: float, depth: int) -> list[list[int]]:
        target, session = drafting.open(p_min=p_min)
        for s, prompt in PROMPTS.items():
            loops.feed(target, s, prompt, session)
        made = [DraftRequest(s, len(p), 77, depth) for s, p in PROMPTS.items()]
        return session.draft_many(made)

    full = drafts(0.0, DEPTH)
    lengths = set()
    for p_min, depth in itertools.product((0.0, 0.2, 0.5, 0.8), range(DEPTH + 1)):
        for short, whole in zip(drafts(p_min, depth), full, strict=True):
            assert short == whole[: len(short)]
            assert len(short) == depth or (p_min > 0 and len(short) < depth)
            lengths.add(len(short))
    assert lengths == set(range(DEPTH + 1))


def test_one_decode_per_depth(drafting: Drafting) -> None:
    target, session = drafting.open()
    lasts = {s: loops.best(target, loops.feed(target, s, p, session)) for s, p in PROMPTS.items()}
    session.draft_many([DraftRequest(s, len(PROMPTS[s]), t) for s, t in lasts.items()])
    assert session.statistics().decodes == DEPTH


def test_drafts_at_the_end_of_the_context(drafting: Drafting) -> None:
    target, session = drafting.open(n_ctx=24, n_seq=1)
    for length in range(19, 25):
        target.truncate(0, 0)
        loops.feed(target, 0, [50] * length, session)
        found = session.draft(0, length, 60)
        assert len(found) == min(DEPTH, max(0, 24 - length - 1))
        if length < 24:
            loops.feed(target, 0, [60, *found], session)


# ------------------------------------------------------------------------------- in an engine


@pytest.mark.parametrize("depth", [1, DEPTH])
@pytest.mark.anyio
async def test_an_engine_drafts_and_writes_the_undrafted_text(
    drafting: Drafting, depth: int
) -> None:
    assistant = str(drafting.assistant.path) if drafting.assistant else None
    given: dict[str, Any] = {"n_seq": 3, "n_ctx": 192, "n_threads": 1, "kv_type": "f32"}
    async with mtpbatch.Engine.open(
        drafting.model.path, draft_model=assistant, speculation=depth, **given
    ) as engine:
        done = await engine.generate_many(list(PROMPTS.values()), max_tokens=COUNT, ignore_eos=True)
    for completion, prompt in zip(done, PROMPTS.values(), strict=True):
        assert list(completion.token_ids) == undrafted(drafting.model, prompt, COUNT)
    assert sum(completion.accepted for completion in done) > 0


@pytest.mark.anyio
async def test_an_engine_drafts_as_deep_as_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "two.gguf"
    random_model.write_random_step35(path, mtp_heads=2, **SMALL)
    async with mtpbatch.Engine.open(path, n_ctx=64, n_threads=1) as engine:
        done = await engine.generate("And", max_tokens=20, ignore_eos=True)
        assert done.drafted > 0
        assert engine.config.n_draft_max == 2
        assert not engine.config.kv_unified
    for asked in ({"n_draft_max": 4}, {"speculation": 3}):
        with pytest.raises(mtpbatch.InvalidParameterError, match="at most 2, the MTP heads"):
            async with mtpbatch.Engine.open(path, n_ctx=64, **asked):  # type: ignore[arg-type]
                pass


@pytest.mark.anyio
async def test_an_engine_refuses_an_assistant_that_does_not_fit(
    tiny_path: Path, tmp_path: Path, pair: Drafting
) -> None:
    assert pair.assistant
    for draft_model, error in (
        (tmp_path / "none.gguf", mtpbatch.ModelLoadError),
        (pair.assistant.path, ContextError),
    ):
        with pytest.raises(error):
            async with mtpbatch.Engine.open(tiny_path, n_ctx=64, draft_model=str(draft_model)):
                pass


# ----------------------------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(*write("chained", tmp_path_factory.mktemp("models"), 0.3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Drafting:
    paths = write("assistant", tmp_path_factory.mktemp("models"), 0.3)
    return Drafting(*map(Model, paths))


def small_context(model: Model, **params: Any) -> Context:
    return Context(model, **{"n_ctx": 32, "n_seq": 2, "kv_unified": False, "n_threads": 1} | params)


def test_a_chain_drafts_no_deeper_than_it_is_long(chained: Model) -> None:
    target = small_context(chained)
    with pytest.raises(
        MtpInvalidConfigError, match="at most 3, the MTP heads that the model chains"
    ):
        MtpSession(target, Context.mtp(target), 2, DEPTH + 1)


@pytest.mark.parametrize("depth", [1, DEPTH], ids=lambda n: f"made for {n}")
def test_heads_that_never_draft_fall_no_further_behind_than_a_buffer(
    tmp_path: Path, depth: int
) -> None:
    """A chain of three heads that drafts one token at a time, in a session made for more or not.

    64 sequences whose hidden rows have 1024 floats leave each of them room for 256 pairs.
    """
    path = tmp_path / "wide-chain.gguf"
    random_model.write_random_step35(path, mtp_heads=DEPTH, mix=0.0, width=1024, **SMALL)
    target, session = Drafting(Model(path)).open(n_seq=64, depth=depth, n_ctx=600)
    streams = loops.drafted(target, session, {5: [50]}, 520, lambda *_: 1)
    length = target.length(5)
    before = session.statistics()
    expected = 1 if depth == 1 else DEPTH
    assert len(session.draft(5, length, streams[5].tokens[-1])) == expected
    after = session.statistics()
    assert after.rows - before.rows <= expected * (257 + expected)
    assert streams[5].accepted == streams[5].drafted > 200


def test_sliding_windows_need_split_cells(chained: Model, pair: Drafting) -> None:
    for model, assistant in ((chained, None), pair):
        target = small_context(model, kv_unified=True)
        with pytest.raises(MtpIncompatibleContextsError, match="kv_unified"):
            MtpSession(target, Context.mtp(target, assistant), 2, DEPTH)


class TwoHeads(Shape):
    """Its last trunk layer is a second MTP block, once the file says so."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        sizes = Shape.tensors(self)
        nextn = {name: size for name, size in sizes.items() if ".nextn." in name}
        return sizes | {name.replace("blk.4.", "blk.3."): size for name, size in nextn.items()}


def test_heads_that_llama_cpp_cannot_chain(tmp_path: Path) -> None:
    """It would abort the process."""
    path = tmp_path / "two.gguf"
    random_model.write_random(
        path, TwoHeads(vocab=300, layers=4, attention_interval=2, width=64, tied_output=False)
    )
    header = gguf.GGUFReader(path, "r+")
    header.fields["qwen35.nextn_predict_layers"].parts[-1][0] = 2
    header.data.flush()
    del header
    with pytest.raises(MtpInitError, match=r"2 MTP heads; llama\.cpp cannot chain those of qwen35"):
        Context.mtp(small_context(Model(path)))


def test_heads_without_weights_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they were split off into another file. They would abort the process."""
    finish = gguf_file.finish

    def finish_trunk(writer: Any, sizes: Mapping[str, Any], weights: Any, kind: Any) -> None:
        trunk = {name: size for name, size in sizes.items() if not name.startswith("blk.2.")}
        finish(writer, trunk, weights, kind)

    monkeypatch.setattr(gguf_file, "finish", finish_trunk)
    path = tmp_path / "trunk.gguf"
    random_model.write_random_step35(path, mtp_heads=1, **SMALL)
    with Model(path) as model:
        assert model.n_mtp_heads == 0
        with pytest.raises(ContextError, match="no MTP heads"):
            Context.mtp(small_context(model))


def test_heads_that_llama_cpp_has_no_graph_for_are_none(tmp_path: Path) -> None:
    """It would abort on hidden rows for a trunk that takes none."""
    path = tmp_path / "glm4.gguf"
    random_model.write_random_glm4(path)
    with Model(path) as model:
        assert (model.n_layer, model.n_mtp_heads) == (2, 0)
        with pytest.raises(ContextError, match="no MTP heads"):
            Context.mtp(small_context(model))
        with pytest.raises(
            InvalidParameterError, match=r"speculation: .* cannot run those of glm4"
        ):
            open_contexts(model, None, mtpbatch.EngineConfig(speculation=2))


def test_an_assistant_alone(pair: Drafting) -> None:
    assert pair.assistant
    with pytest.raises(ContextError, match="give it as that one's draft_model"):
        small_context(pair.assistant)


def test_an_assistant_of_another_model(
    pair: Drafting, tiny: Model, chained: Model, tmp_path: Path
) -> None:
    for model in (tiny, chained):
        with pytest.raises(ContextError, match="gemma4-assistant"):
            Context.mtp(small_context(model), pair.assistant)
    with pytest.raises(ContextError, match="gemma4-assistant"):
        Context.mtp(small_context(pair.model), tiny)
    for i, params in enumerate(({"width": 64}, {"vocab": 310}, {"heads": 4})):
        paths = tmp_path / f"{i}.gguf", tmp_path / f"{i}-assistant.gguf"
        random_model.write_random_gemma4(*paths, **params)  # type: ignore[arg-type]
        with pytest.raises(ContextError, match="another target"):
            Context.mtp(small_context(pair.model), Model(paths[1]))


def test_an_assistant_of_a_target_in_use(pair: Drafting) -> None:
    """Sharing memory sets it up anew."""
    target = small_context(pair.model)
    loops.feed(target, 0, [50, 60])
    with pytest.raises(ContextError, match="make the MTP context first"):
        Context.mtp(target, pair.assistant)
