"""The async face of the engine, and its thread.

::

    event loops                               engine thread
    submit ─────────────── inbox ───────────▶ take in · schedule · exchange · update
    Generation ◀── one mailbox for each loop ─ deliver

Guarantees:

- The engine's thread never waits for an event loop, and a loop never waits for a step.
- A step waits for neither: while one runs, the engine's thread takes in the results of the last
  and hands over the next plan; if it comes too late, the backend goes on without it.
- Every request that was taken in gets exactly one last event. Who removes it from ``Intake.live``
  sends that event, and only who has the turn removes; but for a request that could not be handed
  to the tokenizer's thread, of which its caller hears at once.
- The turn, ``_turn``, is the engine's thread's whenever that is not in a native call. Scheduler and
  sequences belong to who has it. So requests can be ended while a native call does not.
- The backend is made, used and closed on the engine's thread; the ``Tokenizer`` alone uses it
  elsewhere, and closing waits for it; embeddings have a thread and a context of their own, which
  end before the backend does.

What threads share, besides the inbox, stands in :class:`Gate` and :class:`Intake`, and changes only
under the gate's lock; ``_stats`` is an immutable snapshot, replaced as a whole.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import abc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Literal, Unpack

import anyio
import anyio.to_thread
import msgspec

from mtpbatch._log import log
from mtpbatch._loops import ThreadEvent
from mtpbatch.backend import Backend, BackendFactory, Mortal
from mtpbatch.chat import ChatCompletion, ChatPrompt, ChatTemplate
from mtpbatch.chat.generation import ChatGeneration
from mtpbatch.embedding import EmbeddingThread
from mtpbatch.exceptions import (
    ChatTemplateError,
    DecodeError,
    EngineStalledError,
    InvalidParameterError,
    MtpBatchError,
    NativeDiedError,
)
from mtpbatch.gate import Gate
from mtpbatch.generation import Generation
from mtpbatch.intake import Intake, Live, Post, drawn_seed
from mtpbatch.loading import Loading, model_path
from mtpbatch.options import EngineOptions, SamplingOptions
from mtpbatch.restarts import Restarts, Watchdog
from mtpbatch.scheduler import Event, Scheduler
from mtpbatch.speculation import draft_wish
from mtpbatch.tokenizing import Prompt, Tokenizer, snapshot
from mtpbatch.types import (
    Completion,
    Embeddings,
    EngineConfig,
    EngineStats,
    ModelFacts,
    SamplingParams,
    SequenceStep,
    StepResult,
    TemplateSource,
    parse,
)
from mtpbatch.watching import RequestEnded, Watcher, Watchers

_CLOSING_TIME: Final = 10.0  # seconds that closing waits for a native call


class Engine:
    """Runs many generations at once on one model.

    ::

        async with mtpbatch.Engine.open("model.gguf", n_seq=16) as engine:
            completion = await engine.generate("def fib(n):", max_tokens=64)

    One engine may serve any number of tasks, and of event loops in other threads. The sampling
    parameters of all methods that take a prompt are the fields of
    :class:`~mtpbatch.SamplingParams`. A bad argument raises
    :class:`~mtpbatch.InvalidParameterError`, which names it, before anything is started; one that
    can only be found in the tokens of a prompt, :class:`~mtpbatch.PromptTooLongError` for example,
    when they are known.

    What every call may raise is not said again below: :class:`~mtpbatch.EngineClosedError` (closed,
    or it drains and takes no requests), :class:`~mtpbatch.EngineDeadError` and
    :class:`~mtpbatch.WrongProcessError`; and what awaits or follows a request,
    :class:`~mtpbatch.DecodeError` if a step it took part in failed,
    :class:`~mtpbatch.GrammarError` if its answer cannot go on by its grammar, and
    :class:`~mtpbatch.NativeDiedError` if the process that ran the model died.
    """

    # ------------------------------------------------------------------ opening, closing

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: Callable[[float], object] | None = None,
        **config: Unpack[EngineOptions],
    ) -> AsyncIterator[Engine]:
        """Load a model, as an async context manager; leaving the block closes the engine.

        ``model`` is the path of a GGUF file; without one the demo model in the package is used.
        ``progress`` is called on the event loop with the loaded share, 0 to 1. The other
        arguments are the fields of :class:`~mtpbatch.EngineConfig`. Loading happens on a thread,
        and stops when the task that waits for it is cancelled.

        Raises :class:`~mtpbatch.ModelLoadError`, :class:`~mtpbatch.ContextError` (no memory), or
        :class:`~mtpbatch.InvalidParameterError`.

        ::

            async with mtpbatch.Engine.open("model.gguf", n_seq=16, progress=print) as engine:
                print(engine)
        """
        parsed = parse(EngineConfig, config)
        if progress is not None and not callable(progress):
            raise InvalidParameterError(
                "progress", f"must be a function of the loaded share, or None; got {progress!r}"
            )
        with model_path(model) as path:

            def load(report: Callable[[float], bool]) -> Backend:
                # Only here: the native layer loads llama.cpp.
                if parsed.isolation == "process":
                    from mtpbatch.isolated import ProcessBackend

                    return ProcessBackend(path, parsed, report)
                from mtpbatch.native import NativeBackend

                return NativeBackend(path, parsed, report)

            engine = await cls._start(load, progress=progress)
            try:
                yield engine
            finally:
                # A forked child that leaves the block has nothing to close.
                if engine._gate.home.here:
                    await engine.aclose()

    def __init__(self, make_backend: Callable[[], Backend], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gate = Gate()
        self._turn = threading.Lock()
        self._watchers = Watchers()
        self._left_behind = False
        self._watchdog = Watchdog()  # of the native part that runs now
        self._death: NativeDiedError | None = None  # of the native part, until it is up again
        self._last_step = 0.0  # when the results of one were taken in, or some became possible
        self._ready = ThreadEvent()
        self._drained = ThreadEvent()
        self._ended = ThreadEvent()
        # At exit the interpreter waits for threads that are not daemons before it calls the exit
        # handlers, so that an engine somebody forgot would hang it; and it kills daemons after
        # that, in the middle of native code, which can crash. So: a daemon that an exit handler
        # stops and joins while everything is still there.
        self._thread = threading.Thread(
            target=self._run, args=(make_backend,), name="mtpbatch-engine", daemon=True
        )
        self._thread.start()
        atexit.register(self._stop_at_exit)

    @classmethod
    async def _start(
        cls,
        make_backend: BackendFactory,
        *,
        progress: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Engine:
        """An engine that is ready; it is closed again if anything prevents that."""
        loading = Loading(progress)
        engine = cls(partial(make_backend, loading.report), clock)
        try:
            await engine._ready.wait()
            failure = loading.failure or engine._gate.failure
            if failure is not None:
                raise failure
            draft_wish(None, engine.config, engine.model)  # is the config's wish one it can have?
        except BaseException:
            loading.give_up()
            await engine.aclose()
            raise
        return engine

    # Where time runs out, nothing is raised: requests end.
    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Take no more requests, and wait until those that wait and run have ended.

        After ``timeout`` seconds what is left ends with the finish reason "abort", with what it has
        by then. From the call on, new requests raise :class:`~mtpbatch.EngineClosedError`. All
        else goes on as before, until the engine is closed. Called again, it waits for the same
        end, with a deadline of its own. If the waiting task is cancelled, requests run on.

        ::

            async with mtpbatch.Engine.open("model.gguf") as engine:
                generation = engine.submit("In the beginning", max_tokens=8)
                await engine.drain(timeout=30)
                assert generation.completion is not None
        """
        self._gate.check_alive()
        if timeout is not None:
            _check_seconds("timeout", timeout)
        if self._gate.drain():
            log.info("engine.draining", requests=len(self._intake.live), timeout=timeout)
        if not self._intake.live:
            self._drained.set()
        with anyio.move_on_after(timeout):
            await self._drained.wait()
            return
        self._abort_all()

    async def aclose(self, timeout: float = _CLOSING_TIME) -> None:  # noqa: ASYNC109
        """Close the engine. Requests that have not ended end with the finish reason "abort".

        It waits for the step under way, if there is one, but no longer than ``timeout`` seconds,
        10 by default.
        A native call that has not come back by then is left to itself: the engine's thread frees
        what the model holds when it does, and the event ``engine.left_behind`` is logged. Requests
        end all the same. Harmless when called again, or by several tasks; goes on when the task is
        cancelled.

        ::

            async with mtpbatch.Engine.open("model.gguf") as engine:
                await engine.aclose(timeout=5)
                assert engine.closed
        """
        self._gate.home.check("engine")
        _check_seconds("timeout", timeout)
        self._stop()
        if self._left_behind and not self._ended.is_set():
            return
        with anyio.move_on_after(timeout, shield=True):
            await self._ended.wait()
        if not self._ended.is_set():
            self._leave_behind(timeout)
            return
        self._thread.join()
        atexit.unregister(self._stop_at_exit)

    async def wait_closed(self) -> None:
        """Wait until the engine has ended: closed, whoever does it, or dead.

        Raises :class:`~mtpbatch.EngineDeadError` if it has died.

        ::

            async with mtpbatch.Engine.open("model.gguf") as engine:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(engine.wait_closed)
                    await engine.aclose()
        """
        self._gate.home.check("engine")
        await self._ended.wait()
        self._gate.check_alive()

    @property
    def closed(self) -> bool:
        """Whether it was closed, or has died."""
        return self._gate.closing

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests any more: it drains, or has drained."""
        return self._gate.draining

    def check_health(self, stall_timeout: float = 60.0) -> None:
        """Raise if the engine does not work as it should; the error says why.

        Cheap; from any thread. ``stall_timeout`` is how long a step may take, in seconds: choose it
        longer than the model needs for ``n_batch`` tokens of a prompt.

        Raises :class:`~mtpbatch.EngineDeadError` if the engine's thread ended because of an error,
        :class:`~mtpbatch.EngineClosedError` if the engine was closed,
        :class:`~mtpbatch.NativeDiedError` while the process that runs the model is being started
        again, so that requests have to wait, or :class:`~mtpbatch.EngineStalledError` if there are
        requests and no step has finished for ``stall_timeout`` seconds.

        ::

            engine.check_health(stall_timeout=30)
        """
        _check_seconds("stall_timeout", stall_timeout)
        self._gate.check_open()
        if (death := self._death) is not None:
            advice = "; the engine starts another one"
            raise NativeDiedError(death.returncode, advice, why=death.why)
        seconds = 0.0
        if self._intake.n_ready:
            seconds = self._clock() - max(self._intake.busy_since, self._last_step)
        # A process that is mute reads no texts either, so that none of its requests is ready.
        seconds = max(seconds, self._watchdog.silence)
        n_requests = len(self._intake.live)
        if n_requests and seconds > stall_timeout:
            raise EngineStalledError(seconds, stall_timeout, n_requests)

    # ------------------------------------------------------------------------- requests

    async def generate(self, prompt: Prompt, **params: Unpack[SamplingOptions]) -> Completion:
        """Generate after one prompt. Cancelling the waiting task cancels the request.

        If too many requests wait already (``max_waiting``), this one waits for room, first come,
        first served, unless the engine was opened with ``on_full="reject"``.

        Raises :class:`~mtpbatch.EngineOverloaded` if it was rejected.

        ::

            done = await engine.generate("def fib(n):", max_tokens=64, stop="\\n\\n")
            print(done.text, done.finish_reason)
        """
        return await self._intake.submit(prompt, parse(SamplingParams, params), followed=False)

    async def generate_many(
        self, prompts: Iterable[Prompt], **params: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """Generate after many prompts at once; completions come in the order of the prompts.

        The next prompt is taken when there is room for it. If one of them fails, or the waiting
        task is cancelled, the rest are cancelled.

        ::

            done = await engine.generate_many(["In the", "def main("], max_tokens=8)
            print([each.text for each in done])
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            kind = type(prompts).__name__
            raise InvalidParameterError(
                "prompts",
                f"must be a list of prompts, got one {kind}; for one prompt there is generate()",
            )
        parsed = parse(SamplingParams, params)
        return await self._all(
            self._intake.submit(prompt, parsed, followed=False) for prompt in prompts
        )

    async def generate_n(
        self, prompt: Prompt, n: int, **params: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """Generate ``n`` answers to one prompt, at least 1, which is computed once.

        Answer i is that of :meth:`generate` with the seed ``(seed + i) % 2**32``; without a seed
        the first one is drawn. The first request computes the prompt and the others start from a
        copy of its state, all but the last token, as their ``Usage.cached_tokens`` say; the prompt
        is computed n times if that is not worth a copy (fewer than 65 tokens, or where copying
        takes longer than a quarter of computing), or with ``reuse_prefix=False`` or
        ``snapshot_memory=0``. If one request fails, or the waiting task is cancelled, the rest are
        cancelled.

        ::

            three = await engine.generate_n("Once upon a time", 3, temperature=0.8, max_tokens=8)
        """
        each = _each(parse(SamplingParams, params), n)
        self._gate.check_accepting()
        token_ids = await self._tokenizer.prompt(prompt)
        return await self._all(
            self._intake.submit(token_ids, of_one, followed=False, shares_prompt=n > 1)
            for of_one in each
        )

    async def _all(self, submitted: Iterable[Generation]) -> list[Completion]:
        """The completions of requests. Each is submitted when it is taken, which has to be waited
        for where there is no room."""
        self._gate.check_accepting()
        generations: list[Generation] = []
        try:
            async with anyio.create_task_group() as group:
                for generation in submitted:
                    generations.append(generation)
                    group.start_soon(generation._result)
                    await generation.entered()
            return [await generation for generation in generations]
        except BaseExceptionGroup as group_error:
            failures, others = group_error.split(Exception)
            if failures is None or others is not None:
                raise
            failure = failures.exceptions[0]
        finally:
            for generation in generations:
                generation.cancel()
        raise failure

    @asynccontextmanager
    async def stream(
        self, prompt: Prompt, **params: Unpack[SamplingOptions]
    ) -> AsyncIterator[Generation]:
        """Generate after one prompt and follow it; leaving the block early ends the request.

        ::

            async with engine.stream("Once upon a time", max_tokens=100) as deltas:
                async for delta in deltas:
                    print(delta.text, end="")
            print(deltas.completion)

        Entering the block waits for room, as :meth:`generate` does.
        """
        generation = self._intake.submit(prompt, parse(SamplingParams, params), followed=True)
        try:
            await generation.entered()
            yield generation
        finally:
            generation.cancel()

    def submit(
        self, prompt: Prompt, *, followed: bool = True, **params: Unpack[SamplingOptions]
    ) -> Generation:
        """Start to generate after one prompt, without waiting.

        Needs a running event loop in this thread. A long text is tokenised elsewhere; if the
        prompt is then found wanting, waiting for the generation raises the error. With
        ``followed=False`` it has no deltas, and costs less: results are brought every 50 ms.

        Raises :class:`~mtpbatch.EngineOverloaded` if too many requests wait already. Where that
        depends on the tokens of a long text, waiting for the generation raises it.

        ::

            generation = engine.submit("In the beginning", max_tokens=8)
            print((await generation).text)
        """
        return self._intake.submit(
            prompt, parse(SamplingParams, params), followed=followed, waits=False
        )

    def submit_n(
        self, prompt: Prompt, n: int, *, followed: bool = True, **params: Unpack[SamplingOptions]
    ) -> list[Generation]:
        """Start ``n`` answers to one prompt, at least 1, without waiting: all of them or none.

        Answers and costs are those of :meth:`generate_n`, and all else is as in :meth:`submit`. A
        text is tokenised for each of them: give tokens where it is long.

        ::

            generations = engine.submit_n("Once upon a time", 3, temperature=0.8, max_tokens=8)
            print([(await generation).text for generation in generations])
        """
        generations: list[Generation] = []
        try:
            for of_one in _each(parse(SamplingParams, params), n):
                generations.append(
                    self._intake.submit(
                        prompt, of_one, followed=followed, waits=False, shares_prompt=n > 1
                    )
                )
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return generations

    # ----------------------------------------------------------------------------- chat

    async def chat(
        self,
        messages: abc.Sequence[Any],
        tools: abc.Sequence[Any] | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        **params: Unpack[SamplingOptions],
    ) -> ChatCompletion:
        """Generate the next message of a conversation, and take it apart.

        ::

            messages = [{"role": "user", "content": "How much is 6 times 7?"}]
            answer = await engine.chat(messages, max_tokens=200)
            messages.append(answer.message)

        Messages, tools and template arguments are those of :meth:`apply_chat_template`. Reasoning
        and tool calls are found where the model's template marks them as ``mtpbatch.chat.answer``
        describes.
        """
        parsed = parse(SamplingParams, params)
        prompt = await self.chat_prompt(messages, tools, template_args)
        generation = self._intake.submit(prompt.text, parsed, followed=False, add_special=False)
        return prompt.answer.read(await generation)

    @asynccontextmanager
    async def stream_chat(
        self,
        messages: abc.Sequence[Any],
        tools: abc.Sequence[Any] | None = None,
        *,
        template_args: Mapping[str, Any] | None = None,
        **params: Unpack[SamplingOptions],
    ) -> AsyncIterator[ChatGeneration]:
        """As :meth:`chat`, and follow it; leaving the block early ends the request.

        ::

            async with engine.stream_chat(messages) as deltas:
                async for delta in deltas:
                    print(delta.content, end="")
            messages.append((await deltas).message)
        """
        parsed = parse(SamplingParams, params)
        prompt = await self.chat_prompt(messages, tools, template_args)
        generation = self._intake.submit(prompt.text, parsed, followed=True, add_special=False)
        try:
            await generation.entered()
            yield ChatGeneration(generation, prompt.answer)
        finally:
            generation.cancel()

    def apply_chat_template(
        self,
        messages: abc.Sequence[Any],
        tools: abc.Sequence[Any] | None = None,
        **template_args: Any,
    ) -> str:
        """The prompt of a conversation, by the model's own template.

        ``messages`` are dicts with ``role`` and ``content``, or :class:`~mtpbatch.ChatMessage`;
        ``tools`` are functions with JSON schemas, as OpenAI's API has them. ``template_args``
        are for the template, such as ``enable_thinking`` or ``documents``;
        ``add_generation_prompt=False`` leaves out the begin of the assistant's next message.

        The text holds all special tokens that the model wants: tokenise it with
        ``tokenize(text, add_special=False)``. Long conversations take some milliseconds.

        Raises :class:`~mtpbatch.InvalidParameterError`, which names the message that is wrong, or
        :class:`~mtpbatch.ChatTemplateError`: there is no template, or it refused or failed.

        ::

            prompt = engine.apply_chat_template([{"role": "user", "content": "Hello"}])
        """
        return self._chat_template.render(messages, tools, template_args)

    async def chat_prompt(
        self,
        messages: abc.Sequence[Any],
        tools: abc.Sequence[Any] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """What :meth:`apply_chat_template` gives, made on a thread, and how to read the answer.

        For those who submit a conversation themselves: ``text`` is to be tokenised with
        ``add_special=False``, and ``answer.read(completion)`` takes what came apart.

        ::

            prompt = await engine.chat_prompt([{"role": "user", "content": "Hello"}])
            tokens = await engine.tokenize(prompt.text, add_special=False)
            answer = prompt.answer.read(await engine.generate(tokens, max_tokens=8))
        """
        template = self._chat_template
        # On a thread, as to compile or to fill in a template can take long.
        return await anyio.to_thread.run_sync(template.prompt, messages, tools, template_args)

    @property
    def _chat_template(self) -> ChatTemplate:
        self._gate.check_open()
        if self._template is None:
            raise ChatTemplateError(
                "the model file carries no chat template; make the prompt yourself, for generate()"
            )
        return self._template

    # ----------------------------------------------------------------------- embeddings

    async def embed(self, texts: Iterable[Prompt], *, normalize: bool = True) -> Embeddings:
        """The embeddings of many texts, or of their tokens: a vector for each, in their order.

        With ``normalize`` vectors have the length 1, so that products of two are their cosine.
        A vector is what the model file's pooling type makes of the last hidden rows; where it
        names none, their mean. Texts of all callers share decodes on a thread of their own, beside
        the requests that generate. Cancelling the waiting task takes its texts out of the decodes
        that have not begun.

        Raises :class:`~mtpbatch.InvalidParameterError` for a text that is empty or longer than
        n_ctx, :class:`~mtpbatch.ContextError` if the model makes no embeddings or there is no
        memory, :class:`~mtpbatch.DecodeError` if a decode failed.

        ::

            vectors = (await engine.embed(["In the beginning", "import os"])).vectors
            assert vectors.shape[0] == 2
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise InvalidParameterError("texts", f"must be a list of texts, got one {kind}")
        self._gate.check_accepting()
        given = [text if isinstance(text, str) else snapshot("texts", text) for text in texts]
        return await self._embedding.embed(given, normalize=normalize)

    # ----------------------------------------------------------------------------- text

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of ``text``, as a prompt of that text has them.

        ``add_special=False`` leaves out those that the model wants around a text, such as one at
        its begin. Special tokens that the text names are always read as such. Long texts do not
        hold up the event loop.

        ::

            tokens = await engine.tokenize("In the beginning")
            assert await engine.detokenize(tokens) == "In the beginning"
        """
        self._gate.check_open()
        return await self._tokenizer.tokenize(text, add_special=add_special)

    async def detokenize(self, token_ids: abc.Sequence[int]) -> str:
        """The text of ``token_ids``; bytes that are not UTF-8 become U+FFFD.

        ::

            done = await engine.generate("In the", max_tokens=8)
            print(await engine.detokenize(done.token_ids))
        """
        self._gate.check_open()
        return await self._tokenizer.detokenize(token_ids)

    @property
    def token_bytes(self) -> abc.Sequence[bytes]:
        """The bytes of each token of the vocabulary; of control tokens, none."""
        return self._backend.token_bytes

    # -------------------------------------------------------------------------- figures

    @property
    def config(self) -> EngineConfig:
        """What the engine was opened with; what was left open is filled in."""
        return self._backend.config

    @property
    def description(self) -> str:
        """The model in a few words, such as ``demo.gguf (qwen35, 2.8M)``."""
        return self._backend.description

    @property
    def model(self) -> ModelFacts:
        """The sizes of the loaded model and what it can do."""
        return self._backend.facts

    def stats(self) -> EngineStats:
        """How many requests run and wait, and totals since the opening.

        They are of a moment ago: at most 50 ms, or the step under way. Works after closing, but
        raises :class:`~mtpbatch.EngineDeadError` if the engine has died.

        ::

            await engine.generate("In the beginning", max_tokens=8)
            print(engine.stats().generated_tokens, engine.stats().acceptance)
        """
        self._gate.check_alive()
        rejected = self._intake.n_rejected
        return msgspec.structs.replace(self._stats, waiting=self._n_waiting, rejected=rejected)

    def watch(self, watcher: Watcher) -> ExitStack:
        """Have a watcher told of all steps and requests, from now on until what is returned closes.

        ::

            class Ends(mtpbatch.Watcher):
                def ended(self, request):
                    print(request.request_id, request.error or request.completion.finish_reason)

            with engine.watch(Ends()):
                await engine.generate("def fib(n):", max_tokens=8)

        Without a ``with``, its ``close()`` takes the watcher off. Costs nothing while nobody
        watches. Not to be called by a watcher that is being told something.
        """
        self._gate.check_open()
        with self._turn:
            return self._watchers.add(watcher, self._scheduler.running)

    def __repr__(self) -> str:
        if not self._loaded:
            return "<Engine: not loaded>"
        settings = ", ".join(f"{k}={v!r}" for k, v in msgspec.structs.asdict(self.config).items())
        running = self._stats.running
        state = f"{running} running, {self._n_waiting} waiting"
        if self.closed:
            state = "closed"
        elif self._gate.draining:
            state = f"draining, {state}"
        return f"<Engine {self._backend.description}: {settings}; {state}>"

    @property
    def _n_waiting(self) -> int:
        return max(0, len(self._intake.live) - self._stats.running)

    # ------------------------------------------------------------------- how it ends

    @property
    def _loaded(self) -> bool:
        return hasattr(self, "_scheduler")

    def _stop(self) -> None:
        self._gate.close()
        if self._loaded:  # else its thread looks before it waits
            self._backend.stop()

    def _stop_at_exit(self) -> None:
        if self._gate.home.here:
            self._stop()
            self._thread.join(_CLOSING_TIME)
            if self._thread.is_alive():
                self._leave_behind(_CLOSING_TIME)

    def _leave_behind(self, seconds: float) -> None:
        """Go on without the engine's thread, which a native call holds up."""
        self._left_behind = True
        if self._loaded:
            self._abort_all()
            self._embedding.stop(self._gate.end_error())
        log.error("engine.left_behind", waited=seconds)

    def _abort_all(self) -> None:
        """End every request, in place of the engine's thread if need be."""
        with self._turn:
            everyone = [request_id for request_id, _ in self._intake.everyone()]
            self._deliver(self._end(everyone, "abort"))
        self._backend.wake()  # for it to free what they hold

    # ------------------------------------------------------------- on the engine's thread

    def _run(self, make_backend: Callable[[], Backend]) -> None:
        backend: Backend | None = None
        try:
            self._backend = backend = make_backend()
            self._template = _chat_template(backend.chat_template)
            self._tokenizer = Tokenizer(backend, self._gate.check_open)
            self._intake = Intake(backend, self._tokenizer, self._gate, self._clock)
            self._embedding = EmbeddingThread(
                backend.open_embedder, partial(self._tokenizer.ids, "texts", add_special=True)
            )
            scheduler = Scheduler(backend.facts, backend.config.snapshot_memory << 20)
            self._stats = scheduler.stats
            self._scheduler = scheduler  # last: from here on it is loaded
            log.info("engine.opened", model=backend.description, config=backend.config)
            self._ready.set()
            self._serve()
        except BaseException as error:
            if self._ready.is_set():  # else whoever waits for the opening gets the error
                log.error("engine.died", exc_info=error)
            if isinstance(error, MtpBatchError):
                # Says enough by itself, and its frames would keep native memory from being freed.
                error = error.with_traceback(None)
            self._gate.close(error)
            if self._ready.is_set():
                with self._turn:
                    self._bury()
        try:
            if backend is not None:
                if self._loaded:
                    self._embedding.stop(self._gate.end_error())
                    backend.stop()
                    self._embedding.join()
                    self._tokenizer.close()
                backend.close()
                log.info("engine.closed")
        finally:
            self._ended.set()
            self._ready.set()

    def _serve(self) -> None:
        restarts = Restarts()
        while not self._gate.closing:
            try:
                self._run_plans()
            except NativeDiedError as death:
                # Its frames would keep what is left of the native part, as those below would.
                self._outlive(death.with_traceback(None), restarts)
        self._abort_all()
        # Closing may have to wait for users; steps need not run on for nobody meanwhile.
        with self._turn:
            plan = self._scheduler.schedule(self._clock())
        with suppress(NativeDiedError):
            self._backend.exchange(plan, wait=False)

    def _run_plans(self) -> None:
        backend, scheduler, intake = self._backend, self._scheduler, self._intake
        mortal = backend if isinstance(backend, Mortal) else None
        step_timeout = backend.config.step_timeout
        watchdog = self._watchdog = Watchdog()
        while True:
            with self._turn:
                self._take_in_requests()
                if self._gate.closing:
                    return
                plan = scheduler.schedule(self._clock())
                if plan is not None:
                    self._stats = scheduler.stats
                    intake.begin(plan.admit)
                    self._watchers.see(scheduler.running)
                busy = mortal is not None and (intake.n_ready > 0 or scheduler.awaits_step)
            # With a plan on its way there may be another one to make; without, it is time to wait.
            results = backend.exchange(plan, wait=plan is None, timeout=intake.until_timeout())
            if results:
                with self._turn:
                    self._take_in_results(results)
            if mortal is not None:
                watchdog.look(self._clock(), silent=not results and (busy or mortal.mute))
                if step_timeout is not None and watchdog.silence > step_timeout:
                    raise mortal.kill(f"silent for more than step_timeout={step_timeout} seconds")

    def _outlive(self, death: NativeDiedError, restarts: Restarts) -> None:
        """Have the native part begin anew; raise what it died of if that has been too often."""
        backend = self._backend
        failure: MtpBatchError = death
        while not self._gate.closing:
            now = self._clock()
            pause = restarts.died(now, self._watchdog.silence)
            if pause is None or not isinstance(backend, Mortal):
                raise failure
            if self._death is None:
                with self._turn:
                    self._death = death
                    self._deliver(self._scheduler.start_over(death, now))
                    self._watchers.see(self._scheduler.running)
            log.warning("engine.native_died", error=str(failure), restart_in=pause)
            if not self._wait(now + pause):
                return
            try:
                backend.restart(self._look_after_requests)
            except MtpBatchError as error:
                failure = error.with_traceback(None)
            else:
                self._last_step = self._clock()  # nobody could have ended one sooner
                restarts.up(self._last_step)
                self._death = None
                log.info("engine.restarted", requests=len(self._intake.live))
                return

    def _wait(self, until: float) -> bool:
        """Let time pass, in which nothing runs; ``False``: the engine is being closed."""
        while self._look_after_requests():
            left = until - self._clock()
            if left <= 0:
                return True
            expiry = self._intake.until_timeout()
            timeout = left if expiry is None else min(left, expiry)
            self._backend.exchange(None, wait=True, timeout=timeout)
        return False

    def _look_after_requests(self, _share: float = 0.0) -> bool:
        """Take in who comes and who leaves while nothing runs; whether to go on."""
        with self._turn:
            self._take_in_requests()
        return not self._gate.closing

    def _take_in_requests(self) -> None:
        arrivals = self._intake.arrived()
        for sequence in arrivals.entered:
            self._scheduler.add(sequence)
        if arrivals.refused:
            self._deliver(arrivals.refused)  # first: who has ended cannot be aborted as well
        if aborted := [*arrivals.cancelled, *self._intake.orphans()]:
            self._deliver(self._end(aborted, "abort"))
        if expired := self._intake.expired():
            self._deliver(self._end(expired, "timeout"))
        for sequence in self._intake.move_up():
            self._scheduler.add(sequence)

    def _take_in_results(self, results: list[StepResult]) -> None:
        events: list[Event] = []
        for result in results:
            now = self._clock()
            parts: list[SequenceStep] | None = [] if self._watchers else None
            of_step = self._scheduler.update(result, now, parts)
            if parts is not None:
                self._watchers.stepped(result, parts, now)
            if failures := [event for event in of_step if isinstance(event.error, DecodeError)]:
                requests = [event.request_id for event in failures]
                log.warning("step.failed", requests=requests, error=str(failures[0].error))
            events += of_step
        self._last_step = self._clock()
        self._deliver(events)

    def _end(self, request_ids: Iterable[str], reason: Literal["abort", "timeout"]) -> list[Event]:
        events = []
        for request_id in dict.fromkeys(request_ids):
            if request_id not in self._intake.live:  # it ended before the cancellation came
                continue
            event = self._scheduler.abort(request_id, self._clock(), reason)
            if event is None:  # it stands in line, or is still being prepared
                self._scheduler.add(self._intake.withdrawn(request_id))
                event = self._scheduler.abort(request_id, self._clock(), reason)
            if event is not None:
                events.append(event)
        return events

    def _deliver(self, events: list[Event]) -> None:
        """Hand events over, together for each loop."""
        parcels: dict[Post, list[tuple[Live, Event]]] = {}
        for event in events:
            live = self._intake.live[event.request_id]
            parcels.setdefault(live.mailbox, []).append((live, event))
            if event.last:
                self._forget(event)
        self._stats = self._scheduler.stats  # before anyone can learn of the events and look
        for mailbox, parcel in parcels.items():
            mailbox.put(parcel)
        if self._gate.draining and not self._intake.live:
            self._drained.set()

    def _bury(self) -> None:
        """End every request because the engine has died."""
        for request_id, live in self._intake.everyone():
            event = self._last_words(request_id)
            self._forget(event)
            live.mailbox.put([(live, event)])
        self._drained.set()

    def _last_words(self, request_id: str) -> Event:
        """What came of a request before the engine died."""
        sequence = self._scheduler.let_go(request_id) or self._intake.withdrawn(request_id)
        delta = None if sequence.finished else sequence.end("error", self._clock())
        error = self._gate.end_error()
        error.completion = sequence.completion()
        return Event(request_id, delta, error=error)

    def _forget(self, event: Event) -> None:
        """A request has had its last event."""
        live = self._intake.remove(event.request_id)
        completion, error = event.completion, event.error
        if error is not None:
            completion = error.completion
        ended = RequestEnded(event.request_id, live.params, completion, error)
        self._watchers.ended(ended, live.log.context)
        if event.completion is None:
            live.log.debug("request.ended", error=str(event.error))
        else:
            live.log.debug(
                "request.ended",
                finish_reason=event.completion.finish_reason,
                usage=event.completion.usage,
                timings=event.completion.timings,
            )


def _each(params: SamplingParams, n: int) -> Iterator[SamplingParams]:
    """The parameters of each of ``n`` answers to one prompt."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidParameterError("n", f"must be a whole number, at least 1, got {n!r}")
    first = drawn_seed(params)
    return (msgspec.structs.replace(params, seed=(first + i) % 2**32) for i in range(n))


def _chat_template(source: TemplateSource | None) -> ChatTemplate | None:
    if source is None:
        return None
    return ChatTemplate(source.text, source.special_tokens, tool_source=source.tool_text)


def _check_seconds(parameter: str, seconds: float) -> None:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not seconds >= 0:  # nor NaN
        raise InvalidParameterError(
            parameter, f"must be a number of seconds from 0 on, got {seconds!r}"
        )
