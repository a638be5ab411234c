"""A model and its contexts, opened from one config, with what that leaves open filled in."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mtpbatch.exceptions import InvalidParameterError, MtpInitError
from mtpbatch.machine import available_cpus
from mtpbatch.native.context import Context
from mtpbatch.native.model import Model
from mtpbatch.types import EngineConfig

# Rows whose logits a step can have beside one for each sequence, for prompts that are scored. More
# would take more memory: with the largest vocabularies these are 30 MB.
_SPARE_OUTPUTS = 32
_DEFAULT_N_CTX = 4096  # models allow far more, but cells for all sequences are taken at once


@dataclass(frozen=True)
class Opened:
    """What an engine runs on."""

    config: EngineConfig
    """Nothing in it is left open; n_draft_max is 0 where nothing drafts."""
    target: Context
    draft: Context | None
    n_outputs: int
    """Most rows of a step that have logits."""
    no_drafts: str | None
    """Why nothing drafts although it was asked for; None: it does, or was not."""


def load_models(
    path: str | os.PathLike[str],
    config: EngineConfig,
    *,
    weights: bool = True,
    progress: Callable[[float], bool | None] | None = None,
) -> tuple[Model, Model | None]:
    """The model, and the assistant that drafts for it if the config names one."""
    model = Model(
        path,
        n_gpu_layers=config.n_gpu_layers,
        lora=config.lora,
        weights=weights,
        progress=progress,
    )
    assistant = None
    if config.draft_model is not None and config.n_draft_max:
        assistant = Model(config.draft_model, n_gpu_layers=config.n_gpu_layers, weights=weights)
    return model, assistant


def open_contexts(model: Model, assistant: Model | None, config: EngineConfig) -> Opened:
    """The contexts that a config asks for.

    Raises :class:`InvalidParameterError` if this model cannot have them, and
    :class:`ContextError` if llama.cpp could not make them.
    """
    no_drafts = None
    if config.n_draft_max and assistant is None and not model.n_mtp_heads:
        announced = model.metadata(f"{model.architecture}.nextn_predict_layers") not in (None, "0")
        no_drafts = "the model has no MTP heads"
        if announced:
            no_drafts = (
                "the model file announces MTP heads, but their weights are not in it, or the "
                f"installed llama.cpp cannot run those of {model.architecture}"
            )
        config = _without_drafts(config, no_drafts)
    config = _resolve(config, model, assistant)
    assert config.n_ctx is not None  # resolved
    assert config.n_batch is not None
    n_outputs = config.n_seq + max(config.n_seq * config.n_draft_max, _SPARE_OUTPUTS)
    n_outputs = min(n_outputs, config.n_batch)
    target = Context(
        model,
        n_ctx=config.n_ctx,
        n_seq=config.n_seq,
        n_batch=config.n_batch,
        n_ubatch=config.n_ubatch,
        n_rs_seq=config.n_draft_max,
        n_outputs_max=n_outputs,
        n_threads=config.n_threads,
        kv_type=config.kv_type,
        kv_unified=config.kv_unified,
        n_cells=config.n_cells,
    )
    if model.keeps_recurrent_state and target.n_rs_seq < config.n_draft_max:
        # This architecture's state cannot be taken back: no draft could be rejected.
        no_drafts = f"{model.architecture} models cannot take back tokens"
        config = _without_drafts(config, no_drafts)
    draft = None
    if config.n_draft_max:
        try:
            draft = Context.mtp(target, assistant)
        except MtpInitError as error:
            no_drafts = str(error)
            config = _without_drafts(config, no_drafts)
    return Opened(config, target, draft, n_outputs, no_drafts)


def _resolve(config: EngineConfig, model: Model, assistant: Model | None) -> EngineConfig:
    """Fill in what the config leaves to the model and the machine; refuse what cannot work."""
    if assistant is None and model.n_mtp_heads > 1:
        config = _as_deep_as_the_chain(config, model.n_mtp_heads)
    depth = config.n_draft_max
    n_ctx = config.n_ctx or min(model.n_ctx_train, _DEFAULT_N_CTX, config.n_cells or _DEFAULT_N_CTX)
    if n_ctx < depth + 2:
        raise InvalidParameterError(
            "n_ctx",
            f"must be at least n_draft_max + 2 = {depth + 2}, got {n_ctx}: raise it, or lower "
            f"n_draft_max",
        )
    if n_ctx * config.n_seq > 2**31 - 1:
        raise InvalidParameterError(
            "n_ctx",
            f"times n_seq must be below 2**31, got {n_ctx} times {config.n_seq}: lower one of them",
        )
    per_step = config.n_seq * (1 + depth)
    n_batch = config.n_batch or max(2048, per_step)
    if n_batch < per_step:
        raise InvalidParameterError(
            "n_batch",
            f"must be at least n_seq * (1 + n_draft_max) = {per_step}, so that every sequence "
            f"takes part in every step; got {n_batch}: raise it, or leave it out",
        )
    # Drafting needs cells of each sequence's own there: see MtpSession.
    own_cells = depth > 0 and (model.n_swa > 0 or model.n_mtp_heads > 1)
    kv_unified = config.kv_unified and not own_cells
    n_cells = min(config.n_cells or n_ctx * config.n_seq, n_ctx * config.n_seq)
    if n_cells < max(n_ctx, per_step):
        raise InvalidParameterError(
            "n_cells",
            f"must be at least n_ctx={n_ctx} and n_seq * (1 + n_draft_max) = {per_step}, so that "
            f"every request fits and every sequence takes part in a step; got {n_cells}: raise it, "
            f"or leave it out",
        )
    if n_cells < n_ctx * config.n_seq and not kv_unified:
        reason = (
            "and this model drafts with equal shares only: set n_draft_max=0"
            if config.kv_unified
            else "which is off"
        )
        raise InvalidParameterError(
            "n_cells", f"needs kv_unified, {reason}, or leave n_cells out; got {n_cells}"
        )
    n_batch = min(n_batch, n_cells)
    n_ubatch = min(config.n_ubatch or 512, n_batch)
    if n_ubatch < depth + 2:
        raise InvalidParameterError(
            "n_ubatch",
            f"must be at least n_draft_max + 2 = {depth + 2}, got {n_ubatch}: raise it, or lower "
            f"n_draft_max",
        )
    return msgspec.structs.replace(
        config,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=config.n_threads or available_cpus(),
        kv_unified=kv_unified,
        n_cells=n_cells,
    )


def _as_deep_as_the_chain(config: EngineConfig, n_heads: int) -> EngineConfig:
    """At most one draft for each head; more is refused if it was asked for."""
    asked = {"n_draft_max": config.n_draft_max, "speculation": config.speculation}
    for name, value in asked.items():
        by_default = value == getattr(EngineConfig(), name)
        if isinstance(value, int) and value > n_heads and not by_default:
            raise InvalidParameterError(
                name,
                f"must be at most {n_heads}, the MTP heads that the model chains; got {value}: "
                f"lower it, or leave it out",
            )
    return msgspec.structs.replace(config, n_draft_max=min(config.n_draft_max, n_heads))


def _without_drafts(config: EngineConfig, reason: str) -> EngineConfig:
    if isinstance(config.speculation, int) and config.speculation > 0:
        raise InvalidParameterError(
            "speculation", f"cannot be {config.speculation}: {reason}; leave it at 'auto' or use 0"
        )
    return msgspec.structs.replace(config, n_draft_max=0)
