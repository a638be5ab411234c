"""The keyword arguments of requests and engines, as type checkers and editors read them.

At run time they are the fields of :class:`~mtpbatch.SamplingParams` and
:class:`~mtpbatch.EngineConfig`, which have the defaults and check the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypedDict

from mtpbatch.types import Isolation, KvType, OnFull

Texts: TypeAlias = str | list[str] | tuple[str, ...]
Depth: TypeAlias = int | Literal["auto"]


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of requests: each is a field of :class:`~mtpbatch.SamplingParams`.

    A wrapper of one's own takes them in the same way::

        from typing import Unpack

        async def ask(question: str, **params: Unpack[mtpbatch.SamplingOptions]) -> str:
            return (await engine.generate(f"Q: {question} A:", **params)).text

        await ask("How much is 6 times 7?", max_tokens=8)
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Texts
    logit_bias: Mapping[int, float]
    bad_words: Texts
    min_tokens: int
    seed: int | None
    stop: Texts
    stop_token_ids: list[int] | tuple[int, ...]
    ignore_eos: bool
    json_schema: Any
    regex: str | None
    choice: list[str] | tuple[str, ...]
    grammar: str | None
    speculation: Depth | None
    timeout: float | None
    queue_timeout: float | None
    priority: int
    deadline: float | None
    reuse_prefix: bool
    logprobs: int | None
    prompt_logprobs: int | None
    metadata: Mapping[str, str | int | float | bool | None]


class EngineOptions(TypedDict, total=False):
    """The keyword arguments of :meth:`Engine.open <mtpbatch.Engine.open>`: each is a field of
    :class:`~mtpbatch.EngineConfig`.

    ::

        small: mtpbatch.EngineOptions = {"n_seq": 2, "n_ctx": 512}
        async with mtpbatch.Engine.open("model.gguf", **small) as engine:
            await engine.generate("In the beginning", max_tokens=8)
    """

    n_seq: int
    n_ctx: int | None
    n_draft_max: int
    draft_model: str | None
    lora: Mapping[str, float]
    n_batch: int | None
    n_ubatch: int | None
    n_threads: int | None
    n_gpu_layers: int
    kv_type: KvType
    n_cells: int | None
    snapshot_memory: int
    kv_unified: bool
    speculation: Depth
    max_waiting: int | None
    max_waiting_tokens: int | None
    on_full: OnFull
    isolation: Isolation
    step_timeout: float | None
