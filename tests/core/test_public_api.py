"""The names others rely on. Taking one away, or renaming it, breaks apps: think first."""

from __future__ import annotations

import inspect
from typing import get_args, get_type_hints

import pytest

import mtpbatch
from mtpbatch import exceptions, testing


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_package_exports_exactly_these_names() -> None:
    assert set(mtpbatch.__all__) == {
        "ChatCompletion",
        "ChatDelta",
        "ChatGeneration",
        "ChatMessage",
        "ChatTemplateError",
        "Completion",
        "ContextError",
        "DecodeError",
        "Delta",
        "Embeddings",
        "Engine",
        "EngineClosedError",
        "EngineConfig",
        "EngineDeadError",
        "EngineError",
        "EngineOverloaded",
        "EngineOptions",
        "EngineStalledError",
        "EngineStats",
        "FinishReason",
        "FunctionCall",
        "Generation",
        "GrammarError",
        "InternalError",
        "InvalidParameterError",
        "InvalidRequestError",
        "LibraryMismatchError",
        "ModelFacts",
        "ModelLoadError",
        "MtpAcceptError",
        "MtpBadSequenceError",
        "MtpBatchError",
        "MtpDraftError",
        "MtpIncompatibleContextsError",
        "MtpInitError",
        "MtpInvalidConfigError",
        "MtpProcessError",
        "MtpSessionError",
        "MtpStateError",
        "NativeDiedError",
        "NativeError",
        "PromptTooLongError",
        "RequestAdmitted",
        "RequestEnded",
        "SamplingOptions",
        "SamplingParams",
        "SequenceStep",
        "StepReport",
        "TextPart",
        "Timings",
        "TokenLogprobs",
        "ToolCall",
        "Usage",
        "Watcher",
        "WrongProcessError",
        "log_to_console",
        "probe_model",
    }
    assert all(hasattr(mtpbatch, name) for name in mtpbatch.__all__)
    assert sorted(mtpbatch.__all__) == mtpbatch.__all__


def test_every_exception_can_be_caught_from_the_package() -> None:
    errors = {
        name
        for name, thing in vars(exceptions).items()
        if inspect.isclass(thing) and issubclass(thing, exceptions.MtpBatchError)
    }
    assert errors <= set(mtpbatch.__all__)
    drawn = exceptions.__doc__ or ""
    assert all(name in drawn for name in errors), "the tree in the docstring shows them all"


def test_the_engines_surface() -> None:
    assert public(mtpbatch.Engine) == {
        "aclose",
        "apply_chat_template",
        "chat",
        "chat_prompt",
        "check_health",
        "closed",
        "config",
        "description",
        "detokenize",
        "drain",
        "draining",
        "embed",
        "generate",
        "generate_many",
        "generate_n",
        "model",
        "open",
        "stats",
        "stream",
        "stream_chat",
        "submit",
        "submit_n",
        "token_bytes",
        "tokenize",
        "wait_closed",
        "watch",
    }
    assert public(mtpbatch.Generation) == {"cancel", "completion", "entered", "request_id"}
    assert public(mtpbatch.ChatGeneration) == {"cancel", "completion", "request_id"}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            mtpbatch.EngineConfig,
            "n_seq n_ctx n_draft_max draft_model n_batch n_ubatch n_threads n_gpu_layers kv_type "
            "kv_unified speculation n_cells snapshot_memory max_waiting max_waiting_tokens on_full "
            "lora isolation step_timeout",
        ),
        (
            mtpbatch.SamplingParams,
            "max_tokens temperature top_k top_p min_p typical_p xtc_probability xtc_threshold "
            "repetition_penalty presence_penalty frequency_penalty dry_multiplier dry_base "
            "dry_allowed_length dry_penalty_last_n dry_sequence_breakers logit_bias bad_words "
            "min_tokens seed stop stop_token_ids ignore_eos json_schema regex choice grammar "
            "speculation timeout queue_timeout priority deadline reuse_prefix logprobs "
            "prompt_logprobs metadata",
        ),
        (
            mtpbatch.Completion,
            "request_id text token_ids prompt_token_ids finish_reason drafted accepted "
            "accepted_by_depth steps usage timings tokens_per_step logprobs prompt_logprobs "
            "metadata",
        ),
        (
            mtpbatch.ChatMessage,
            "role content reasoning_content tool_calls tool_call_id name",
        ),
        (mtpbatch.TextPart, "text type"),
        (mtpbatch.ToolCall, "function id type"),
        (mtpbatch.FunctionCall, "name arguments"),
        (
            mtpbatch.ChatCompletion,
            "content reasoning_content tool_calls completion message finish_reason",
        ),
        (mtpbatch.ChatDelta, "content reasoning_content tool_calls finish_reason"),
        (mtpbatch.Embeddings, "vectors prompt_tokens"),
        (mtpbatch.Delta, "text token_ids n_accepted finish_reason logprobs"),
        (mtpbatch.TokenLogprobs, "token_id logprob rank top"),
        (mtpbatch.Usage, "prompt_tokens completion_tokens cached_tokens total_tokens"),
        (mtpbatch.Timings, "queued prefill first_token decode total"),
        (mtpbatch.Watcher, "admitted paused stepped ended"),
        (
            mtpbatch.RequestAdmitted,
            "request_id seq_id queued prompt_tokens cached_tokens",
        ),
        (mtpbatch.RequestEnded, "request_id params completion error"),
        (
            mtpbatch.SequenceStep,
            "seq_id request_id n_prompt n_drafted n_accepted n_generated n_tokens",
        ),
        (
            mtpbatch.StepReport,
            "at sequences gap_time draft_time target_time sample_time n_target_tokens error",
        ),
        (
            mtpbatch.EngineStats,
            "running waiting free_sequences n_seq mtp finished rejected "
            "prompt_tokens generated_tokens "
            "prefix_queries prefix_hits preemptions "
            "kv_cells_used n_cells kv_cache_usage snapshot_bytes "
            "drafted accepted drafted_by_depth accepted_by_depth draft_depth steps gap_time "
            "draft_time target_time sample_time restarts acceptance tokens_per_step",
        ),
    ],
)
def test_the_fields_of_public_values(kind: type, names: str) -> None:
    assert public(kind) == set(names.split())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (mtpbatch.SamplingOptions, mtpbatch.SamplingParams),
        (mtpbatch.EngineOptions, mtpbatch.EngineConfig),
    ],
)
def test_type_checkers_know_all_keyword_arguments(options: type, kind: type) -> None:
    """By the same names, in the same order; each takes None where the field does."""
    fields, keywords = get_type_hints(kind), get_type_hints(options)
    assert list(keywords) == list(fields)
    nothing = type(None)
    for name, annotation in fields.items():
        assert (nothing in get_args(annotation)) == (nothing in get_args(keywords[name])), name


def test_the_testing_surface() -> None:
    assert testing.__all__ == [
        "ClosedLoop",
        "CostModel",
        "Drafts",
        "Fixed",
        "Lengths",
        "LogNormal",
        "OpenLoop",
        "Profile",
        "RequestKind",
        "Sample",
        "ScriptedBackend",
        "SimulationReport",
        "StepCost",
        "StepGate",
        "Summary",
        "Uniform",
        "VirtualClock",
        "open_scripted_engine",
        "ramp",
        "simulate",
        "square_wave",
        "steady",
    ]


def test_every_public_name_is_documented() -> None:
    things = [getattr(mtpbatch, name) for name in mtpbatch.__all__ if name != "FinishReason"]
    aliases = {"CostModel", "Lengths"}
    things += [getattr(testing, name) for name in testing.__all__ if name not in aliases]
    for thing in things:
        assert inspect.getdoc(thing), f"{thing} has no docstring"
        if inspect.isclass(thing):
            for name, member in vars(thing).items():
                if not name.startswith("_") and (
                    inspect.isfunction(member) or isinstance(member, property)
                ):
                    assert inspect.getdoc(member), f"{thing.__name__}.{name} has no docstring"
