"""What an engine drives: model, contexts, session and executor, opened from one config."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from mtpbatch.native.embedder import Embedder
from mtpbatch.native.executor import Executor
from mtpbatch.native.grammar import Grammar, GrammarCompiler
from mtpbatch.native.model import Model
from mtpbatch.native.opening import load_models, open_contexts
from mtpbatch.native.sampler import bad_word_tokens
from mtpbatch.native.session import MtpSession
from mtpbatch.types import (
    EngineConfig,
    GrammarSource,
    ModelFacts,
    Plan,
    SamplingParams,
    StepResult,
    TemplateSource,
)


class NativeBackend:
    """A model ready to run plans. Made and driven by the engine's thread.

    ::

        backend = NativeBackend("model.gguf", mtpbatch.EngineConfig(n_seq=2, n_ctx=512))
        assert backend.facts.n_seq == 2
        print(backend.description, backend.tokenize("In the beginning"))
        backend.close()
    """

    tokenizes_at_once = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: EngineConfig,
        progress: Callable[[float], bool | None] | None = None,
    ) -> None:
        model, assistant = load_models(path, config, progress=progress)
        opened = open_contexts(model, assistant, config)
        self._model = model
        target, config = opened.target, opened.config
        session = None
        if opened.draft is not None:
            session = MtpSession(target, opened.draft, config.n_seq, config.n_draft_max)
        self._executor = Executor(target, session)
        self._grammars = GrammarCompiler(model)
        self.config = config
        self.facts = ModelFacts(
            n_ctx=target.n_ctx,
            n_seq=target.n_seq,
            n_batch=target.n_batch,
            n_draft_max=config.n_draft_max,
            n_vocab=model.n_vocab,
            eog_token_ids=model.eog_tokens,
            n_cells=target.n_cells,
            n_ubatch=target.n_ubatch,
            n_outputs=opened.n_outputs,
            recurrent=model.keeps_recurrent_state,
            truncates=not (model.keeps_recurrent_state or model.n_swa),
            # As in Context::is_one_pass().
            consecutive_ids=model.recurrent or not config.kv_unified,
        )
        self.token_bytes: Sequence[bytes] = model.vocabulary
        self.chat_template = _template_of(model)
        self.description = model.label

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        check: Callable[[], None] | None = None,
    ) -> list[int]:
        return self._model.tokenize(text, add_special=add_special, check=check)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._model.detokenize(token_ids)

    def open_embedder(self) -> Embedder:
        config = self.config
        assert config.n_ctx is not None  # resolved
        assert config.n_ubatch is not None
        return Embedder(
            self._model,
            n_ctx=config.n_ctx,
            n_ubatch=config.n_ubatch,
            n_threads=config.n_threads,
            kv_type=config.kv_type,
        )

    def compile_grammar(self, source: GrammarSource) -> Grammar:
        return self._grammars.compile(source)

    def exchange(
        self, plan: Plan | None, *, wait: bool, timeout: float | None = None
    ) -> list[StepResult]:
        return self._executor.exchange(plan, wait=wait, timeout=timeout)

    def prepare(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        self._executor.prepare(params)
        return bad_word_tokens(self._model, params.bad_words)

    def wake(self) -> None:
        self._executor.wake()

    def cancel(self, ticket: int) -> None:
        self._executor.cancel(ticket)

    def stop(self) -> None:
        self._executor.wake()

    def close(self) -> None:
        self._executor.close()
        self._grammars.close()
        self._model.close()


def _template_of(model: Model) -> TemplateSource | None:
    if model.chat_template is None:
        return None
    special = {"bos_token": model.bos, "eos_token": model.eos}
    return TemplateSource(
        text=model.chat_template,
        tool_text=model.metadata("tokenizer.chat_template.tool_use"),
        special_tokens={
            name: model.token_bytes(token, special=True).decode("utf-8", "replace")
            for name, token in special.items()
            if token is not None
        },
    )
