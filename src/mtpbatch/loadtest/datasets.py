"""What is asked for: prompts, lengths of answers, cancellations. Pure; same seed, same requests.

Prompts, lengths and cancellations are drawn from sources of chance of their own, so that to
change one of them leaves the others as they were.
"""

from __future__ import annotations

import importlib.resources
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

from mtpbatch.exceptions import InvalidParameterError
from mtpbatch.loadtest.traces import BLOCK, TraceEntry
from mtpbatch.testing.workload import Lengths

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | tuple[int, ...] | tuple[Message, ...]
"""A text, its tokens, or the messages of a conversation."""


class Item(Struct, frozen=True):
    """A prompt, and what a dataset knows of it."""

    prompt: Prompt
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Work(Struct, frozen=True, kw_only=True):
    """One request to be made."""

    prompt: Prompt
    prompt_tokens: int | None
    """As far as the dataset knows."""
    max_tokens: int
    cancel_after: int | None
    """It is given up when so many tokens have come; None: never."""


Dataset: TypeAlias = Callable[[random.Random], Iterator[Item]]
"""Items without end, from a source of chance."""


def work(
    dataset: Dataset, output: Lengths | None, default: int, cancelled: float, seed: int | str
) -> Iterator[Work]:
    """Requests without end, or as many as a trace has.

    Answers are as long as ``output`` draws, if given; else as the dataset says, or ``default``. A
    share ``cancelled`` is given up, each when a random part of its answer has come.
    """
    of_output = random.Random(f"{seed} output")
    of_cancelling = random.Random(f"{seed} cancelling")
    for item in dataset(random.Random(f"{seed} prompts")):
        drawn = None if output is None else output(of_output)
        max_tokens = drawn or item.output_tokens or default
        chosen, part = of_cancelling.random() < cancelled, of_cancelling.random()
        yield Work(
            prompt=item.prompt,
            prompt_tokens=item.prompt_tokens,
            max_tokens=max_tokens,
            cancel_after=int(part * max_tokens) if chosen else None,
        )


# ---------------------------------------------------------------------------- from files


class Listed(Struct, frozen=True):
    """Items of a list, in random order, all of them before any comes again."""

    items: tuple[Item, ...]

    @property
    def conversational(self) -> bool:
        """Whether prompts are messages of conversations."""
        return any(isinstance(part, dict) for item in self.items for part in item.prompt)

    def __call__(self, chance: random.Random) -> Iterator[Item]:
        """Draw items."""
        while True:
            yield from chance.sample(self.items, len(self.items))


def builtin() -> Listed:
    """Texts of the kind the packaged model knows."""
    lines = importlib.resources.files("mtpbatch") / "loadtest" / "prompts.jsonl"
    return _from_jsonl("dataset", lines.read_text(encoding="utf-8"))


def read_dataset(parameter: str, path: Path) -> Listed:
    """Items from a file: JSONL, or JSON in the format of ShareGPT.

    A line of JSONL has ``prompt`` (a text or token ids) or ``messages``, and may have
    ``output_tokens``. Of a ShareGPT conversation the first thing that is said is the prompt, and
    the reply tells how long the answer is: a token for each 4 characters, as nobody here knows the
    server's vocabulary.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError(parameter, f"{path} cannot be read: {error}") from None
    read = _from_sharegpt if text.lstrip().startswith("[") else _from_jsonl
    return read(parameter, text)


class _Line(Struct):
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    output_tokens: Annotated[int, Meta(ge=1)] | None = None


def _from_jsonl(parameter: str, text: str) -> Listed:
    decode = msgspec.json.Decoder(_Line).decode
    items = []
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        try:
            line = decode(row)
        except msgspec.DecodeError as error:
            raise InvalidParameterError(parameter, f"line {number}: {error}") from None
        prompt = line.prompt or line.messages
        if not prompt:
            raise InvalidParameterError(
                parameter, f"line {number} must have a prompt or messages, and not empty"
            )
        known = len(prompt) if line.prompt and not isinstance(prompt, str) else None
        items.append(Item(prompt, known, line.output_tokens))
    return _listed(parameter, items)


class _Turn(Struct):
    value: str
    speaker: str = msgspec.field(name="from")


class _Conversation(Struct):
    conversations: tuple[_Turn, ...]


_CHARACTERS_PER_TOKEN: Final = 4


def _from_sharegpt(parameter: str, text: str) -> Listed:
    try:
        conversations = msgspec.json.decode(text, type=list[_Conversation])
    except msgspec.DecodeError as error:
        raise InvalidParameterError(parameter, f"not in ShareGPT's format: {error}") from None
    items = []
    for conversation in conversations:
        for asked, reply in itertools.pairwise(conversation.conversations[:2]):
            if asked.value and reply.value:
                tokens = -(-len(reply.value) // _CHARACTERS_PER_TOKEN)
                items.append(Item(asked.value, None, tokens))
    return _listed(parameter, items)


def _listed(parameter: str, items: Sequence[Item]) -> Listed:
    if not items:
        raise InvalidParameterError(parameter, "holds no prompts")
    return Listed(tuple(items))


# -------------------------------------------------------------------------------- drawn

_WORDS: Final = tuple(
    (  # noqa: SIM905 - a list of quoted words is no easier to read
        "time year people way day man thing woman life child world school state family student "
        "group country problem hand part place case week company system program question work "
        "number night point home water room mother area money story fact month lot right study "
        "book eye job word business issue side kind head house service friend father power hour "
        "game line end member law car city name team minute idea body back face level office door "
        "health person art war history party result change morning reason research girl guy "
        "moment air teacher force"
    ).split()
)

Filler: TypeAlias = Callable[[random.Random, int], str | tuple[int, ...]]
"""Draws a prompt of so many tokens."""


def words(chance: random.Random, n: int) -> str:
    """English words, each of which is one token in most vocabularies."""
    return " ".join(chance.choices(_WORDS, k=n))


class TokenIds(Struct, frozen=True):
    """Token ids from ``low`` to ``high``."""

    low: int
    high: int

    def __call__(self, chance: random.Random, n: int) -> tuple[int, ...]:
        """Draw a prompt."""
        return tuple(chance.choices(range(self.low, self.high + 1), k=n))


def _known(prompt: str | tuple[int, ...]) -> int | None:
    """The server's count alone says how many tokens a text has."""
    return None if isinstance(prompt, str) else len(prompt)


class Drawn(Struct, frozen=True):
    """Random prompts, each a new one."""

    lengths: Lengths
    fill: Filler = words

    def __call__(self, chance: random.Random) -> Iterator[Item]:
        """Draw items."""
        while True:
            prompt = self.fill(chance, self.lengths(chance))
            yield Item(prompt, _known(prompt))


class SharedPrefixes(Struct, frozen=True):
    """Random prompts that begin with one of ``n`` prefixes and go on each in its own way."""

    n: int
    prefix: Lengths
    suffix: Lengths
    fill: Filler = words

    def __call__(self, chance: random.Random) -> Iterator[Item]:
        """Draw items."""
        prefixes = [self.fill(chance, self.prefix(chance)) for _ in range(self.n)]
        while True:
            begin = chance.choice(prefixes)
            prompt = _joined([begin, self.fill(chance, self.suffix(chance))])
            yield Item(prompt, _known(prompt))


class Traced(Struct, frozen=True):
    """Random prompts as long as a trace's, alike where those were, each of its requests once."""

    entries: tuple[TraceEntry, ...]
    fill: Filler = words

    def __call__(self, chance: random.Random) -> Iterator[Item]:
        """Draw items."""
        salt = chance.random()
        for entry in self.entries:
            prompt = self._prompt(chance, salt, entry)
            yield Item(prompt, _known(prompt), entry.output_tokens)

    def _prompt(
        self, chance: random.Random, salt: float, entry: TraceEntry
    ) -> str | tuple[int, ...]:
        left = entry.prompt_tokens
        parts = []
        for block in entry.blocks:
            if left > 0:
                parts.append(self.fill(random.Random(f"{salt} {block}"), min(BLOCK, left)))
                left -= BLOCK
        if left > 0:
            parts.append(self.fill(chance, left))
        return _joined(parts)


def _joined(parts: Sequence[str | tuple[int, ...]]) -> str | tuple[int, ...]:
    texts = [part for part in parts if isinstance(part, str)]
    if texts:
        return " ".join(texts)
    return tuple(itertools.chain.from_iterable(part for part in parts if not isinstance(part, str)))
