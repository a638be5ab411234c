"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.server.endpoint import Answer, Service
from mtpbatch.server.errors import named_as
from mtpbatch.server.generating import (
    completed,
    finish,
    in_json,
    names_of_form,
    sampling,
    stop_reason,
    stream,
    submitted,
    tokenised,
    usage,
)
from mtpbatch.server.protocol import (
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    listed,
)
from mtpbatch.types import Completion, Delta, TokenLogprobs

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def complete(service: Service, asked: CompletionRequest, answer: Answer) -> None:
    """Answer a request."""
    n = asked.n or 1
    _check(asked, n)
    with named_as(names_of_form(asked)):
        texts = listed("prompt", asked.prompt)
        prompts = await tokenised(service, texts, asked)
        async with submitted(service, prompts, asked, **_params(asked)) as generations:
            echoes = await _echoes(service, asked, texts)
            if asked.stream:

                def follow(
                    index: int, deltas: AsyncIterator[Delta]
                ) -> AsyncIterator[CompletionChoice]:
                    return _follow(service, asked, index, deltas, echoes[index // n])

                await stream(service, asked, answer, prompts, generations, CompletionAnswer, follow)
                return
            done = await completed(service, generations)
        choices = [
            _choice(service, asked, index, completion, echoes[index // n])
            for index, completion in enumerate(done)
        ]
        await answer.json(CompletionAnswer(**answer.head, choices=choices, usage=usage(done, n)))


def _check(asked: CompletionRequest, n: int) -> None:
    if asked.best_of not in (None, n):
        raise InvalidParameterError("best_of", f"must be n={n}, or left out; got {asked.best_of}")
    if asked.max_tokens == 0 and not asked.echo:
        raise InvalidParameterError("max_tokens", "must be at least 1, but with echo; got 0")
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise InvalidParameterError(
            "echo", "cannot be combined with logprobs in a stream; leave one out"
        )


def _params(asked: CompletionRequest) -> dict[str, Any]:
    wanted = _DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    params = sampling(asked) | {"max_tokens": max(1, wanted), "logprobs": asked.logprobs}
    if asked.echo:
        params["prompt_logprobs"] = asked.logprobs
    return params


async def _echoes(
    service: Service, asked: CompletionRequest, prompts: Sequence[str | Sequence[int]]
) -> list[str]:
    """What comes before the answers to each prompt."""
    if not asked.echo:
        return [""] * len(prompts)
    return [
        prompt if isinstance(prompt, str) else await service.engine.detokenize(prompt)
        for prompt in prompts
    ]


def _choice(
    service: Service, asked: CompletionRequest, index: int, done: Completion, echo: str
) -> CompletionChoice:
    alone = asked.max_tokens == 0
    logprobs = None
    if done.logprobs is not None:
        told: list[TokenLogprobs | int] = [] if alone else list(done.logprobs)
        if done.prompt_logprobs is not None:
            told = [done.prompt_token_ids[0], *done.prompt_logprobs, *told]
        logprobs = _Told(service, asked).of(told)
    return CompletionChoice(
        index=index,
        text=echo if alone else echo + done.text,
        logprobs=logprobs,
        finish_reason="length" if alone else finish(done.finish_reason),
        stop_reason=stop_reason(done.finish_reason),
    )


class _Told:
    """What is told of tokens one after the other. State: where the next one begins in the text."""

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self._token_bytes = service.engine.token_bytes
        self._tops = bool(asked.logprobs)
        self._offset = 0

    def of(self, told: Iterable[TokenLogprobs | int]) -> CompletionLogprobs:
        """Of these; an id alone is a prompt's first token, of which nothing is known."""
        lists = CompletionLogprobs([], [], [], [] if self._tops else None)
        for one in told:
            logprob: float | None = None
            tops: dict[str, float] | None = None
            if isinstance(one, TokenLogprobs):
                logprob = in_json(one.logprob)
                tops = {}
                for token_id, its_logprob in one.top:  # of those that look alike, the first
                    tops.setdefault(self._text(token_id), in_json(its_logprob))
            text = self._text(one if isinstance(one, int) else one.token_id)
            lists.text_offset.append(self._offset)
            lists.token_logprobs.append(logprob)
            lists.tokens.append(text)
            if lists.top_logprobs is not None:
                lists.top_logprobs.append(tops)
            self._offset += len(text)
        return lists

    def _text(self, token_id: int) -> str:
        return self._token_bytes[token_id].decode(errors="replace")


async def _follow(
    service: Service,
    asked: CompletionRequest,
    index: int,
    deltas: AsyncIterator[Delta],
    echo: str,
) -> AsyncIterator[CompletionChoice]:
    """What can be said of an answer as it comes."""
    told = _Told(service, asked)
    if echo:
        yield CompletionChoice(index=index, text=echo)
    async for delta in deltas:
        if choice := _part(index, asked, delta, told):
            yield choice


def _part(
    index: int, asked: CompletionRequest, delta: Delta, told: _Told
) -> CompletionChoice | None:
    """What a delta adds; ``None`` if that is nothing yet."""
    if asked.max_tokens == 0:
        if delta.finish_reason is None:
            return None
        return CompletionChoice(index=index, text="", finish_reason="length")
    logprobs = None if delta.logprobs is None else told.of(delta.logprobs)
    if not (delta.text or delta.finish_reason or logprobs):
        return None
    return CompletionChoice(
        index=index,
        text=delta.text,
        logprobs=logprobs,
        finish_reason=finish(delta.finish_reason),
        stop_reason=stop_reason(delta.finish_reason),
    )
