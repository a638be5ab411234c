"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec
from msgspec import UNSET

from mtpbatch.chat import AnswerFormat, AnswerParser, ChatDelta, ChatPrompt, ToolCall
from mtpbatch.exceptions import ChatTemplateError, InvalidParameterError
from mtpbatch.server.endpoint import Answer, Service
from mtpbatch.server.errors import named_as
from mtpbatch.server.generating import (
    completed,
    finish,
    form,
    in_json,
    names_of_form,
    sampling,
    stop_reason,
    stream,
    submitted,
    usage,
)
from mtpbatch.server.protocol import (
    AnsweredMessage,
    AnsweredToolCall,
    CalledFunction,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    FinishReason,
    TokenLogprob,
    TopLogprob,
)
from mtpbatch.server.tools import ForcedCall, forced_call
from mtpbatch.types import Completion, Delta, TokenLogprobs


class _Reader(Protocol):
    """Takes an answer apart as it comes."""

    def feed(self, text: str) -> ChatDelta: ...

    def flush(self) -> ChatDelta: ...


_MakeReader: TypeAlias = Callable[[str], _Reader]
"""Of an answer's id, which those of its calls begin with."""


async def chat(service: Service, asked: ChatRequest, answer: Answer) -> None:
    """Answer a request."""
    n = asked.n or 1
    forced = forced_call(asked)
    params = _params(service, asked, forced)
    with named_as(_names(asked, forced)):
        prompt = await _prompt(service, asked)
        token_ids = await service.engine.tokenize(prompt.text, add_special=False)
        make_reader = _reader(asked, forced, prompt.answer)
        async with submitted(service, [token_ids], asked, **params) as generations:
            if asked.stream:

                def follow(
                    index: int, deltas: AsyncIterator[Delta]
                ) -> AsyncIterator[ChatChunkChoice]:
                    reader = make_reader(f"{answer.id}-{index}")
                    return _follow(service, asked, index, deltas, reader)

                await stream(service, asked, answer, [token_ids], generations, ChatChunk, follow)
                return
            done = await completed(service, generations)
    choices = []
    for index, completion in enumerate(done):
        reader = make_reader(f"{answer.id}-{index}")
        parts = [reader.feed(completion.text), reader.flush()]
        choices.append(_choice(service, asked, index, completion, parts))
    await answer.json(ChatAnswer(**answer.head, choices=choices, usage=usage(done, n)))


# ---------------------------------------------------------------------------- what is asked


def _params(service: Service, asked: ChatRequest, forced: ForcedCall | None) -> dict[str, Any]:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidParameterError("top_logprobs", "needs logprobs; set them to true")
    if None not in (asked.max_tokens, asked.max_completion_tokens):
        raise InvalidParameterError(
            "max_tokens",
            "cannot be combined with max_completion_tokens, its newer name; leave it out",
        )
    params = sampling(asked)
    # What the context has no room for ends the answer sooner.
    wanted = asked.max_completion_tokens or asked.max_tokens
    params["max_tokens"] = wanted or max(service.engine.model.n_ctx, asked.min_tokens or 0)
    if asked.logprobs:
        params["logprobs"] = asked.top_logprobs or 0
    if forced is not None:
        if form(asked):
            raise InvalidParameterError(
                "tool_choice",
                "that insists on a call cannot be combined with another form of the answer; leave "
                "out response_format or structured_outputs",
            )
        params["json_schema"] = forced.schema
    return params


def _names(asked: ChatRequest, forced: ForcedCall | None) -> dict[str, str]:
    names = names_of_form(asked) | {"prompt": "messages", "template_args": "chat_template_kwargs"}
    if forced is not None:
        names["json_schema"] = "tools"
    if asked.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return names


async def _prompt(service: Service, asked: ChatRequest) -> ChatPrompt:
    """What the template makes of the conversation.

    An answer that is a call has no content, and comes back so with the call's result. To templates
    that always read the content it is an empty text.
    """
    tools = None if asked.tool_choice == "none" else asked.tools
    args = _template_args(asked)
    try:
        return await service.engine.chat_prompt(asked.messages, tools, args)
    except ChatTemplateError:
        if all(message.get("content") is not None for message in asked.messages):
            raise
    messages = [
        {**message, "content": ""} if message.get("content") is None else message
        for message in asked.messages
    ]
    return await service.engine.chat_prompt(messages, tools, args)


def _template_args(asked: ChatRequest) -> dict[str, Any]:
    effort = {} if asked.reasoning_effort is None else {"reasoning_effort": asked.reasoning_effort}
    return effort | (asked.chat_template_kwargs or {})


# ---------------------------------------------------------------------- taking answers apart


class _ForcedReader:
    """Waits for all of an answer that is a call."""

    def __init__(self, forced: ForcedCall, call_id: str) -> None:
        self._forced = forced
        self._call_id = call_id
        self._text = ""

    def feed(self, text: str) -> ChatDelta:
        self._text += text
        return ChatDelta()

    def flush(self) -> ChatDelta:
        return self._forced.read(self._text, self._call_id)


def _reader(asked: ChatRequest, forced: ForcedCall | None, answers: AnswerFormat) -> _MakeReader:
    if forced is not None:
        return lambda answer_id: _ForcedReader(forced, f"{answer_id}-call-0")
    if form(asked):
        answers = AnswerFormat()  # the form has no room for markup
    return lambda answer_id: AnswerParser(answers, answer_id)


def _called(asked: ChatRequest, calls: Sequence[ToolCall], n_before: int) -> Sequence[ToolCall]:
    """Those calls that are given out, of which there may be only one."""
    if asked.parallel_tool_calls is False:
        return calls[: max(0, 1 - n_before)]
    return calls


def _written(call: ToolCall) -> CalledFunction:
    return CalledFunction(call.function.name, msgspec.json.encode(call.function.arguments).decode())


def _finish(reason: str | None, n_calls: int) -> FinishReason | None:
    return "tool_calls" if reason == "stop" and n_calls else finish(reason)


def _told(service: Service, logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    def of(token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        data = service.engine.token_bytes[token_id]
        return data.decode(errors="replace"), in_json(logprob), list(data)

    return ChatLogprobs(
        [
            TokenLogprob(*of(one.token_id, one.logprob), [TopLogprob(*of(*top)) for top in one.top])
            for one in logprobs
        ]
    )


# ------------------------------------------------------------------------------- answers


def _choice(
    service: Service,
    asked: ChatRequest,
    index: int,
    done: Completion,
    parts: Sequence[ChatDelta],
) -> ChatChoice:
    content = "".join(part.content for part in parts)
    reasoning = "".join(part.reasoning_content for part in parts)
    calls = _called(asked, [call for part in parts for call in part.tool_calls], 0)
    message = AnsweredMessage(
        role="assistant",
        content=content or (None if calls else ""),
        reasoning_content=reasoning or UNSET,
        tool_calls=[AnsweredToolCall(id=str(call.id), function=_written(call)) for call in calls]
        or UNSET,
    )
    return ChatChoice(
        index=index,
        message=message,
        logprobs=None if done.logprobs is None else _told(service, done.logprobs),
        finish_reason=_finish(done.finish_reason, len(calls)),
        stop_reason=stop_reason(done.finish_reason),
    )


async def _follow(
    service: Service,
    asked: ChatRequest,
    index: int,
    deltas: AsyncIterator[Delta],
    reader: _Reader,
) -> AsyncIterator[ChatChunkChoice]:
    """What can be said of an answer as it comes. Tokens are told of with the text that they
    complete, or once it is clear that they are markup."""
    yield ChatChunkChoice(index=index, delta=AnsweredMessage(role="assistant", content=""))
    n_calls = 0
    untold: list[TokenLogprobs] = []
    async for delta in deltas:
        untold += delta.logprobs or ()
        parts = [reader.feed(delta.text)]
        if delta.finish_reason is not None:
            parts.append(reader.flush())
        content = "".join(part.content for part in parts)
        reasoning = "".join(part.reasoning_content for part in parts)
        calls = _called(asked, [call for part in parts for call in part.tool_calls], n_calls)
        if not (content or reasoning or calls or delta.finish_reason):
            continue
        message = AnsweredMessage(
            content=content or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=[
                AnsweredToolCall(index=n_calls + i, id=str(call.id), function=_written(call))
                for i, call in enumerate(calls)
            ]
            or UNSET,
        )
        n_calls += len(calls)
        yield ChatChunkChoice(
            index=index,
            delta=message,
            logprobs=_told(service, untold) if untold else None,
            finish_reason=_finish(delta.finish_reason, n_calls),
            stop_reason=stop_reason(delta.finish_reason),
        )
        untold = []
