"""Chat through the engine, on a scripted model and on each event loop."""

from __future__ import annotations

from typing import Any

import pytest

import mtpbatch
from mtpbatch import ChatDelta, FunctionCall, ToolCall
from mtpbatch.testing import ScriptedBackend, open_scripted_engine

pytestmark = pytest.mark.anyio

ASK = [{"role": "user", "content": "Is it raining?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
MARKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking %}<think>{% endif %}{# </think> <tool_call> #}"
)
ANSWER = 'Let me see.\n</think>\n\nOne moment.\n<tool_call>\n{"name": "weather"}\n</tool_call>'


async def test_a_question_is_answered_and_the_conversation_goes_on() -> None:
    backend = ScriptedBackend(lambda prompt: f"[{prompt}]")
    async with open_scripted_engine(backend) as engine:
        answer = await engine.chat(ASK)
        assert answer.content == "[user: Is it raining?\nassistant: ]"
        assert (answer.reasoning_content, answer.tool_calls) == (None, ())
        assert answer.finish_reason == answer.completion.finish_reason == "stop"
        assert answer.completion.text == answer.content
        more = [*ASK, answer.message, {"role": "user", "content": "And now?"}]
        prompt = engine.apply_chat_template(more)
        assert prompt == (
            f"user: Is it raining?\nassistant: {answer.content}\nuser: And now?\nassistant: "
        )
        assert (await engine.chat(more)).content == f"[{prompt}]"


async def test_an_answer_is_taken_apart_as_the_template_says() -> None:
    backend = ScriptedBackend(lambda _: ANSWER, chat_template=MARKS)
    async with open_scripted_engine(backend) as engine:
        answer = await engine.chat(ASK, TOOLS, template_args={"enable_thinking": True})
        assert answer.reasoning_content == "Let me see."
        assert answer.content == "One moment."
        [call] = answer.tool_calls
        assert call.function == FunctionCall("weather", {})
        assert call.id is not None
        assert call.id.startswith(answer.completion.request_id)
        assert answer.message == mtpbatch.ChatMessage(
            role="assistant",
            content="One moment.",
            reasoning_content="Let me see.",
            tool_calls=(call,),
        )
        # The prompt did not open the reasoning, and there are no tools: all of it is content.
        assert (await engine.chat(ASK)).content == ANSWER


async def test_a_conversation_that_is_submitted_by_hand_is_that_of_chat() -> None:
    backend = ScriptedBackend(lambda _: ANSWER, chat_template=MARKS)
    async with open_scripted_engine(backend) as engine:
        prompt = await engine.chat_prompt(ASK, TOOLS, {"enable_thinking": True})
        assert prompt.text == engine.apply_chat_template(ASK, TOOLS, enable_thinking=True)
        token_ids = await engine.tokenize(prompt.text, add_special=False)
        answer = prompt.answer.read(await engine.submit(token_ids, followed=False))
        wanted = await engine.chat(ASK, TOOLS, template_args={"enable_thinking": True})
        assert (answer.content, answer.reasoning_content) == ("One moment.", "Let me see.")
        assert [call.function for call in answer.tool_calls] == [
            call.function for call in wanted.tool_calls
        ]


async def test_a_stream_gives_the_parts_of_its_completion() -> None:
    backend = ScriptedBackend(lambda _: ANSWER, chat_template=MARKS, acceptance=0.5)
    async with open_scripted_engine(backend) as engine:
        ask: dict[str, Any] = {"template_args": {"enable_thinking": True}}
        async with engine.stream_chat(ASK, TOOLS, **ask) as deltas:
            assert deltas.completion is None
            seen = [delta async for delta in deltas]
        answer = await deltas
        assert deltas.completion == answer
        assert deltas.request_id == answer.completion.request_id
        assert "".join(delta.content for delta in seen) == answer.content == "One moment."
        reasoning = "".join(delta.reasoning_content for delta in seen)
        assert reasoning == answer.reasoning_content == "Let me see."
        assert tuple(c for delta in seen for c in delta.tool_calls) == answer.tool_calls
        call_id = f"{deltas.request_id}-call-0"
        assert answer.tool_calls == (ToolCall(function=FunctionCall("weather", {}), id=call_id),)
        assert [delta.finish_reason for delta in seen] == [None] * (len(seen) - 1) + ["stop"]
        assert ChatDelta() not in seen, "what says nothing is not given out"
        assert len(seen) > 3


async def test_text_held_back_comes_with_the_end() -> None:
    """A limit cuts a call short: it is text."""
    backend = ScriptedBackend(lambda _: 'x <tool_call>{"na', chat_template=MARKS)
    async with open_scripted_engine(backend) as engine:
        async with engine.stream_chat(ASK, TOOLS) as deltas:
            seen = [delta async for delta in deltas]
        assert "".join(delta.content for delta in seen) == 'x <tool_call>{"na'


async def test_leaving_a_stream_ends_the_request() -> None:
    backend = ScriptedBackend(lambda _: "abc " * 50)
    gate = backend.hold_step(5)
    async with open_scripted_engine(backend) as engine:
        async with engine.stream_chat(ASK) as deltas:
            async for _ in deltas:
                await gate.reached()
                break
        gate.release()
        answer = await deltas
        assert answer.finish_reason == "abort"
        assert 0 < len(answer.content) < 200
        assert answer.content == answer.completion.text
        assert "abort" in repr(deltas)


async def test_a_prompt_holds_no_tokens_but_those_of_the_template() -> None:
    class WithBos(ScriptedBackend):
        def tokenize(self, text: str, *, add_special: bool = True, **options: Any) -> list[int]:
            return [*([0] if add_special else []), *super().tokenize(text)]

    async with open_scripted_engine(WithBos(lambda _: "ok", n_ctx=3000)) as engine:
        for content in ("short", "long " * 500):  # which is tokenised on a thread
            messages = [{"role": "user", "content": content}]
            text = engine.apply_chat_template(messages)
            wanted = tuple(await engine.tokenize(text, add_special=False))
            assert (await engine.chat(messages)).completion.prompt_token_ids == wanted
            assert (await engine.generate(text)).prompt_token_ids == (0, *wanted)
            assert await engine.tokenize(text) == [0, *wanted]


async def test_a_bad_chat_is_a_clear_error_and_starts_nothing() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        for ask, params, parameter in (
            (([],), {}, "messages"),
            ((ASK, [{}]), {}, "tools"),
            ((ASK,), {"temperature": -1}, "temperature"),
            ((ASK,), {"template_args": {"tools": 1}}, "template_args"),
            ((ASK,), {"enable_thinking": True}, "enable_thinking"),
        ):
            with pytest.raises(mtpbatch.InvalidParameterError) as caught:
                await engine.chat(*ask, **params)
            assert caught.value.parameter == parameter
            with pytest.raises(mtpbatch.InvalidParameterError):
                async with engine.stream_chat(*ask, **params):
                    pass
        assert not any(engine.stats().finished.values())
        assert engine.stats().waiting == engine.stats().running == 0


async def test_a_model_without_a_template_says_so() -> None:
    backend = ScriptedBackend(chat_template=None)
    async with open_scripted_engine(backend) as engine:
        with pytest.raises(mtpbatch.ChatTemplateError, match="carries no chat template"):
            await engine.chat(ASK)
        with pytest.raises(mtpbatch.ChatTemplateError):
            engine.apply_chat_template(ASK)
        assert (await engine.generate("a")).finish_reason == "stop"


async def test_a_broken_template_does_not_keep_the_engine_from_opening() -> None:
    async with open_scripted_engine(ScriptedBackend(chat_template="{% if %}")) as engine:
        with pytest.raises(mtpbatch.ChatTemplateError, match="cannot be read"):
            await engine.chat(ASK)


async def test_a_closed_engine_renders_nothing() -> None:
    async with open_scripted_engine(ScriptedBackend()) as engine:
        pass
    with pytest.raises(mtpbatch.EngineClosedError):
        await engine.chat(ASK)
    with pytest.raises(mtpbatch.EngineClosedError):
        engine.apply_chat_template(ASK)
