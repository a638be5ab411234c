"""Whatever a request holds: it is answered, or refused with an error of ours, and others work.

Here a sample. `pytest tests/hostile/test_requests.py --hypothesis-profile=hostile` tries ten times
as many.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fuzz_gguf
import mtpbatch
from mtpbatch import SamplingParams
from mtpbatch.chat.template import ChatTemplate
from mtpbatch.exceptions import GrammarError, InvalidRequestError
from random_schemas import random_schema

Call = Callable[[mtpbatch.Engine], Awaitable[object]]

# What loads of JSON, or of careless code, may put anywhere: lone surrogates, NUL, numbers that no
# integer or no double of C's holds, things nested in each other, other types altogether.
TEXT = st.text(st.characters(), max_size=40) | st.sampled_from(["", "\0", "\ud800", "a" * 5000])
NUMBER = (
    st.integers()
    | st.floats()
    | st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 1e308, 1e-308])
)
LEAF = st.none() | st.booleans() | NUMBER | TEXT | st.binary(max_size=5)
ANYTHING = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | NUMBER, inner, max_size=4),
    max_leaves=8,
)
PARAMETERS = [field.name for field in msgspec.structs.fields(SamplingParams)]
MANY = settings(suppress_health_check=list(HealthCheck))
FEW = settings(MANY, max_examples=MANY.max_examples // 4)  # of what takes a process longer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Call], object]]:
    """Runs a call on an engine, which then still answers as it did before."""
    path = fuzz_gguf.tiny_model(tmp_path_factory.mktemp("models"))
    with asyncio.Runner() as runner:
        opened = mtpbatch.Engine.open(path, n_seq=2, n_ctx=64, n_threads=1, kv_type="f32")
        engine = runner.run(opened.__aenter__())

        async def checked(call: Call) -> object:
            try:
                async with asyncio.timeout(60):
                    return await call(engine)
            except InvalidRequestError as error:
                return _in_words(error)
            finally:
                assert (await engine.generate("ab", max_tokens=3)).token_ids == expected
                assert engine.stats().free_sequences == 2

        expected = runner.run(engine.generate("ab", max_tokens=3)).token_ids
        try:
            yield lambda call: runner.run(checked(call))
        finally:
            runner.run(opened.__aexit__(None, None, None))


Run = Callable[[Call], object]


def _in_words(error: InvalidRequestError) -> InvalidRequestError:
    assert str(error)
    return error


def likely(name: str) -> st.SearchStrategy[Any]:
    """Values of a parameter that are of its type, more often than not."""
    kind = next(f.type for f in msgspec.structs.fields(SamplingParams) if f.name == name)
    numbers = st.integers(-3, 40) | st.floats(0, 2)
    options = [numbers, ANYTHING]
    if "str" in str(kind) or "Any" in str(kind):
        options += [TEXT, st.lists(TEXT, max_size=3)]
    if "dict" in str(kind):
        options += [st.dictionaries(st.integers(-2, 400), st.floats(-150, 150), max_size=4)]
    if "tuple" in str(kind):
        options += [st.lists(st.integers(-2, 400), max_size=4)]
    return st.one_of(options)


PARAMS = st.lists(st.sampled_from(PARAMETERS), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: likely(name) for name in names})
)


@MANY
@given(params=PARAMS)
@example(params={"max_tokens": "\ud800"})
@example(params={"\ud800": 1})
def test_parameters(run: Run, params: dict[str, Any]) -> None:
    # An answer may be as long as its sequence; neither is long here.
    run(lambda engine: engine.generate("ab", **params))


@MANY
@given(prompt=ANYTHING | st.lists(st.integers(-2, 400) | NUMBER, max_size=80))
def test_prompts(run: Run, prompt: Any) -> None:
    run(lambda engine: engine.generate(prompt, max_tokens=2))
    run(lambda engine: engine.embed([prompt]))


@MANY
@given(value=ANYTHING | st.lists(st.integers(-2, 400) | NUMBER, max_size=80))
def test_texts_and_tokens(run: Run, value: Any) -> None:
    run(lambda engine: engine.tokenize(value))
    run(lambda engine: engine.detokenize(value))


@MANY
@given(
    stop=st.lists(st.text("ab \n\ud800\0é", min_size=0, max_size=6) | TEXT, max_size=6),
    seed=st.integers(0, 99),
)
def test_stop_texts(run: Run, stop: list[str], seed: int) -> None:
    """The answer holds none of those that were accepted."""
    done = run(
        lambda engine: engine.generate(
            "ab", stop=stop, max_tokens=20, temperature=2.0, seed=seed, ignore_eos=True
        )
    )
    if isinstance(done, mtpbatch.Completion):
        assert not any(text in done.text for text in stop)


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "nobody"])
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES | ANYTHING,
        "content": TEXT
        | ANYTHING
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": ANYTHING}), max_size=2),
        "tool_calls": ANYTHING
        | st.lists(
            st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": ANYTHING, "arguments": ANYTHING})}
            ),
            max_size=2,
        ),
        "reasoning_content": ANYTHING,
    },
)


@MANY
@given(
    messages=ANYTHING | st.lists(MESSAGE | ANYTHING, max_size=4),
    tools=ANYTHING | st.lists(st.dictionaries(st.sampled_from(["type", "function"]), ANYTHING)),
    template_args=ANYTHING | st.dictionaries(st.sampled_from(["a", "tools"]), ANYTHING),
)
@example(messages=[{"role": "user", "content": [{"type": "\ud800"}]}], tools=None, template_args={})
@example(messages=[{"role": "user", "content": "a"}], tools=[{"type": "\ud800"}], template_args={})
@example(messages=[{"role": "user", "content": "a", "\ud800": 1}], tools=None, template_args={})
def test_conversations(run: Run, messages: Any, tools: Any, template_args: Any) -> None:
    run(lambda engine: engine.chat(messages, tools, template_args=template_args, max_tokens=1))
    with contextlib.suppress(InvalidRequestError):
        CHATML.render(messages, tools, template_args)


CHATML = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson }}"
    "<|im_end|>{% endfor %}{{ tools | tojson }}"
)

FRAGMENTS = st.sampled_from(
    """{{ }} {% %} for a in messages endfor if else endif set = namespace ( ) [ ] . | ~ * + ** %
    'x' "y" 0 9 99999999999 range lipsum cycler joiner dict messages tools raise_exception self
    __class__ __globals__ __init__ attr('__class__') map('upper') join format center(99999999)
    replace batch(3) list tojson(indent=99999999) macro f() endmacro f(f) call endcall filter
    endfilter include import extends block loop recursive break continue strftime_now('%Y')
    sort groupby('role') urlize wordwrap(1) indent(99999999) xmlattr""".split()  # noqa: SIM905 (so that it can be read)
)


@MANY
@given(st.lists(FRAGMENTS | TEXT, max_size=25).map(" ".join))
def test_templates(source: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert isinstance(ChatTemplate(source).render([{"role": "user", "content": "hi"}]), str)


REGEX = st.lists(
    st.sampled_from(
        [*"ab.*+?|()[]{}^$\\-,09", "{99}", "{1,9999}", "\\p{L}", "(?i)", "(?=", "\\b", "\0", "é"]
    ),
    max_size=14,
).map("".join)


@FEW
@given(regex=REGEX | TEXT)
def test_regexes(run: Run, regex: str) -> None:
    _keeps_to(run, regex=regex)


@st.composite
def damaged_schemas(draw: st.DrawFn) -> Any:
    """A schema with something else in the place of one of its parts."""
    schema = whole = random_schema(draw(st.randoms(use_true_random=False)))
    while draw(st.booleans()):
        inner = [part for part in schema.values() if isinstance(part, dict) and part]
        if not inner:
            break
        schema = draw(st.sampled_from(inner))
    if draw(st.booleans()) and schema:
        schema[draw(st.sampled_from(sorted(schema)))] = draw(ANYTHING)
    return whole


@FEW
@given(schema=damaged_schemas() | ANYTHING)
def test_schemas(run: Run, schema: Any) -> None:
    _keeps_to(run, json_schema=schema)


GRAMMAR = st.lists(
    st.sampled_from(
        ["root ::= ", "start: ", "a", "b", '"x"', "/[a-z]+/", "|", "\n", "(", ")", "*"]
    ),
    max_size=14,
).map("".join)


@FEW
@given(grammar=GRAMMAR | TEXT)
def test_grammars(run: Run, grammar: str) -> None:
    _keeps_to(run, grammar=grammar)


@FEW
@given(choice=st.lists(TEXT, max_size=4))
def test_choices(run: Run, choice: list[str]) -> None:
    done = _keeps_to(run, choice=choice)
    if choice and isinstance(done, mtpbatch.Completion) and done.finish_reason == "stop":
        assert done.text in choice


def _keeps_to(run: Run, **form: Any) -> object:
    """Answers that cannot go on end with an error of their own, whoever shares the batch."""

    async def generate(engine: mtpbatch.Engine) -> object:
        try:
            return await engine.generate("ab", max_tokens=8, **form)
        except (InvalidRequestError, GrammarError) as error:
            return error

    return run(generate)
