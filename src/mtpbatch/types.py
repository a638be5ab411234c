"""The values that cross a border: frozen and safe to share. :func:`parse` validates them.

From the app: :class:`EngineConfig`, :class:`SamplingParams`. Between the scheduler and the
executor: :class:`Plan`, :class:`StepResult`. Back to the app: :class:`Delta`,
:class:`Completion`, :class:`EngineStats`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from mtpbatch.exceptions import InvalidParameterError, NativeError
from mtpbatch.in_words import allowed, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
OnFull = Literal["wait", "reject"]
Isolation = Literal["none", "process"]
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Speculation = Literal["auto"] | Annotated[int, Meta(ge=0, le=32)]

MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ: more aborts the process inside libllama
MAX_LOGPROBS = 20
MAX_BREAKER_BYTES = 40  # llama.cpp cuts longer ones
MAX_BIAS = 100  # as in OpenAI's API
MAX_PRIORITY = 100  # bounded, so that nobody waits forever: see mtpbatch.waiting

_S = TypeVar("_S", bound=Struct)


# ---------------------------------------------------------------------------- from the app


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine is opened. ``None`` means: taken from the model and the machine.

    ::

        config = mtpbatch.EngineConfig(n_seq=16, n_ctx=2048, kv_type="q8_0")
        async with mtpbatch.Engine.open("model.gguf", **msgspec.structs.asdict(config)) as engine:
            assert engine.config.n_seq == 16
    """

    n_seq: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] = 8
    """Sequences that run at once; further requests wait."""
    n_ctx: Annotated[int, Meta(ge=2, le=2**31 - 1)] | None = None
    """Tokens per sequence, prompt and answer together. None: the model's, at most 4096."""
    n_draft_max: Annotated[int, Meta(ge=0, le=32)] = 3
    """Most tokens drafted per sequence and step. 0 opens the engine without MTP heads."""
    draft_model: str | None = None
    """GGUF file of an assistant, which drafts for the model and reads its memory (gemma4).
    None: the model's own MTP heads draft."""
    lora: dict[str, float] = {}
    """LoRA adapters: GGUF files, and by how much each is added to the model's weights: 1 as it was
    trained. They hold for all requests, as llama.cpp has them for a whole context."""
    n_batch: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Most tokens in one step, over all sequences. None: 2048, or what n_seq needs if more."""
    n_ubatch: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Most tokens in one forward pass. None: 512, at most n_batch."""
    n_threads: Annotated[int, Meta(ge=1, le=512)] | None = None
    """CPU threads. None: the CPUs this process may really use (affinity and cgroup quota)."""
    n_gpu_layers: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Layers kept on a GPU, if llama-cpp-python was built for one. -1: all."""
    kv_type: KvType = "f16"
    """Element type of the KV cache. With "f32", and f32 weights, batches of other shapes change
    logits by some millionths, so that a text depends on who shares its batch only where that
    settles a tie; with the others a near-tie can fall either way."""
    n_cells: Annotated[int, Meta(ge=2, le=2**31 - 1)] | None = None
    """KV cells of all sequences together, at least n_ctx. None: n_seq times n_ctx, so that cells
    never run out. With less, a request whose cells are needed by others pauses, and goes on later.
    Needs kv_unified."""
    snapshot_memory: Annotated[int, Meta(ge=0)] = 1024
    """MiB of host memory for states of sequences: prompts' beginnings that may come again, and
    paused requests, which are computed again if they do not fit; but how large the first
    one is shows only when it has been saved. 0: none."""
    kv_unified: bool = True
    """One pool of KV cells for all sequences, instead of an equal share for each. Always equal
    shares where a model with sliding-window attention or with chained heads drafts."""
    speculation: Speculation = "auto"
    """Draft depth of requests that do not say: 0 off, n a fixed depth, "auto" as deep as pays, at
    most n_draft_max."""
    max_waiting: Annotated[int, Meta(ge=0)] | None = 1024
    """Requests that may wait beside the n_seq that can run. None: no limit."""
    max_waiting_tokens: Annotated[int, Meta(ge=0)] | None = None
    """Prompt tokens that those who wait may have together. None: no limit."""
    on_full: OnFull = "wait"
    """What becomes of a request beyond these limits: "wait" lets the awaiting task wait for room,
    first come, first served; "reject" raises EngineOverloaded. submit(), which cannot wait, always
    raises it."""
    isolation: Isolation = "none"
    """Where the model runs: in the app's own process, or in a "process" of its own. If llama.cpp
    aborts or crashes there, running requests end with NativeDiedError, the engine starts another
    process, and requests that wait go on waiting. What reads texts as tokens is there as well, so
    that texts are always tokenised on a helper thread."""
    step_timeout: Annotated[float, Meta(gt=0)] | None = None
    """Seconds without the result of a step after which a "process" is taken for stuck and killed:
    what it ran ends with NativeDiedError, and another one goes on. More than the model needs for
    n_batch tokens of a prompt. None: never."""

    def __post_init__(self) -> None:
        if isinstance(self.speculation, int) and self.speculation > self.n_draft_max:
            raise InvalidParameterError(
                "speculation",
                f"{self.speculation} is deeper than n_draft_max={self.n_draft_max}; raise "
                f"n_draft_max when opening the engine, or lower speculation",
            )
        if self.n_cells is not None and self.n_ctx is not None and self.n_cells < self.n_ctx:
            raise InvalidParameterError(
                "n_cells",
                f"must be at least n_ctx={self.n_ctx}, got {self.n_cells}: give more cells, or "
                f"lower n_ctx",
            )
        if self.step_timeout is not None:
            if not math.isfinite(self.step_timeout):
                words = allowed(EngineConfig, "step_timeout")
                raise InvalidParameterError(
                    "step_timeout", f"must be {words}, got {self.step_timeout}"
                )
            if self.isolation != "process":
                raise InvalidParameterError(
                    "step_timeout",
                    'needs isolation="process", as a step in the app\'s own process cannot be '
                    "ended; open the engine with that, or leave it out and ask check_health()",
                )
        for path, scale in self.lora.items():
            if not math.isfinite(scale):
                raise InvalidParameterError(
                    "lora", f"the scale of {path} must be a finite number, got {scale}"
                )


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request is sampled and when it ends.

    ::

        done = await engine.generate("In the", max_tokens=20, temperature=0.8, top_p=0.95, seed=7)
        again = await engine.generate("In the", max_tokens=20, temperature=0.8, top_p=0.95, seed=7)
        assert again.text == done.text
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 256
    """Most tokens to generate; the context may end it sooner."""
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    """0 takes the most probable token; 1 samples the model's own distribution."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """Sample among the k most probable tokens. 0: all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum. 1: all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Drop tokens less probable than this share of the best one's probability. 0: none."""
    typical_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Sample among the tokens that are as surprising as the distribution lets expect: the nearest
    to that whose probabilities exceed this sum. 1: all."""
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """The chance, at each token, that all tokens of xtc_threshold or more but the least probable
    of them are dropped, which makes a text less predictable. 0: never."""
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    """The probability from which on xtc_probability drops tokens."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    """Logits of tokens that the prompt or the answer holds are divided by this, negative ones
    multiplied. 1: none."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Taken off the logits of tokens that the answer holds."""
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Taken off a token's logit for each time that the answer holds it."""
    dry_multiplier: Annotated[float, Meta(ge=0)] = 0.0
    """Don't repeat yourself: a token that would continue a repetition of n tokens loses
    ``dry_multiplier * dry_base ** (n - dry_allowed_length)`` of its logit. 0: nothing."""
    dry_base: Annotated[float, Meta(ge=1)] = 1.75
    """How fast that grows with the repetition."""
    dry_allowed_length: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 2
    """Repetitions of fewer tokens cost nothing."""
    dry_penalty_last_n: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Last tokens of prompt and answer in which repetitions are found. -1: all."""
    dry_sequence_breakers: tuple[Annotated[str, Meta(min_length=1)], ...] = ("\n", ":", '"', "*")
    """Texts of at most 40 bytes over which no repetition goes."""
    logit_bias: dict[
        Annotated[int, Meta(ge=0, le=2**31 - 1)], Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]
    ] = {}
    """Added to the logits of these tokens."""
    bad_words: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Texts that the answer does not hold, as the model would write them, with or without a space
    before: of the tokens of each, the last one does not follow the others."""
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    """Before so many tokens of the answer, nothing ends it: stop tokens and end-of-generation
    tokens are not sampled, and stop texts do not count."""
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    """Same seed, same request: same tokens, whoever shares the batch. None: a fresh one."""
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """Tokens that end the answer, besides the model's own end-of-generation tokens."""
    ignore_eos: bool = False
    """Go on after the model's end-of-generation tokens."""
    json_schema: Any = None
    """The answer is JSON that this schema allows: a dict, JSON text, or a type that msgspec or
    pydantic can make a schema of. Of this and the next three at most one; they need the extra
    ``structured``."""
    regex: str | None = None
    """The answer as a whole matches this regular expression (Rust's syntax; no lookaround)."""
    choice: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    """The answer is one of these texts."""
    grammar: str | None = None
    """The answer is of this grammar, in llguidance's variant of Lark or in llama.cpp's GBNF."""
    speculation: Speculation | None = None
    """Draft depth of this request: 0 off, n fixed, "auto" as deep as pays; None: as the engine's
    config says."""
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from submission after which the request ends, wherever it is, with the finish reason
    "timeout" and what it has generated by then. None: never."""
    queue_timeout: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from submission after which it ends in the same way if no sequence has taken it by
    then. None: never."""
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Who waits goes first the lower this is. One less is worth 10 seconds of waiting, so that a
    request of high number has its turn as well. Equal ones: first come, first served."""
    deadline: Annotated[float, Meta(gt=0)] | None = None
    """Seconds from submission within which the answer is wanted. While it waits, it goes before
    others that have more time; 60 seconds is what those without a deadline have at priority 0. A
    deadline orders requests and ends none. None: no deadline."""
    reuse_prefix: bool = True
    """Start from what an earlier request has computed if its prompt begins alike, and let later
    ones do so. It changes how soon the first token comes, not which one."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Tell how probable each generated token was, and the so many most probable ones in its place:
    by the model's own distribution, before the temperature or anything else. None: neither."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """The same for each token of the prompt but the first. The prompt is then computed as a whole,
    a few dozen tokens a step, whatever reuse_prefix says. None: neither."""
    metadata: dict[str, str | int | float | bool | None] = {}
    """Whatever the app wants to find again in the completion and in the log."""

    def __post_init__(self) -> None:
        unbounded = ("temperature", "dry_multiplier", "dry_base")
        for name in (*unbounded, "deadline", "timeout", "queue_timeout"):
            if not math.isfinite(getattr(self, name) or 0):
                words = allowed(SamplingParams, name)
                raise InvalidParameterError(name, f"must be {words}, got {getattr(self, name)}")
        asked = [
            name
            for name in ("json_schema", "regex", "choice", "grammar")
            if getattr(self, name) not in (None, ())
        ]
        if len(asked) > 1:
            raise InvalidParameterError(
                asked[1],
                f"cannot be combined with {asked[0]}, since an answer keeps to one form; give one "
                f"of them",
            )
        for name in ("ignore_eos", "min_tokens"):
            if asked and getattr(self, name):
                raise InvalidParameterError(
                    name,
                    f"cannot be combined with {asked[0]}, whose answer has an end; leave it out",
                )
        for name in _TEXTS:
            for text in getattr(self, name):
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise InvalidParameterError(
                        name,
                        f"is not valid Unicode: {shown(text)} has a lone surrogate; take it out",
                    ) from None
        for text in self.dry_sequence_breakers:
            if len(text.encode()) > MAX_BREAKER_BYTES or "\0" in text:
                raise InvalidParameterError(
                    "dry_sequence_breakers",
                    f"must have at most {MAX_BREAKER_BYTES} bytes each in UTF-8, none of them 0; "
                    f"got {shown(text)}",
                )
        if self.min_tokens > self.max_tokens:
            raise InvalidParameterError(
                "min_tokens",
                f"must be at most max_tokens={self.max_tokens}, got {self.min_tokens}; raise "
                f"max_tokens as well",
            )


_TEXTS = ("stop", "bad_words", "dry_sequence_breakers")

# What msgspec raises over a value; the other one over a text with a lone surrogate, unless a text
# is allowed.
_WRONG = (msgspec.ValidationError, UnicodeEncodeError)


def has_dry(params: SamplingParams) -> bool:
    """Whether DRY does anything."""
    return params.dry_multiplier > 0 and params.dry_penalty_last_n != 0


def looks_at_prompt(params: SamplingParams) -> bool:
    """Whether it depends on the prompt's tokens how the answer is sampled."""
    return params.repetition_penalty != 1 or has_dry(params)


def parse(kind: type[_S], values: Mapping[str, Any]) -> _S:
    """Build a ``kind`` from keyword arguments.

    Raises :class:`InvalidParameterError` that names the parameter, what is wrong with the value
    and what would be right.
    """
    one = {name: (text,) for name in _TEXTS if isinstance(text := values.get(name), str)}
    values = {**values, **one}
    try:
        return msgspec.convert(values, kind)
    except _WRONG:
        pass  # slowly again, to find out which one it was
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
            raise InvalidParameterError(name, f"unknown parameter; {hint}")
    converted: dict[str, Any] = {}
    for name, value in values.items():
        try:
            converted[name] = msgspec.convert(value, fields[name].type)
        except _WRONG as error:
            words = allowed(kind, name)
            reason = f"must be {words}" if words else str(error)
            raise InvalidParameterError(name, f"{reason}, got {shown(value)}") from None
    return kind(**converted)


class GrammarSource(Struct, frozen=True):
    """What an answer must be like, as the backend is asked to compile it."""

    parameter: str
    """The parameter that asks for it: json_schema, regex, choice or grammar."""
    text: str
    """Its value; choices as a JSON list."""


# ------------------------------------------------- between the scheduler and the executor


class TokenLogprobs(Struct, frozen=True, gc=False):
    """How probable the model finds a token, as natural logarithms; -inf: impossible.

    ::

        done = await engine.generate("In the", max_tokens=1, logprobs=2)
        chosen = done.logprobs[0]
        for token_id, logprob in chosen.top:
            print(engine.token_bytes[token_id], round(logprob, 2))
    """

    token_id: int
    """The token."""
    logprob: float
    """Of the token, by the model's own distribution."""
    rank: int
    """1: no token is more probable."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, as many as were asked for, and their log probabilities. In
    descending order; of equal ones the lowest id comes first."""


class ModelFacts(Struct, frozen=True, kw_only=True):
    """What the scheduler and the text side need to know of a loaded model and its contexts.

    ::

        room = engine.model.n_ctx - len(await engine.tokenize("In the beginning"))
    """

    n_ctx: int
    """Tokens one sequence can hold."""
    n_seq: int
    """Sequences that can run at once."""
    n_batch: int
    """Most tokens in one step."""
    n_draft_max: int
    """Deepest draft the contexts were made for; 0 when the model has no MTP heads."""
    n_vocab: int
    """Tokens of the vocabulary."""
    eog_token_ids: frozenset[int]
    """The model's end-of-generation tokens."""
    n_cells: int
    """KV cells of all sequences together, one for each token that any of them holds. At least
    n_ctx, so that each request fits alone."""
    n_ubatch: int
    """Most rows in one forward pass."""
    n_outputs: int | None = None
    """Most rows of a step that are looked at: sampled, or scored. At least n_seq times 1 +
    n_draft_max. None: n_batch."""
    recurrent: bool = False
    """Whether layers keep recurrent state: drafts of different lengths are different passes, and
    a sequence cannot be cut back to an earlier token."""
    truncates: bool = True
    """Whether a restored sequence can be cut to any shorter length."""
    consecutive_ids: bool = False
    """Whether a forward pass takes only sequences with consecutive ids, so that gaps between those
    that run cost passes."""


class TemplateSource(Struct, frozen=True, kw_only=True):
    """The chat template of a model file, in Jinja, and what it reads of the vocabulary."""

    text: str
    tool_text: str | None = None
    """Another one, for conversations with tools."""
    special_tokens: dict[str, str] = {}
    """The texts of special tokens by the names that templates know, such as ``bos_token``."""


class Admission(Struct, frozen=True, gc=False):
    """A sequence id is taken by a new request: how it samples and what ends it."""

    seq_id: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    max_tokens: int
    """Tokens it may generate: the request's limit or the context's, whichever is less."""
    drafts: bool = True
    """Whether it may ever draft; if not, nothing is kept for the MTP head."""
    ticket: int = 0
    """Names the request for ``Backend.cancel``, and when it is parked."""
    snapshot: int = 0
    """A snapshot that the sequence starts from; 0: it starts empty. One of a request that never
    drafts starts only requests that never do."""
    n_reused: int = 0
    """Tokens of the snapshot that are kept: its first ones. All of it, unless the model
    truncates (see :class:`ModelFacts`); if it has not so many, it cannot be restored. Cells for
    all of it must be free at that moment."""
    grammar: Any = None
    """What the answer keeps to, compiled by the backend; None: it may be anything."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Of each, the last token does not follow the others in the answer."""
    history: tuple[int, ...] = ()
    """The prompt, if how it samples depends on it (see :func:`looks_at_prompt`)."""


class Save(Struct, frozen=True, gc=False):
    """A sequence's state is copied to host memory, as a snapshot."""

    seq_id: int
    snapshot: int
    """Names it from then on, until a plan drops it. Not 0."""


class Park(Struct, frozen=True, gc=False):
    """A running request gives up its sequence id for a while. How it samples stays.

    It may have ended meanwhile, or be lost (see :class:`StepResult`); then it is kept all the same,
    until a plan forgets or resumes it. If the same plan resumes it, it has moved to another id.
    """

    seq_id: int
    snapshot: int
    """Its state is saved as well; 0: it is not, and will be computed again."""


class Resume(Struct, frozen=True, gc=False):
    """A parked request takes a sequence id again.

    From a snapshot, the one it was parked with, it goes on from the token sampled last, or with
    the next chunk of its prompt; if it has ended, it has the state of its end. Without one (0) its
    entries feed its tokens, prompt and generated ones, as if all of them were a prompt: the results
    of all steps before it was parked must be known by then.
    """

    seq_id: int
    ticket: int
    snapshot: int


class PlanEntry(Struct, frozen=True, gc=False):
    """One sequence's part in a plan.

    ``tokens`` is the next chunk of its prompt. Empty means: go on from the token sampled last,
    which the executor remembers.
    """

    seq_id: int
    tokens: tuple[int, ...]
    sample: bool
    """Sample after this chunk: false while more of the prompt is to come."""
    n_draft: int
    """Most tokens to draft in each step that goes on from a sampled token."""
    selective: bool = False
    """Draft only while that pays on the plan's terms, instead of always ``n_draft`` tokens."""
    expected: float = 0.0
    """Selective: the chance that its next draft is accepted, as far as is known beforehand."""
    scored: tuple[int, ...] = ()
    """Tokens whose log probabilities are wanted, one after each of the first rows: the prompt's own
    from the second on and, while more of it is to come, the next. For requests that ask for
    prompt_logprobs."""


N_CONFIDENCES = 16
"""Classes of how confident an MTP head is of a token that it gives the probability p: the class is
2 * log2(1 / (1 - p)), rounded down and at most the last one."""


class Terms(Struct, frozen=True, gc=False):
    """When a draft pays. Prices are in tokens: those that could be generated in the time. They are
    finite and not negative; chances, one for each class of confidence, are from 0 to 1."""

    target_row: float
    """To verify one more token."""
    target_pass: float
    """One more forward pass."""
    draft_row: float
    """To draft one more token."""
    draft_decode: float
    """One more decode of the draft context."""
    greedy: tuple[float, ...]
    """The chance that a draft of a greedy request is accepted, by the head's confidence."""
    sampled: tuple[float, ...]
    """The same for requests with a temperature, which the head's probability is taken at."""


class Plan(Struct, frozen=True, gc=False):
    """Sequence ids to free, ids to take, then what each active sequence does from now on.

    In that order: save, park, release, drop and forget, admit, resume, and the first step. An id
    that is parked or released can be taken in the same plan. All of it waits for the first steps of
    the plans before, except releases of what is not to be saved, admitted or resumed before.

    A plan that may run ahead stands until the next one comes: the executor repeats it, without
    the prompts it has fed, and needs nobody in between. One without entries leaves the plan
    before it standing; if it saves, or parks with a snapshot, it has one result, without entries.

    A step takes a KV cell for each token that any sequence holds and for each of its rows, drafts
    included. A plan that needs more than there are is not repeated any more, and who waits gets
    the results so far; the first step of one fails.
    """

    release: tuple[int, ...]
    admit: tuple[Admission, ...]
    entries: tuple[PlanEntry, ...]
    terms: Terms | None = None
    """None: no entry is selective."""
    number: int = 0
    """Names the plan in its results."""
    run_ahead: int = 0
    """0: a single step. Otherwise it is repeated, and a step begins while the results of at most
    this many steps have not been taken in."""
    followed: bool = True
    """Whether each step's result is waited for. Otherwise they come together, some 50 ms of them,
    but for those of the plan's first step and of steps in which a sequence ends."""
    keep_prompts: bool = True
    """Whether the MTP head is to pair the tokens of prompts with their hidden rows. Without these a
    prompt takes less time, and drafts after it are accepted less often."""
    save: tuple[Save, ...] = ()
    park: tuple[Park, ...] = ()
    drop: tuple[int, ...] = ()
    """Snapshots that are not needed any more, among them ones that could not be taken."""
    forget: tuple[int, ...] = ()
    """Tickets of parked requests that have ended."""
    resume: tuple[Resume, ...] = ()


class EntryResult(Struct, frozen=True, gc=False):
    """What a step gave one sequence, parallel to ``Plan.entries``.

    Of ``token_ids`` the first ``n_accepted`` are accepted drafts and the last one was sampled
    (a draft that ends the request, by a stop token or its limit, is the last itself). A sequence
    that took no part, or has more of its prompt to come, has none. After a step that completes
    one of its stop texts, and once it is cancelled, it takes no part.
    """

    token_ids: tuple[int, ...]
    n_drafted: int
    n_accepted: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Parallel to token_ids, if the request asks for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Parallel to the entry's ``scored``, in the step that feeds its tokens."""


NO_RESULT = EntryResult(token_ids=(), n_drafted=0, n_accepted=0, finish_reason=None)


class StepResult(Struct, frozen=True, gc=False):
    """The outcome of one step of a plan. Durations are seconds."""

    plan: int
    """The plan's number."""
    entries: tuple[EntryResult, ...]
    n_target_tokens: int
    n_target_decodes: int
    n_draft_tokens: int
    n_draft_decodes: int
    gap_time: float
    """From the end of the step before to its begin, if that left sequences to go on."""
    draft_time: float
    target_time: float
    sample_time: float
    error: NativeError | None = None
    """The step failed: the plan's sequences have lost their state, and on models that keep
    recurrent state all others too."""
    saved: tuple[tuple[int, int], ...] = ()
    """The plan's snapshots, with its first result, and their bytes; 0: it could not be taken, and
    there is none."""
    save_time: float = 0.0
    """Spent on taking and restoring the plan's snapshots, with its first result. Where steps wait
    for it, it is part of gap_time."""
    lost: tuple[int, ...] = ()
    """Sequence ids whose snapshot could not be restored: they take no part until released, or
    parked without a snapshot and resumed."""
    trials: tuple[tuple[int, int, int], ...] = ()
    """Drafts that were verified, if the plan has terms: a class of confidence (``N_CONFIDENCES``
    more for requests with a temperature), how many, and how many of them were accepted."""
    stuck: tuple[tuple[int, str], ...] = ()
    """Sequence ids whose grammar takes too much to go on with, or with which nothing may come next,
    and why: they take no part any more, and have lost their state."""


# ----------------------------------------------------------------------- back to the app


class Usage(Struct, frozen=True):
    """Tokens of a request.

    ::

        usage = (await engine.generate("In the beginning", max_tokens=8)).usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    """

    prompt_tokens: int
    """Of the prompt, special ones included."""
    completion_tokens: int
    """Of the answer: as many as ``token_ids`` has."""
    cached_tokens: int = 0
    """Of the prompt's tokens, those that did not have to be computed: an earlier request had."""

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


class Timings(Struct, frozen=True):
    """Seconds a request spent; each part is 0 if it was not reached.

    ::

        done = await engine.generate("In the beginning", max_tokens=8)
        print(f"{done.timings.first_token * 1e3:.1f} ms, then {done.timings.decode * 1e3:.1f} ms")
    """

    queued: float
    """From submission until a sequence took it, or until its end if none did."""
    prefill: float
    """From then until its first token."""
    first_token: float
    """From submission until its first token."""
    decode: float
    """From its first token to its end."""
    total: float
    """From submission to its end."""


class Delta(Struct, frozen=True, gc=False):
    """What one step added to a request: always whole characters, possibly none yet.

    Of ``token_ids`` the first ``n_accepted`` were drafted and accepted. Text of the last tokens
    can come with a later delta: bytes of a split character and a possible start of a stop text
    wait until they are decided.

    ::

        async with engine.stream("In the beginning", max_tokens=20) as deltas:
            async for delta in deltas:
                print(delta.text, delta.n_accepted, "of", len(delta.token_ids))
    """

    text: str
    """What can be shown now; all deltas joined are the completion's text."""
    token_ids: tuple[int, ...]
    """Tokens that the step added."""
    n_accepted: int
    """How many of them were drafted."""
    finish_reason: FinishReason | None = None
    """In the last delta, how the request ended; None before."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Parallel to token_ids; None: the request did not ask."""


class Completion(Struct, frozen=True, kw_only=True):
    """The end of a request, whichever way it came.

    ::

        done = await engine.generate("In the beginning", max_tokens=32)
        print(done.text, done.finish_reason, f"{done.tokens_per_step:.2f} tokens a step")
    """

    request_id: str
    """Names the request in the log, in traces and to watchers."""
    text: str
    """The answer, without the prompt, and without what ended it."""
    token_ids: tuple[int, ...]
    """Generated tokens; a stop token that ended the request is the last of them."""
    prompt_token_ids: tuple[int, ...]
    """Tokens of the prompt, special ones included."""
    finish_reason: FinishReason
    """How it ended: "stop" (a stop text, a stop token, or the model's own end), "length" (by
    max_tokens or the context), "abort" (cancelled, or the engine was closed), "timeout" or
    "error"."""
    drafted: int
    """Tokens drafted by the MTP head."""
    accepted: int
    """Of those, how many the model agreed with."""
    accepted_by_depth: tuple[int, ...]
    """How often the draft at depth 1, 2, … was accepted."""
    steps: int
    """Decodes of the model that produced tokens."""
    usage: Usage
    """Tokens that it took."""
    timings: Timings
    """Seconds that it took."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Parallel to token_ids; None: the request did not ask."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of each token of the prompt but the first, which nothing comes before; fewer if the request
    ended before all of them were computed. None: it did not ask."""
    metadata: dict[str, str | int | float | bool | None] = {}
    """That of the request."""

    @property
    def tokens_per_step(self) -> float:
        """What drafting gained; 1 without. 0 if there are no tokens."""
        return len(self.token_ids) / self.steps if self.steps else 0.0


class Embeddings(Struct, frozen=True, kw_only=True, eq=False):
    """What texts mean to the model, as vectors.

    ::

        found = await engine.embed(["In the beginning", "import os"])
        similarity = float(found.vectors[0] @ found.vectors[1])
    """

    vectors: npt.NDArray[np.float32]
    """One row for each text: shape [texts, n_embd], float32."""
    prompt_tokens: int
    """Tokens of all texts together."""


class SequenceStep(Struct, frozen=True, gc=False):
    """One sequence's part in a step.

    ::

        class Print(mtpbatch.Watcher):
            def stepped(self, report):
                for step in report.sequences:
                    print(step.request_id, step.n_accepted, "of", step.n_drafted)

        with engine.watch(Print()):
            await engine.generate("In the beginning", max_tokens=8)
    """

    seq_id: int
    """The sequence."""
    request_id: str
    """Of the request that holds it."""
    n_prompt: int
    """Tokens of its prompt that were fed, once more after a pause."""
    n_drafted: int
    """Tokens drafted for it."""
    n_accepted: int
    """Of those, how many the model agreed with."""
    n_generated: int
    """Tokens that it gained, accepted drafts included."""
    n_tokens: int
    """Tokens that it holds, each in a KV cell; 0 if it has paused meanwhile."""


class StepReport(Struct, frozen=True, gc=False):
    """What one step did. Durations are seconds.

    ::

        class Slowest(mtpbatch.Watcher):
            seconds = 0.0

            def stepped(self, report):
                self.seconds = max(self.seconds, report.target_time)

        slowest = Slowest()
        with engine.watch(slowest):
            await engine.generate("In the beginning", max_tokens=8)
        print(slowest.seconds)
    """

    at: float
    """When its results were taken in, by the engine's clock: :func:`time.monotonic`."""
    sequences: tuple[SequenceStep, ...]
    """Those that took part and have not ended by then; none of a failed step."""
    gap_time: float
    """From the end of the step before to its begin, if that left sequences to go on."""
    draft_time: float
    """Spent drafting."""
    target_time: float
    """Spent in the model's own decodes."""
    sample_time: float
    """Spent picking tokens."""
    n_target_tokens: int
    """Rows that the model verified or prefilled."""
    error: str | None
    """Why the step failed."""


class EngineStats(Struct, frozen=True, kw_only=True):
    """A snapshot of an engine; totals count from its opening. Durations are seconds.

    ::

        stats = engine.stats()
        print(stats.running, stats.waiting, f"{stats.kv_cache_usage:.0%} of the cells")
    """

    running: int
    """Requests that hold a sequence."""
    waiting: int
    """Requests that do not yet, or not any more because they pause."""
    free_sequences: int
    """Sequences that nobody holds."""
    n_seq: int
    """Sequences that can run at once."""
    mtp: bool
    """Whether the model has MTP heads and the engine uses them."""
    finished: dict[FinishReason, int]
    """Requests ended so far, by reason."""
    rejected: int = 0
    """Requests that were refused because too many waited."""
    prompt_tokens: int
    """Tokens fed as prompts: without those that were there already, with those that had to be
    computed again after a pause."""
    generated_tokens: int
    """Tokens of answers, accepted drafts included."""
    prefix_queries: int
    """Prompt tokens of requests that began, have ended and may reuse what was computed earlier."""
    prefix_hits: int
    """Of those, how many did not have to be computed."""
    preemptions: int
    """How often a running request paused because the cells were needed by others."""
    kv_cells_used: int
    """KV cells that hold the tokens of requests that run, as far as results have come."""
    n_cells: int
    """KV cells that there are for all of them."""
    snapshot_bytes: int
    """Host memory that snapshots take, of prompts and of requests that pause."""
    drafted: int
    """Tokens drafted."""
    accepted: int
    """Of those, how many the model agreed with."""
    drafted_by_depth: tuple[int, ...]
    """Drafted tokens by their place in the draft, from the first on."""
    accepted_by_depth: tuple[int, ...]
    """The same of accepted ones."""
    draft_depth: int
    """Most tokens that requests draft per step for which the engine chooses, at the moment."""
    steps: int
    """Steps of the engine, each for all sequences that run."""
    gap_time: float
    """In which no step ran although sequences were left to go on."""
    draft_time: float
    """Spent drafting."""
    target_time: float
    """Spent in the model's own decodes."""
    sample_time: float
    """Spent picking tokens."""
    restarts: int = 0
    """How often the process that runs the model died, so that another one was needed."""

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV cells that are used, from 0 to 1."""
        return self.kv_cells_used / self.n_cells

    @property
    def acceptance(self) -> float | None:
        """Accepted share of the drafted tokens; None before the first draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        """Of a sequence: each decode gives it one token that was not drafted. None before any."""
        steps = self.generated_tokens - self.accepted
        return self.generated_tokens / steps if steps else None
