"""What requests that generate have in common: parameters, prompts, and figures of the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal

from msgspec import Struct

from mtpbatch.exceptions import EngineClosedError, InvalidParameterError
from mtpbatch.generation import Generation
from mtpbatch.server.endpoint import Answer, Service
from mtpbatch.server.protocol import (
    CompletionTokensDetails,
    FinishReason,
    Generating,
    JsonObjectFormat,
    JsonSchemaFormat,
    PromptTokensDetails,
    Usage,
)
from mtpbatch.types import Completion, Delta, SamplingParams

_AS_IN_ENGINE: Final = [
    name for name in Generating.__struct_fields__ if name in SamplingParams.__struct_fields__
]
_LEAST_LOGPROB: Final = -9999.0  # JSON has no infinity


def sampling(asked: Generating) -> dict[str, Any]:
    """The engine's parameters, but for how long the answer is and what is told of its tokens."""
    if asked.stream_options is not None and not asked.stream:
        raise InvalidParameterError("stream_options", "needs stream; set it to true")
    params = {name: value for name in _AS_IN_ENGINE if (value := getattr(asked, name)) is not None}
    params.setdefault("temperature", 1.0)
    if asked.seed is not None:
        params["seed"] = asked.seed % 2**32
    if asked.top_k is not None:
        params["top_k"] = max(0, asked.top_k)
    return params | form(asked)


def form(asked: Generating) -> dict[str, Any]:
    """The form that the answer is to keep to, as the engine's parameter; empty: none."""
    forms: dict[str, Any] = {}
    match asked.response_format:
        case JsonSchemaFormat(json_schema=given):
            forms["json_schema"] = given.schema
        case JsonObjectFormat():
            forms["json_schema"] = {"type": "object"}
    if asked.structured_outputs is not None:
        if forms:
            raise InvalidParameterError(
                "structured_outputs", "cannot be combined with response_format; give one of them"
            )
        wanted = asked.structured_outputs
        forms = {
            "json_schema": wanted.json,
            "regex": wanted.regex,
            "choice": wanted.choice,
            "grammar": wanted.grammar,
        }
        if not any(value is not None for value in forms.values()):
            raise InvalidParameterError(
                "structured_outputs", f"is empty; give one of {', '.join(wanted.__struct_fields__)}"
            )
    return {name: value for name, value in forms.items() if value is not None}


def names_of_form(asked: Generating) -> dict[str, str]:
    """What clients call those parameters."""
    if asked.structured_outputs is None:
        return {"json_schema": "response_format"}
    return {
        "json_schema": "structured_outputs.json",
        "regex": "structured_outputs.regex",
        "choice": "structured_outputs.choice",
        "grammar": "structured_outputs.grammar",
    }


async def tokenised(
    service: Service, prompts: Iterable[str | Sequence[int]], asked: Generating
) -> list[str | Sequence[int]]:
    """The prompts, as tokens where several answers share them or events tell how many they are."""
    wanted = (asked.n or 1) > 1 or _counts(asked)
    return [
        await service.engine.tokenize(prompt) if wanted and isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


@asynccontextmanager
async def submitted(
    service: Service, prompts: Sequence[str | Sequence[int]], asked: Generating, **params: Any
) -> AsyncIterator[list[Generation]]:
    """Requests for all answers, those to one prompt side by side, once all are in the queue.

    They end with the block.
    """
    generations: list[Generation] = []
    engine, n = service.engine, asked.n or 1
    _check_fits(service, len(prompts), n)
    try:
        for prompt in prompts:
            generations += engine.submit_n(prompt, n, followed=bool(asked.stream), **params)
        for generation in generations:
            await generation.entered()
        yield generations
    finally:
        for generation in generations:
            generation.cancel()


async def stream(
    service: Service,
    asked: Generating,
    answer: Answer,
    prompts: Sequence[str | Sequence[int]],
    generations: Sequence[Generation],
    event: Callable[..., Struct],
    follow: Callable[[int, AsyncIterator[Delta]], AsyncIterator[Struct]],
) -> None:
    """Answer in events: the choices that ``follow`` makes of what comes, then the usage.

    ``prompts`` are those that were submitted.
    """
    n, counts = asked.n or 1, _counts(asked)
    done: dict[int, Completion] = {}

    async def part(index: int, generation: Generation) -> AsyncIterator[Struct]:
        prompt_tokens, generated = len(prompts[index // n]), 0

        async def deltas() -> AsyncIterator[Delta]:
            nonlocal generated
            async for delta in generation:
                check_whole(delta.finish_reason)
                generated += len(delta.token_ids)
                yield delta

        async for choice in follow(index, deltas()):
            so_far = Usage(prompt_tokens, generated, prompt_tokens + generated) if counts else None
            yield event(**answer.head, choices=[choice], usage=so_far)
        [done[index]] = await completed(service, [generation])

    def last() -> list[Struct]:
        if asked.stream_options is None or not asked.stream_options.include_usage:
            return []
        in_order = [done[index] for index in range(len(generations))]
        return [event(**answer.head, choices=[], usage=usage(in_order, n))]

    await answer.stream([part(*each) for each in enumerate(generations)], last)


def _counts(asked: Generating) -> bool:
    """Whether each event is to tell how many tokens there are so far."""
    options = asked.stream_options
    return options is not None and options.include_usage and options.continuous_usage_stats


def _check_fits(service: Service, n_prompts: int, n: int) -> None:
    """Raise if so many answers would find no room even if nobody else asked for any."""
    config = service.engine.config
    if config.max_waiting is None:
        return
    room = config.n_seq + config.max_waiting
    if n_prompts * n > room:
        name = "n" if n > 1 else "prompt"
        raise InvalidParameterError(
            name,
            f"asks for {n_prompts * n} answers at once, and there is room for {room}; split it",
        )


async def completed(service: Service, generations: Iterable[Generation]) -> list[Completion]:
    """What has come of them, once all have ended."""
    done = []
    for generation in generations:
        completion = await generation
        service.pace.learn(completion)
        check_whole(completion.finish_reason)
        done.append(completion)
    return done


def check_whole(reason: str | None) -> None:
    """Raise if the engine's end has cut an answer off."""
    if reason == "abort":
        raise EngineClosedError("the engine was closed; send the request to another one")


def finish(reason: str | None) -> FinishReason | None:
    """OpenAI's words for how an answer ended: one that ran out of time was too long."""
    match reason:
        case None | "stop" | "length":
            return reason
        case _:
            return "length"


def stop_reason(reason: str | None) -> Literal["timeout"] | None:
    """What those words leave out."""
    return "timeout" if reason == "timeout" else None


def usage(done: Sequence[Completion], n: int) -> Usage:
    """Tokens of all answers, of which ``n`` follow one another to each prompt; prompts count once.

    Of a prompt's tokens, those are cached that its first answer found computed.
    """
    prompt = sum(answer.usage.prompt_tokens for answer in done[::n])
    generated = sum(answer.usage.completion_tokens for answer in done)
    accepted = sum(answer.accepted for answer in done)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptTokensDetails(
            sum(answer.usage.cached_tokens for answer in done[::n])
        ),
        completion_tokens_details=CompletionTokensDetails(
            accepted, sum(answer.drafted for answer in done) - accepted
        ),
    )


def in_json(logprob: float) -> float:
    """A log probability, as JSON can have it."""
    return max(logprob, _LEAST_LOGPROB)
