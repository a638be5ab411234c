"""MtpSession: sequences saved, restored and forked go on as if nothing had been."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest

import loops
import random_model
from mtpbatch.exceptions import ContextError, MtpBadSequenceError, MtpStateError
from mtpbatch.native import Context, DraftRequest, Model, MtpSession

PROMPTS = {0: [41, 52, 63], 1: [70] * 9, 2: list(range(30, 60)), 3: [99]}
DEPTH = 3
BEFORE, AFTER = 20, 24
WINDOW = 12

WAITING = {
    "of what was accepted last": (DEPTH, DEPTH),
    "of a part": (DEPTH, 0),
    "of all": (0, 0),
    "for some heads": (DEPTH, 1),
}
"""How deep a sequence drafts, first and then, so that pairs wait for the heads."""


class Setting(NamedTuple):
    model: Model
    assistant: Model | None
    kv_unified: bool


@pytest.fixture(
    scope="module", params=["hybrid, unified", "hybrid, split", "chained heads", "assistant"]
)
def setting(
    request: pytest.FixtureRequest, tiny: Model, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    """The chain and the assistant go with sliding-window attention, which the texts outgrow."""
    if "hybrid" in request.param:
        return Setting(tiny, None, "unified" in request.param)
    folder = tmp_path_factory.mktemp("models")
    paths = folder / "model.gguf", folder / "assistant.gguf"
    shape: dict[str, Any] = {"vocab": 300, "window": WINDOW, "mix": 0.3}
    if request.param == "assistant":
        random_model.write_random_gemma4(*paths, **shape)
        return Setting(Model(paths[0]), Model(paths[1]), False)
    random_model.write_random_step35(paths[0], **shape)
    return Setting(Model(paths[0]), None, False)


class Running:
    """A session of which some sequences have drafted for a while."""

    def __init__(self, setting: Setting, n_seq: int = 4, **params: Any) -> None:
        self.setting = setting
        given: dict[str, Any] = {
            "n_ctx": 192,
            "n_rs_seq": DEPTH,
            "kv_type": "f32",
            "n_threads": 1,
        } | params
        self.target = Context(setting.model, n_seq=n_seq, kv_unified=setting.kv_unified, **given)
        draft = Context.mtp(self.target, setting.assistant)
        self.session = MtpSession(self.target, draft, n_seq, DEPTH)
        self.last: dict[int, int] = {}

    def run(self, count: int, *seq_ids: int, depth: int = DEPTH) -> dict[int, loops.Stream]:
        """Continue sequences by so many tokens, from their prompts or from where they are."""
        texts = {s: [self.last[s]] if s in self.last else PROMPTS[s] for s in seq_ids}
        streams = loops.drafted(self.target, self.session, texts, count, lambda *_: depth)
        self.last |= {s: stream.tokens[-1] for s, stream in streams.items()}
        return streams

    def restore(self, seq_id: int, state: bytes, last: int) -> None:
        self.session.restore(seq_id, state)
        self.last[seq_id] = last


@pytest.fixture
def running(setting: Setting) -> Running:
    made = Running(setting)
    made.run(BEFORE, *PROMPTS)
    return made


@pytest.fixture
def undisturbed(setting: Setting) -> dict[int, loops.Stream]:
    """What each sequence goes on with if it is left alone."""
    made = Running(setting)
    made.run(BEFORE, *PROMPTS)
    streams = made.run(AFTER, *PROMPTS)
    assert 10 < sum(x.accepted for x in streams.values()) < sum(x.drafted for x in streams.values())
    return streams


def test_saving_disturbs_nothing(running: Running, undisturbed: dict[int, loops.Stream]) -> None:
    for s in PROMPTS:
        running.session.save(s)
    assert running.run(AFTER, *PROMPTS) == undisturbed


def test_a_restored_sequence_goes_on_where_it_was_saved(
    running: Running, undisturbed: dict[int, loops.Stream]
) -> None:
    """Onto itself, after it went on; the others went on as well."""
    state, last = running.session.save(1), running.last[1]
    running.run(7, 0, 1)
    running.restore(1, state, last)
    assert running.run(AFTER, 1)[1] == undisturbed[1]


def test_into_another_sequence(running: Running, undisturbed: dict[int, loops.Stream]) -> None:
    """All streams side by side: the copy, its original, and who has nothing to do with it."""
    state = running.session.save(1)
    running.restore(2, state, running.last[1])
    streams = running.run(AFTER, *PROMPTS)
    assert streams == undisturbed | {2: undisturbed[1]}


def test_into_another_session(
    setting: Setting, running: Running, undisturbed: dict[int, loops.Stream]
) -> None:
    """One that holds other sequences, has another n_ctx, and has not drafted yet."""
    other = Running(setting, n_ctx=128)
    other.run(BEFORE, 0, depth=0)
    states = {s: running.session.save(s) for s in (1, 2)}
    other.restore(3, states[1], running.last[1])
    other.restore(1, states[2], running.last[2])
    streams = other.run(AFTER, 0, 1, 3)
    assert streams == {0: undisturbed[0], 1: undisturbed[2], 3: undisturbed[1]}


@pytest.mark.parametrize("depths", WAITING.values(), ids=WAITING.keys())
def test_what_waits_for_the_heads_waits_on(setting: Setting, depths: tuple[int, int]) -> None:
    """Saved, restored and forked as it is: nothing is decoded, and all drafts are the same."""

    def prepared() -> Running:
        made = Running(setting)
        for depth in depths:
            made.run(BEFORE, 2, 3, depth=depth)
        return made

    expected = prepared().run(AFTER, 2, 3)
    made, other = prepared(), Running(setting)
    decodes = made.session.statistics().decodes
    state = made.session.save(2)
    made.restore(0, state, made.last[2])
    made.session.fork(2, 1)
    made.last[1] = made.last[2]
    other.restore(3, state, made.last[2])
    assert made.session.statistics().decodes == decodes
    assert other.session.statistics().decodes == 0
    assert made.run(AFTER, *PROMPTS) == {s: expected[max(s, 2)] for s in PROMPTS}
    assert other.run(AFTER, 3)[3] == expected[2]


def test_what_is_restored_waiting_can_be_saved_again(setting: Setting) -> None:
    """With what came in between."""
    plain = Running(setting)
    for depth in (DEPTH, 0, 0):
        plain.run(BEFORE, 1, depth=depth)
    expected = plain.run(AFTER, 1)[1]
    one, two, three = Running(setting), Running(setting), Running(setting)
    one.run(BEFORE, 1, depth=DEPTH)
    one.run(BEFORE, 1, depth=0)
    two.restore(2, one.session.save(1), one.last[1])
    two.run(BEFORE, 2, depth=0)
    three.restore(3, two.session.save(2), two.last[2])
    assert three.run(AFTER, 3)[3] == expected


def test_at_every_length(setting: Setting) -> None:
    """States of sequences that have just rejected drafts, and were rolled back, are right too."""
    plain = Running(setting)
    plain.run(60, 1)
    text = [*PROMPTS[1], *Running(setting).run(60, 1)[1].tokens]
    stepwise = Running(setting)
    count = 0
    while stepwise.target.length(1) < 40:
        stepwise.run(4, 1)
        other = Running(setting)
        other.restore(3, stepwise.session.save(1), stepwise.last[1])
        assert stepwise.last[1] == text[stepwise.target.length(1)]
        length = other.target.length(3)
        assert other.run(8, 3)[3].tokens == text[length + 1 : length + 9]
        count += 1
    assert count > 5


def test_a_fork_and_its_source_go_on_alike(
    running: Running, undisturbed: dict[int, loops.Stream]
) -> None:
    running.session.fork(1, 2)
    running.last[2] = running.last[1]
    assert running.run(AFTER, *PROMPTS) == undisturbed | {2: undisturbed[1]}


def test_a_fork_outlives_its_source(running: Running, undisturbed: dict[int, loops.Stream]) -> None:
    running.session.fork(1, 2)
    running.target.truncate(1, 0)
    del running.last[1]
    running.run(BEFORE, 1)  # from its prompt
    running.last[2] = running.last[1]
    assert running.run(AFTER, 2)[2] == undisturbed[1]


def test_forks_that_take_different_ways(running: Running) -> None:
    """After different tokens both are as if the other had never been."""
    running.session.fork(1, 2)
    base = running.target.length(1)
    running.last |= {1: 55, 2: 66}
    streams = running.run(AFTER, 1, 2)
    for s, token in ((1, 55), (2, 66)):
        assert running.target.length(s) > base
        fresh = Running(running.setting)
        fresh.run(BEFORE, 1)
        fresh.last[1] = token
        assert fresh.run(AFTER, 1)[1] == streams[s]


def test_a_sequence_without_tokens(running: Running, undisturbed: dict[int, loops.Stream]) -> None:
    """Saved, restored and forked like any other; then it begins with its prompt."""
    running.target.truncate(3, 0)
    fresh = Running(running.setting)
    running.restore(2, fresh.session.save(0), 0)
    assert running.target.length(2) == 0
    fresh.session.fork(0, 1)
    del running.last[2]
    running.run(BEFORE, 2)
    assert running.run(AFTER, 2)[2] == undisturbed[2]


@pytest.mark.parametrize("how", ["restored", "forked"])
def test_the_very_next_draft_is_that_of_the_source(setting: Setting, how: str) -> None:
    """Nothing is decoded in between: the last hidden row has no entry in any cache yet."""
    running = Running(setting, n_seq=2 * len(PROMPTS))
    running.run(BEFORE, *PROMPTS)
    session = running.session
    copies = {s: s + len(PROMPTS) for s in PROMPTS}
    for source, copy in copies.items():
        if how == "forked":
            session.fork(source, copy)
        else:
            session.restore(copy, session.save(source))
    lengths = {s: running.target.length(s) for s in PROMPTS}
    sources = [DraftRequest(s, lengths[s], running.last[s]) for s in PROMPTS]
    same = [DraftRequest(copies[s], lengths[s], running.last[s]) for s in PROMPTS]
    drafts = session.draft_many(sources + same)
    assert drafts[: len(PROMPTS)] == drafts[len(PROMPTS) :]


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_it_all_changes_no_draft(setting: Setting, seed: int) -> None:
    """Sequences draft, pause, are saved, restored, forked and begun anew, at random.

    In the end each drafts what a fresh session drafts that gets its text as one prompt, and its
    text is the undrafted one.
    """
    choose = random.Random(seed)
    running, saved = Running(setting), list[tuple[bytes, int, list[int]]]()
    texts = {s: list(prompt) for s, prompt in PROMPTS.items()}

    def go_on(*seq_ids: int, count: int, depth: int) -> None:
        for s, stream in running.run(count, *seq_ids, depth=depth).items():
            texts[s] += stream.tokens

    go_on(*PROMPTS, count=4, depth=1)
    for _ in range(40):
        s, other = choose.sample(sorted(PROMPTS), 2)
        match choose.choice(("draft", "draft", "pause", "save", "restore", "fork", "new")):
            case "draft":
                some = choose.sample(sorted(PROMPTS), choose.randint(1, 4))
                go_on(*some, count=choose.randint(2, 9), depth=choose.randint(1, DEPTH))
            case "pause":
                go_on(s, count=choose.randint(2, 9), depth=0)
            case "save":
                saved.append((running.session.save(s), running.last[s], list(texts[s])))
            case "restore" if saved:
                state, last, text = choose.choice(saved)
                running.restore(s, state, last)
                texts[s] = list(text)
            case "fork":
                running.session.fork(s, other)
                running.last[other], texts[other] = running.last[s], list(texts[s])
            case _:
                running.target.truncate(s, 0)
                del running.last[s]
                texts[s] = list(PROMPTS[s])
                go_on(s, count=3, depth=2)
        if max(map(len, texts.values())) > 160:
            break
    for s, text in texts.items():
        length = running.target.length(s)
        assert len(text) == length + 1
        fresh = Running(setting, n_seq=4)
        row = loops.feed(fresh.target, 1, text[:length], fresh.session)
        assert loops.best(fresh.target, row) == text[length]
        expected = fresh.session.draft(1, length, text[length])
        assert running.session.draft(s, length, text[length]) == expected


def change(path: Path, tensor: int) -> None:
    """Change a tensor of a model file a little."""
    file = gguf.GGUFReader(path, "r+")
    file.tensors[tensor].data[:] *= 1.01
    file.data.flush()


def test_a_model_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states are its own in another session, and not if a weight in any file differs."""
    writer = partial(gguf.GGUFWriter, split_max_tensors=20)
    monkeypatch.setattr(gguf, "GGUFWriter", writer)
    random_model.write_random_step35(tmp_path / "many.gguf", vocab=300, window=WINDOW, mix=0.3)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2

    def opened() -> Running:
        return Running(Setting(Model(parts[0]), None, kv_unified=False))

    running = opened()
    running.run(BEFORE, 1)
    state, last = running.session.save(1), running.last[1]
    expected = running.run(AFTER, 1)[1]
    other = opened()
    other.restore(2, state, last)
    assert other.run(AFTER, 2)[2] == expected
    for part in parts:
        sound = part.read_bytes()
        change(part, 5)
        with pytest.raises(MtpStateError, match="another model"):
            opened().session.restore(2, state)
        part.write_bytes(sound)


# -------------------------------------------------------------------------------- refused


class TestNotNow:
    """Nothing is saved or forked in the middle of a step."""

    @pytest.mark.parametrize("processed", [False, True])
    def test_while_a_draft_waits(self, running: Running, processed: bool) -> None:
        target, session = running.target, running.session
        draft = session.draft(1, target.length(1), running.last[1])
        if processed:
            loops.feed(target, 1, [running.last[1], *draft], session)
        for act in (lambda: session.save(1), lambda: session.fork(1, 2)):
            with pytest.raises(
                MtpStateError, match=r"sequence 1 has a draft that waits .*accept\(\)"
            ):
                act()

    def test_before_the_last_decode_was_processed(self, running: Running) -> None:
        session = running.session
        state = session.save(1)
        loops.feed(running.target, 0, [running.last[0]])
        for act in (
            lambda: session.save(1),
            lambda: session.fork(1, 2),
            lambda: session.restore(2, state),
        ):
            with pytest.raises(MtpStateError, match="not processed"):
                act()

    def test_before_the_target_was_truncated(self, running: Running) -> None:
        target, session = running.target, running.session
        draft = session.draft(1, target.length(1), running.last[1])
        loops.feed(target, 1, [running.last[1], *draft], session)
        session.accept(1, 0)
        with pytest.raises(MtpStateError, match="truncate the target"):
            session.save(1)

    def test_onto_itself(self, running: Running) -> None:
        with pytest.raises(MtpStateError, match="onto itself"):
            running.session.fork(1, 1)

    @pytest.mark.parametrize("seq_id", [-1, 4, 2**31 - 1, 2**40])
    def test_unknown_sequences(self, running: Running, seq_id: int) -> None:
        session = running.session
        state = session.save(1)
        for act in (
            lambda: session.save(seq_id),
            lambda: session.restore(seq_id, state),
            lambda: session.fork(seq_id, 1),
            lambda: session.fork(1, seq_id),
        ):
            with pytest.raises(MtpBadSequenceError):
                act()


NUMBERS = struct.Struct("<QQQii")
"""In a state, from byte 32 on: bytes of both contexts, pairs that wait, positions, ignored."""


def forged(state: bytes, **changes: int) -> bytes:
    """With other numbers, and the checksum that belongs to them."""
    names = ("n_target", "n_draft", "n_waiting", "n_past", "ignored")
    numbers = dict(zip(names, NUMBERS.unpack_from(state, 32), strict=True)) | changes
    body = NUMBERS.pack(*numbers.values()) + state[32 + NUMBERS.size :]
    n_words = len(body) // 8
    value = 0xCBF29CE484222325
    for word in (*struct.unpack_from(f"<{n_words}Q", body), *body[8 * n_words :]):
        value = (value ^ word) * 0x100000001B3 % 2**64
        value ^= value >> 29
    return state[:24] + struct.pack("<Q", value) + body


class TestForeignStates:
    """Refused before anything of them is used: all sequences go on undisturbed."""

    @pytest.fixture(autouse=True)
    def nothing_changes(
        self, running: Running, undisturbed: dict[int, loops.Stream]
    ) -> Iterator[None]:
        yield
        assert running.run(AFTER, *PROMPTS) == undisturbed

    def refused(self, running: Running, state: bytes, reason: str) -> None:
        with pytest.raises(MtpStateError, match=reason):
            running.session.restore(1, state)

    @pytest.mark.parametrize("state", [b"", b"mtpbatch", b"x" * 64, bytes(1000)], ids=len)
    def test_of_something_else(self, running: Running, state: bytes) -> None:
        self.refused(running, state, "not a saved sequence")

    def test_truncated_and_extended(self, running: Running) -> None:
        state = running.session.save(2)
        for n in (64, 65, 300, len(state) // 2, len(state) - 1):
            self.refused(running, state[:n], "damaged")
        self.refused(running, state + b"\0", "damaged")

    def test_with_any_bit_changed(self, running: Running) -> None:
        state = running.session.save(0)
        for i in [*range(72), *range(72, len(state), len(state) // 97), len(state) - 1]:
            changed = bytearray(state)
            changed[i] ^= 1 << i % 8
            self.refused(running, bytes(changed), "damaged|not a saved|version|another model")

    def test_forged(self, running: Running, setting: Setting) -> None:
        """Its numbers contradict each other, or add up only because they overflow."""
        foreign = Running(setting)
        foreign.run(BEFORE, 0)
        foreign.run(BEFORE, 0, depth=0)
        state = foreign.session.save(0)
        assert forged(state) == state
        n_target, n_draft, n_waiting, n_past, _ = NUMBERS.unpack_from(state, 32)
        n_hidden = 4 * setting.model.n_embd
        n_pair = n_hidden + 4
        assert (n_waiting > BEFORE / 2) == (n_draft > 0) == (setting.assistant is None)
        wrong: list[dict[str, int]] = [
            *({"n_waiting": n} for n in (n_waiting + 1, n_past, n_past + 1, 2**31, 2**64 - 1)),
            *({"n_waiting": n_waiting + 2**64 // 2**k} for k in range(1, 5)),
            *({"n_waiting": n, "n_past": n} for n in (2**31 - 1, n_waiting + 1)),
            *({"n_past": n} for n in (-1, -(2**31), n_waiting - 1)),
            *({"n_target": n} for n in (0, n_target - 1, n_target + 1, 2**63, 2**64 - 1)),
            *({"n_draft": n} for n in (n_draft + 1, 2**63, 2**64 - 1)),
            {"n_target": n_target + 2**63, "n_draft": n_draft + 2**63},
        ]
        if setting.assistant:
            wrong += [
                {"n_target": n_target - 1, "n_draft": 1},
                {"n_target": n_target + n_pair, "n_waiting": 2**64 - 1},
                {"n_target": n_target - n_pair, "n_waiting": 1},
            ]
        else:
            wrong += [
                {"ignored": 1},
                {"n_past": n_waiting},
                {"n_target": n_target + n_draft, "n_draft": 0},
            ]
        for changes in wrong:
            self.refused(running, forged(state, **changes), "damaged")

    def test_forged_to_have_more_waiting_than_there_is(
        self, running: Running, setting: Setting
    ) -> None:
        if setting.assistant:
            return  # nothing waits
        foreign = Running(setting)
        foreign.run(BEFORE, 0, depth=0)
        n_past = foreign.target.length(0)
        state = foreign.session.save(0)
        assert forged(state, n_waiting=n_past) == state
        for n in (n_past - 1, 0):
            self.refused(running, forged(state, n_past=n), "damaged")

    @pytest.mark.parametrize("token", [-1, 300, 2**31 - 1])
    def test_with_no_such_token(self, running: Running, setting: Setting, token: int) -> None:
        if setting.assistant:
            return  # nothing waits
        foreign = Running(setting)
        foreign.run(BEFORE, 0, depth=0)
        state = bytearray(foreign.session.save(0))
        n_waiting = NUMBERS.unpack_from(state, 32)[2]
        n_hidden = 4 * setting.model.n_embd
        tokens = 32 + NUMBERS.size + n_hidden * (1 + n_waiting)
        assert struct.unpack_from("<3i", state, tokens) == tuple(PROMPTS[0])
        struct.pack_into("<i", state, tokens + 4 * (n_waiting - 1), token)
        self.refused(running, forged(bytes(state)), "damaged")

    def test_of_another_version(self, running: Running) -> None:
        state = bytearray(running.session.save(0))
        struct.pack_into("<Q", state, 8, 1)
        self.refused(running, bytes(state), "another version")

    def test_of_another_model(self, running: Running, tmp_path: Path, tiny: Model) -> None:
        """Of the same architecture and sizes, or not."""
        path = tmp_path / "other.gguf"
        random_model.write_random_step35(path, vocab=300, window=WINDOW + 1, mix=0.3)
        with Model(path) as model:
            for other in {model, tiny} - {running.setting.model}:
                foreign = Running(Setting(other, None, kv_unified=False), n_ctx=64)
                foreign.run(4, 0)
                self.refused(running, foreign.session.save(0), "another model")

    @pytest.mark.parametrize("tensor", [0, 7, -1])
    def test_of_a_model_with_other_weights(
        self, running: Running, setting: Setting, tmp_path: Path, tensor: int
    ) -> None:
        """Of the same name and shape: one tensor of it, or of its assistant, was trained on."""
        models = (
            [setting.model] if setting.assistant is None else [setting.model, setting.assistant]
        )
        for changed in models:
            path = tmp_path / "other.gguf"
            path.write_bytes(changed.path.read_bytes())
            change(path, tensor)
            with Model(path) as model:
                pair = [model if m is changed else m for m in (setting.model, setting.assistant)]
                assert pair[0]
                foreign = Running(Setting(pair[0], pair[1], setting.kv_unified))
                foreign.run(4, 0)
                self.refused(running, foreign.session.save(0), "another model")

    @pytest.mark.parametrize(
        ("params", "only_split"), [({"kv_type": "f16"}, False), ({"n_seq": 5}, True)]
    )
    def test_of_other_settings(
        self,
        running: Running,
        setting: Setting,
        params: dict[str, Any],
        only_split: bool,
    ) -> None:
        foreign = Running(setting, **params)
        foreign.run(4, 0)
        if only_split and setting.kv_unified:
            return  # a sequence in one pool of cells looks the same whatever its company
        self.refused(running, foreign.session.save(0), "other context settings")

    def test_longer_than_the_context(self, running: Running, setting: Setting) -> None:
        foreign = Running(setting, n_ctx=400)
        foreign.run(250, 0)
        self.refused(running, foreign.session.save(0), r"positions, more than n_ctx=192")


def test_more_than_there_are_cells_for_is_not_restored(tiny: Model) -> None:
    """Of its own cells it may use all."""
    running = Running(Setting(tiny, None, kv_unified=True), n_ctx=64, n_cells=64)
    running.run(4, 2)
    state, last = running.session.save(2), running.last[2]
    length = running.target.length(2)
    expected = running.run(AFTER, 2)[2]
    with pytest.raises(MtpStateError, match=f"has {length} positions, and the others leave fewer"):
        running.session.restore(1, state)
    running.restore(2, state, last)
    assert running.run(AFTER, 2)[2] == expected


def test_what_was_restored_cannot_be_cut(running: Running) -> None:
    """Neither the recurrent states of earlier positions nor what left the window was saved."""
    running.session.restore(2, running.session.save(1))
    length = running.target.length(2)
    with pytest.raises(ContextError, match="cannot go back"):
        running.target.truncate(2, length - 1)
    running.target.truncate(2, 0)
