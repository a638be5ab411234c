"""Byte-level BPE with the pre-tokenizer that llama.cpp calls `qwen35`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex

Merge = tuple[str, str]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_PIECES = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def _byte_alphabet() -> list[str]:
    """One visible character per byte, in the order GPT-2 fixed.

    Printable bytes stand for themselves; the others get the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


_CHAR_OF_BYTE = _byte_alphabet()
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(_CHAR_OF_BYTE)}


def _spell(piece: str) -> list[str]:
    return [_CHAR_OF_BYTE[byte] for byte in piece.encode()]


class Tokenizer:
    """Encodes text to token ids and back.

    Ids 0-255 are the bytes, then come the merges in the order they were learnt, then the
    special tokens.
    """

    def __init__(self, merges: Iterable[Merge]) -> None:
        self.merges = list(merges)
        self.tokens = [*_CHAR_OF_BYTE, *(left + right for left, right in self.merges)]
        self.ordinary = len(self.tokens)
        self.tokens += SPECIAL_TOKENS
        self._id_of = {token: index for index, token in enumerate(self.tokens)}
        self._rank_of = {merge: rank for rank, merge in enumerate(self.merges)}
        self._encoded: dict[str, list[int]] = {}

    @property
    def end_of_text(self) -> int:
        return self._id_of["<|endoftext|>"]

    @property
    def end_of_turn(self) -> int:
        return self._id_of["<|im_end|>"]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; special tokens are never recognised in it."""
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            known = self._encoded.get(piece)
            if known is None:
                known = self._encoded[piece] = self._encode_piece(piece)
            ids += known
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens read as nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, none for a special token."""
        if token >= self.ordinary:
            return b""
        return bytes(_BYTE_OF_CHAR[char] for char in self.tokens[token])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.merges), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        merges = json.loads(path.read_text(encoding="utf-8"))
        return cls((left, right) for left, right in merges)

    @classmethod
    def train(cls, text: str, vocab: int) -> Tokenizer:
        """Learn merges until the vocabulary, special tokens included, has ``vocab`` entries.

        Text too short to give so many leaves the vocabulary smaller.
        """
        return cls(_learn_merges(text, vocab - 256 - len(SPECIAL_TOKENS)))

    def _encode_piece(self, piece: str) -> list[int]:
        symbols = _spell(piece)
        unknown = len(self.merges)
        while len(symbols) > 1:
            rank, at = min(
                (self._rank_of.get(pair, unknown), index)
                for index, pair in enumerate(pairwise(symbols))
            )
            if rank == unknown:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self._id_of[symbol] for symbol in symbols]


def _learn_merges(text: str, wanted: int) -> list[Merge]:
    """Repeatedly join the most frequent pair of neighbouring symbols."""
    counted = Counter(_PIECES.findall(text))
    pieces = [_spell(piece) for piece in counted]
    counts = list(counted.values())
    frequency: Counter[Merge] = Counter()
    pieces_with: defaultdict[Merge, set[int]] = defaultdict(set)
    for index, symbols in enumerate(pieces):
        for pair in pairwise(symbols):
            frequency[pair] += counts[index]
            pieces_with[pair].add(index)

    merges: list[Merge] = []
    while len(merges) < wanted and frequency:
        # The pair itself breaks ties, so that the same text always gives the same merges.
        best = max(frequency, key=lambda pair: (frequency[pair], pair))
        if frequency[best] < 2:
            break
        merges.append(best)
        for index in pieces_with.pop(best):
            for pair in pairwise(pieces[index]):
                frequency[pair] -= counts[index]
            pieces[index] = _join(pieces[index], best)
            for pair in pairwise(pieces[index]):
                frequency[pair] += counts[index]
                pieces_with[pair].add(index)
        del frequency[best]
    return merges


def _join(symbols: Sequence[str], pair: Merge) -> list[str]:
    joined: list[str] = []
    at = 0
    while at < len(symbols):
        if tuple(symbols[at : at + 2]) == pair:
            joined.append(symbols[at] + symbols[at + 1])
            at += 2
        else:
            joined.append(symbols[at])
            at += 1
    return joined
