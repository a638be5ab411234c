"""The caller's end of one request."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from mtpbatch._loops import EventLoop, LoopEvent, ThreadEvent
from mtpbatch._process import HomeProcess
from mtpbatch.exceptions import InvalidRequestError, MtpBatchError
from mtpbatch.scheduler import Event
from mtpbatch.types import Completion, Delta


class Generation(AsyncIterator[Delta]):
    """A submitted request: await it for its completion, or iterate over its deltas.

    ::

        generation = engine.submit("Once upon a time", max_tokens=100)
        async for delta in generation:
            print(delta.text, end="")
        completion = await generation

    Deltas are kept until they are iterated over, each is given out once, and awaiting does not
    use them up. Both waits raise the error that ended the request, if one did; its
    ``completion`` holds what there was by then. As with an :class:`asyncio.Task`, a wait that is
    cancelled cancels the request. Waiting belongs to the event loop that submitted; ``cancel``
    may be called from any thread.
    """

    # All but ``_entry`` is touched on the loop that submitted, and only there.
    __slots__ = (
        "_cancel",
        "_changed",
        "_deltas",
        "_entry",
        "_home",
        "_loop",
        "_outcome",
        "_request_id",
    )

    def __init__(
        self, request_id: str, loop: EventLoop, home: HomeProcess, cancel: Callable[[], None]
    ) -> None:
        self._request_id = request_id
        self._loop = loop
        self._home = home
        self._cancel = cancel
        self._deltas: deque[Delta] = deque()
        self._outcome: Completion | MtpBatchError | None = None
        self._changed: LoopEvent | None = None
        self._entry = ThreadEvent()  # it has got room in the queue, or has ended

    @property
    def request_id(self) -> str:
        """Names the request within its engine."""
        return self._request_id

    @property
    def completion(self) -> Completion | None:
        """What came of the request, however it ended; ``None`` until then.

        It stays ``None`` if an error ended the request before it could start.
        """
        if isinstance(self._outcome, MtpBatchError):
            return self._outcome.completion
        return self._outcome

    def cancel(self) -> None:
        """Free what the request holds, within one step; harmless once it has ended.

        It then ends with the finish reason "abort", unless it ended by itself meanwhile.

        ::

            generation = engine.submit("Once upon a time", ignore_eos=True)
            generation.cancel()
            assert (await generation).finish_reason == "abort"
        """
        self._home.check("generation")
        if self._outcome is None:
            self._cancel()

    def __await__(self) -> Generator[Any, Any, Completion]:
        return self._result().__await__()

    async def _result(self) -> Completion:
        while self._outcome is None:
            await self._change()
        if isinstance(self._outcome, MtpBatchError):
            raise self._outcome.with_traceback(None)
        return self._outcome

    async def entered(self) -> None:
        """Wait until the request is in the queue. Raises the error that ended it before.

        ::

            generation = engine.submit("In the beginning", max_tokens=8)
            await generation.entered()
        """
        await self._entry.wait()
        if isinstance(self._outcome, MtpBatchError):
            raise self._outcome.with_traceback(None)

    async def __anext__(self) -> Delta:
        while not self._deltas:
            if self._outcome is None:
                await self._change()
            elif isinstance(self._outcome, MtpBatchError):
                raise self._outcome.with_traceback(None)
            else:
                raise StopAsyncIteration
        return self._deltas.popleft()

    def __repr__(self) -> str:
        if self._outcome is None:
            state = "under way"
        elif isinstance(self._outcome, MtpBatchError):
            state = f"error, {self._outcome}"
        else:
            state = f"{self._outcome.finish_reason}, {len(self._outcome.token_ids)} tokens"
        return f"<Generation {self._request_id}: {state}>"

    async def _change(self) -> None:
        self._home.check("generation")
        if EventLoop.current() != self._loop:
            raise InvalidRequestError(
                "a generation is awaited on the loop that submitted it; submit it on this one"
            )
        if self._changed is None:
            self._changed = self._loop.event()
        try:
            await self._changed.wait()
        except BaseException:
            self.cancel()
            raise

    def _receive(self, event: Event, *, followed: bool) -> None:
        """Take in what the engine delivers, on the loop that submitted."""
        if followed and event.delta is not None:
            self._deltas.append(event.delta)
        self._outcome = event.error or event.completion
        if event.last:
            self._entry.set()
        if self._changed is not None:
            self._changed.set()
            self._changed = None
