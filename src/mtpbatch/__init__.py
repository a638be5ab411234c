"""Many LLM generations at once, inside an async app, on one llama.cpp model with an MTP head.

::

    async with mtpbatch.Engine.open("model.gguf") as engine:
        completion = await engine.generate("def fib(n):", max_tokens=64)
"""

from mtpbatch._llama_cpp import require_llama_cpp
from mtpbatch._log import log_to_console
from mtpbatch.chat import ChatCompletion, ChatDelta, ChatMessage, FunctionCall, TextPart, ToolCall
from mtpbatch.chat.generation import ChatGeneration
from mtpbatch.engine import Engine
from mtpbatch.exceptions import (
    ChatTemplateError,
    ContextError,
    DecodeError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineOverloaded,
    EngineStalledError,
    GrammarError,
    InternalError,
    InvalidParameterError,
    InvalidRequestError,
    LibraryMismatchError,
    ModelLoadError,
    MtpAcceptError,
    MtpBadSequenceError,
    MtpBatchError,
    MtpDraftError,
    MtpIncompatibleContextsError,
    MtpInitError,
    MtpInvalidConfigError,
    MtpProcessError,
    MtpSessionError,
    MtpStateError,
    NativeDiedError,
    NativeError,
    PromptTooLongError,
    WrongProcessError,
)
from mtpbatch.generation import Generation
from mtpbatch.options import EngineOptions, SamplingOptions
from mtpbatch.probing import probe_model
from mtpbatch.types import (
    Completion,
    Delta,
    Embeddings,
    EngineConfig,
    EngineStats,
    FinishReason,
    ModelFacts,
    SamplingParams,
    SequenceStep,
    StepReport,
    Timings,
    TokenLogprobs,
    Usage,
)
from mtpbatch.watching import RequestAdmitted, RequestEnded, Watcher

__all__ = [
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
    "EngineOptions",
    "EngineOverloaded",
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
]

require_llama_cpp()
