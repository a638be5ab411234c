"""The caller's end of one chat request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import Any

from mtpbatch.chat.answer import AnswerFormat, AnswerParser
from mtpbatch.chat.messages import ChatCompletion, ChatDelta
from mtpbatch.generation import Generation


class ChatGeneration(AsyncIterator[ChatDelta]):
    """A chat request under way: await it for its completion, or iterate over its deltas.

    It is a :class:`~mtpbatch.Generation` whose text is taken apart, and behaves like one.

    ::

        async with engine.stream_chat(messages, max_tokens=20) as deltas:
            async for delta in deltas:
                print(delta.content, end="")
        answer = await deltas
    """

    # Touched on the loop that submitted, and only there. The parser has seen the deltas that
    # were iterated over.
    __slots__ = ("_format", "_generation", "_parser")

    def __init__(self, generation: Generation, format: AnswerFormat) -> None:
        self._generation = generation
        self._format = format
        self._parser = AnswerParser(format, generation.request_id)

    @property
    def request_id(self) -> str:
        """Names the request within its engine."""
        return self._generation.request_id

    @property
    def completion(self) -> ChatCompletion | None:
        """What came of the request, however it ended; ``None`` until then."""
        completion = self._generation.completion
        return None if completion is None else self._format.read(completion)

    def cancel(self) -> None:
        """Free what the request holds, within one step; harmless once it has ended.

        ::

            async with engine.stream_chat(messages) as deltas:
                deltas.cancel()
                assert (await deltas).finish_reason == "abort"
        """
        self._generation.cancel()

    def __await__(self) -> Generator[Any, Any, ChatCompletion]:
        completion = yield from self._generation.__await__()
        return self._format.read(completion)

    async def __anext__(self) -> ChatDelta:
        while True:
            delta = await self._generation.__anext__()
            taken = self._parser.feed(delta.text)
            if delta.finish_reason is not None:
                rest = self._parser.flush()
                return ChatDelta(
                    content=taken.content + rest.content,
                    reasoning_content=taken.reasoning_content + rest.reasoning_content,
                    tool_calls=taken.tool_calls + rest.tool_calls,
                    finish_reason=delta.finish_reason,
                )
            if taken != ChatDelta():
                return taken

    def __repr__(self) -> str:
        return f"<Chat{repr(self._generation)[1:]}"
