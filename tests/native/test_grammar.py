"""Executor: answers that keep to grammars, with the rows and drafts that they leave."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import loops
from mtpbatch.exceptions import InternalError, ModelLoadError
from mtpbatch.native import Context, Executor, Model, MtpSession, _ffi
from mtpbatch.native._library import call, ffi, lib
from mtpbatch.native.grammar import Grammar, GrammarCompiler
from mtpbatch.types import Admission, GrammarSource, Plan, PlanEntry, SamplingParams

DEPTH = 3
PROMPT = (40, 50, 60, 70, 80)
LETTERS = GrammarSource("regex", "([A-Za-z][0-9]?){3,60}!")


@pytest.fixture(scope="module")
def compilers(tiny: Model, glm: Model, dense: Model) -> Iterator[dict[str, GrammarCompiler]]:
    models = {"tiny": tiny, "glm": glm, "dense": dense}
    made = {name: GrammarCompiler(model) for name, model in models.items()}
    yield made
    for compiler in made.values():
        compiler.close()


@pytest.fixture(params=["tiny", "glm", "dense"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def compiler(compilers: dict[str, GrammarCompiler], model: Model, tiny: Model, glm: Model) -> Any:
    return compilers["tiny" if model is tiny else "glm" if model is glm else "dense"]


def make(model: Model) -> Executor:
    target = Context(model, n_seq=4, n_ctx=96, n_rs_seq=DEPTH, kv_type="f32", n_threads=2)
    if not model.n_mtp_heads:
        return Executor(target)
    return Executor(target, MtpSession(target, Context.mtp(target), target.n_seq, DEPTH))


def admit(model: Model, seq_id: int, grammar: Grammar | None, **params: Any) -> Admission:
    stop = tuple(sorted(model.eog_tokens))
    return Admission(seq_id, SamplingParams(**params), seq_id, stop, 64, grammar=grammar)


def run(
    model: Model, grammars: list[Grammar | None], depths: list[int]
) -> tuple[list[list[int]], int, int]:
    """Answers side by side; how many tokens were drafted, and rows decoded after the prompts."""
    executor = make(model)
    active = range(len(grammars))
    admissions = tuple(admit(model, s, grammars[s], temperature=1.0) for s in active)
    plan = Plan((), admissions, tuple(PlanEntry(s, PROMPT, True, 0) for s in active))
    answers: list[list[int]] = [[] for _ in active]
    n_drafted = n_rows = 0
    while plan.entries:
        result = loops.execute(executor, plan)
        going = []
        for entry, outcome in zip(plan.entries, result.entries, strict=True):
            answers[entry.seq_id] += outcome.token_ids
            n_drafted += outcome.n_drafted
            if not outcome.finish_reason:
                going.append(entry.seq_id)
        n_rows += 0 if plan.admit else result.n_target_tokens
        plan = Plan((), (), tuple(PlanEntry(s, (), True, depths[s]) for s in going))
    executor.close()
    return answers, n_drafted, n_rows


def test_drafts_of_any_length_change_nothing(model: Model, compiler: GrammarCompiler) -> None:
    """Cut where a grammar ends them, in one decode with others that are not."""
    grammars = [compiler.compile(LETTERS), None, compiler.compile(LETTERS), None]
    plain, _, _ = run(model, grammars, [0, 0, 0, 0])
    for s in (0, 2):
        text = b"".join(model.vocabulary[token] for token in plain[s]).decode()
        ended = plain[s][-1] in model.eog_tokens
        assert re.fullmatch(r"([A-Za-z][0-9]?){3,60}!" if ended else r"([A-Za-z][0-9]?)+!?", text)
    if model.n_mtp_heads:
        for depths in ([1, 1, 1, 1], [3, 3, 3, 3], [3, 0, 1, 2]):
            answers, n_drafted, _ = run(model, grammars, depths)
            assert answers == plain
            assert n_drafted > 0


@pytest.mark.parametrize("model", ["tiny", "glm"], indirect=True)
def test_no_row_is_decoded_for_drafts_that_cannot_come(
    model: Model, compiler: GrammarCompiler
) -> None:
    """Where one token alone can come, no draft that is verified is rejected."""
    nothing_but_dots = compiler.compile(GrammarSource("regex", r"\.{60}"))
    [answer], _, n_rows = run(model, [nothing_but_dots], [3])
    [dot] = model.tokenize(".", add_special=False)
    assert set(answer[:60]) == {dot}
    assert n_rows == len(answer) - 1  # the first comes of the prompt
    [free], _, n_rows = run(model, [None], [3])
    assert n_rows > len(free) - 1  # as it is where the head may be wrong


def test_a_grammar_is_for_one_model(compilers: dict[str, GrammarCompiler], tiny: Model) -> None:
    executor = make(tiny)
    other = compilers["dense"].compile(LETTERS)
    plan = Plan((), (admit(tiny, 0, other),), (PlanEntry(0, PROMPT, True, 0),))
    with pytest.raises(InternalError, match="compiled for another model"):
        loops.execute(executor, plan)
    executor.close()


def test_grammars_used_last_are_kept(compilers: dict[str, GrammarCompiler]) -> None:
    compiler = compilers["tiny"]
    first = compiler.compile(GrammarSource("regex", "first"))
    assert compiler.compile(GrammarSource("regex", "first")) is first
    for number in range(31):
        compiler.compile(GrammarSource("regex", f"{number}"))
    assert compiler.compile(GrammarSource("regex", "first")) is first
    for number in range(32):
        compiler.compile(GrammarSource("regex", f"other {number}"))
    assert compiler.compile(GrammarSource("regex", "first")) is not first


def test_a_grammar_outlives_its_compiler_while_it_is_used(tiny: Model) -> None:
    compiler = GrammarCompiler(tiny)
    grammar = compiler.compile(GrammarSource("regex", "[a-c]{20}"))
    compiler.close()
    [answer], _, _ = run(tiny, [grammar], [0])
    assert re.fullmatch("[a-c]{20}", "".join(chr(tiny.vocabulary[t][0]) for t in answer[:-1]))


@pytest.mark.parametrize(
    ("library", "message"), [("/nowhere.so", "cannot be loaded"), (None, "has no llg_")]
)
def test_another_library_is_refused(tiny: Model, library: str | None, message: str) -> None:
    path = library or str(_ffi.__file__)
    out = ffi.new("mtpbatch_grammar_compiler **")
    with pytest.raises(ModelLoadError, match=message):
        call(lib.mtpbatch_grammar_compiler_create, tiny._native, path.encode(), out)
