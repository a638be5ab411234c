"""What goes over the wire: OpenAI's requests and answers, as values that check themselves.

A field that is not known is refused, not passed over. What is known and not done is refused as
well, unless leaving it out changes no answer, as with ``user``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from mtpbatch.chat.messages import Role
from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.types import MAX_BIAS, MAX_LOGPROBS, MAX_PRIORITY, Speculation

MAX_N = 128
MAX_PROMPTS = 2048

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0)]
FinishReason = Literal["stop", "length", "tool_calls"]


class _Asked(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What all requests may have."""

    model: str | None = None
    """As ``/v1/models`` names it; it may be left out."""
    user: str | None = None
    """Accepted, and not used."""


# --------------------------------------------------------------------------- requests


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What a stream tells besides its answer."""

    include_usage: bool = False
    """A last event with the usage, and without choices."""
    continuous_usage_stats: bool = False
    """With it, the tokens so far in every event, as vLLM has it."""
    include_obfuscation: bool = False
    """Accepted, and not done."""


class StructuredOutputs(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The form of the answer, as vLLM has it: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[Text], Meta(min_length=1)] | None = None
    grammar: str | None = None


class JsonSchema(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A schema, and what OpenAI's API has beside it."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """Answers keep to the schema in any case."""


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True, frozen=True):
    """Any text."""


class JsonObjectFormat(
    Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True, frozen=True
):
    """Any JSON object."""


class JsonSchemaFormat(
    Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True, frozen=True
):
    """JSON that a schema allows."""

    json_schema: JsonSchema


class Generating(_Asked, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What requests that generate may have. From ``top_k`` on, names are those of the engine's
    sampling parameters."""

    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    """1 unless it is given."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Taken modulo 2**32."""
    stop: Text | list[Text] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    metadata: dict[str, str] | None = None
    """Stands in the engine's log."""
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1: all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    dry_multiplier: Annotated[float, Meta(ge=0)] | None = None
    dry_base: Annotated[float, Meta(ge=1)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    dry_penalty_last_n: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    dry_sequence_breakers: list[Text] | None = None
    bad_words: list[Text] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    deadline: Positive | None = None
    timeout: Positive | None = None
    queue_timeout: Positive | None = None
    speculation: Speculation | None = None
    reuse_prefix: bool | None = None


_OF_ONE_KIND: Final = {"anyOf": [{"items": {"type": k}} for k in ("string", "integer", "array")]}
Prompts: TypeAlias = Annotated[
    list[str | TokenId | list[TokenId]], Meta(min_length=1, extra_json_schema=_OF_ONE_KIND)
]


class CompletionRequest(Generating, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """``POST /v1/completions``."""

    prompt: str | Prompts
    """A text, texts, a list of token ids, or lists of these."""
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    """16 unless it is given. 0, with ``echo`` only: the prompt alone."""
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    """``n``, or left out."""
    suffix: Literal[""] | None = None
    """Not possible."""


class FunctionName(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Which function."""

    name: str


class NamedTool(Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A function that is to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


# The engine checks both, and gives keys on that only some templates know. Clients that are made of
# the description are to know what has to be there all the same.
_TEXT_PART: Final = {
    "type": "object",
    "required": ["text"],
    "properties": {"text": {"type": "string"}, "type": {"const": "text"}},
}
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}
_MESSAGE: Final = {
    "required": ["role"],
    "properties": {"role": {"enum": [*get_args(Role)]}},
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"content": _CONTENT}},
    ],
}
_FUNCTION: Final = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}},
}
_TOOL: Final = {
    "required": ["function"],
    "properties": {"function": _FUNCTION, "type": {"const": "function"}},
}
Message: TypeAlias = Annotated[dict[str, Any], Meta(extra_json_schema=_MESSAGE)]
Tool: TypeAlias = Annotated[dict[str, Any], Meta(extra_json_schema=_TOOL)]


class ChatRequest(Generating, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """As many as the context has room for, unless it is given."""
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    """OpenAI's newer name of ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """False: of the calls in an answer the first one is given."""
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    """For templates that know it."""
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class EmbeddingRequest(_Asked, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """``POST /v1/embeddings``."""

    input: str | Prompts
    """A text, texts, a list of token ids, or lists of these."""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    """As many as the model has, or left out."""


def listed(field: str, given: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a field that may hold one or many, as texts or as tokens."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given]
    if len(kinds) > 1:
        raise InvalidParameterError(field, "must hold texts or tokens, not both")
    if len(given) > MAX_PROMPTS:
        raise InvalidParameterError(field, f"has {len(given)} items; at most {MAX_PROMPTS} can be")
    return given


# ---------------------------------------------------------------------------- answers


class PromptTokensDetails(Struct, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Those that an earlier request had computed."""


class CompletionTokensDetails(Struct, frozen=True):
    """Of what was drafted."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct, frozen=True):
    """Tokens of a request, all of its answers together; in an event with a choice, those of that
    answer so far, and no details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """How probable the tokens are; lists are parallel."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """One answer, or what has come of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: Literal["timeout"] | None = None


class CompletionAnswer(Struct, frozen=True, kw_only=True):
    """What ``/v1/completions`` answers; in a stream, each event."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Struct, frozen=True):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    """A token, and how probable it was."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """How probable the tokens are, those of markup included."""

    content: list[TokenLogprob]


class CalledFunction(Struct, frozen=True):
    """Which function, with what: JSON as text."""

    name: str
    arguments: str


class AnsweredToolCall(Struct, frozen=True, kw_only=True):
    """A function that the model wants to be called."""

    index: int | UnsetType = UNSET
    """In a stream."""
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnsweredMessage(Struct, frozen=True, kw_only=True):
    """An assistant's message, or what has come of it."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: Literal["timeout"] | None = None


class ChatAnswer(Struct, frozen=True, kw_only=True):
    """What ``/v1/chat/completions`` answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """What has come of one answer."""

    index: int
    delta: AnsweredMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: Literal["timeout"] | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """An event in the stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class EmbeddingUsage(Struct, frozen=True):
    """Tokens of all texts together."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True, kw_only=True):
    """What one text means to the model."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers; or, in base64, their bytes as float32, least significant first."""


class EmbeddingAnswer(Struct, frozen=True, kw_only=True):
    """What ``/v1/embeddings`` answers."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(Struct, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mtpbatch"
    max_model_len: int
    """Tokens that one sequence can hold, prompt and answer together."""


class ModelList(Struct, frozen=True, kw_only=True):
    """What ``/v1/models`` answers."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Struct, frozen=True, kw_only=True):
    """What ``/health`` answers while all is well."""

    status: Literal["ok"] = "ok"
    running: int
    waiting: int
