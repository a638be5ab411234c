"""What prompts share, and which snapshots hold it. Pure.

A prompt is cut into blocks of ``BLOCK`` tokens, and each block gets a key that stands for the
prompt up to its end: the hash of the key before it and of its tokens. Two prompts that begin
alike have the same keys as far as they do, so that looking for what is shared is looking keys up.
What is left at the end is a block as well, a shorter one, which only the same prompt has. Where
different beginnings have one key, a snapshot's tokens still decide; of the rest it only depends
whether a snapshot is taken or waited for.

What never drafts keeps nothing for the MTP head, so that its snapshots can start only its like:
its keys are others.

Snapshots are worth taking where prompts part. So a prompt's prefill is cut at such points
(:meth:`PrefixIndex.points`), and who would have use for what is just being computed waits for it
(:meth:`PrefixIndex.awaited`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Set
from itertools import islice, pairwise
from typing import Final

from msgspec import Struct

from mtpbatch.exceptions import InternalError

BLOCK: Final = 32  # tokens
LEAST: Final = 64  # tokens: what is less is computed sooner than taken care of
_RECENT: Final = 256  # prompts that have left and still count
_LOOKED_AT: Final = 16  # snapshots that end within one block, newest first


class Hit(Struct, frozen=True, gc=False):
    """What a prompt can start from."""

    snapshot: int
    """Its number; 0: there is none."""
    n_tokens: int
    """How many of the prompt's tokens it spares."""
    n_held: int
    """How many it has."""


NO_HIT: Final = Hit(snapshot=0, n_tokens=0, n_held=0)


class _Snapshot(Struct, frozen=True, gc=False):
    token_ids: tuple[int, ...]
    keys: tuple[int, ...]
    """Those that it is found by."""


class _Prompt(Struct, gc=False):
    token_ids: tuple[int, ...]
    keys: tuple[int, ...]
    shared: bool
    awaited: tuple[int, ...] = ()
    """Those of its keys for which a snapshot is about to be taken."""

    @property
    def n_reusable(self) -> int:
        """Its last token is always computed: something must be sampled from."""
        return len(self.token_ids) - 1


class PrefixIndex:
    """Finds the snapshot that spares a prompt most, and the points where one should be taken.

    ``truncates``: whether a restored sequence can be cut to any shorter length. If not, a snapshot
    is of use only to prompts that begin with all of it.

    State: ``_prompts`` are those that wait or run, by request id, and ``_recent`` the keys of the
    last that have left; ``_n_prompts`` counts both by key. ``_snapshots`` are those that may be
    restored, and ``_holders`` their numbers by key, oldest first. ``_n_awaited`` counts the
    prompts under way by the keys for which they will have a snapshot taken. Every method whose
    docstring says what it does, and not what it gives, changes it.
    """

    def __init__(self, *, truncates: bool) -> None:
        self._truncates = truncates
        self._prompts: dict[str, _Prompt] = {}
        self._recent: deque[tuple[int, ...]] = deque()
        self._n_prompts: Counter[int] = Counter()
        self._snapshots: dict[int, _Snapshot] = {}
        self._holders: dict[int, dict[int, None]] = {}
        self._n_awaited: Counter[int] = Counter()

    # ----------------------------------------------------------------------- prompts

    def enter(
        self, request_id: str, prompt: tuple[int, ...], *, drafts: bool, shared: bool = False
    ) -> None:
        """Take note of a prompt that waits from now on.

        ``shared``: others of the very same tokens come with it, if they are not there already.
        """
        keys = _keys(prompt, len(prompt) - 1, drafts=drafts)
        self._prompts[request_id] = _Prompt(prompt, keys, shared)
        self._n_prompts.update(keys)

    @property
    def entered(self) -> Set[str]:
        """The requests whose prompts wait or run."""
        return self._prompts.keys()

    def leave(self, request_id: str) -> None:
        """Take note that a request ended, if it entered. Its prompt may come again soon."""
        self.expect(request_id, ())
        prompt = self._prompts.pop(request_id, None)
        if prompt is None:
            return
        self._recent.append(prompt.keys)
        if len(self._recent) > _RECENT:
            _subtract(self._n_prompts, self._recent.popleft())

    def points(self, request_id: str, n_stored: int) -> tuple[int, ...]:
        """Lengths at which a prompt's state should be saved: others part from it there.

        Ends of blocks, ascending, and each at least ``LEAST`` tokens more than what is stored
        already; a shared prompt has its end in any case. If a restored sequence can be cut, the
        longest serves all others.
        """
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return ()
        counts = [self._n_prompts[key] for key in prompt.keys]
        if max(counts, default=0) <= 1 and not prompt.shared:
            return ()  # often, and then long prompts cost less
        least = n_stored + LEAST
        ends = [
            end
            for i, (here, next_) in enumerate(pairwise((*counts, 1)))
            if here > max(1, next_) and (end := min(BLOCK * (i + 1), prompt.n_reusable)) >= least
        ]
        if self._is_shared_beyond(prompt, n_stored):
            others = [] if self._truncates else [end for end in ends[:1] if end < prompt.n_reusable]
            return (*others, prompt.n_reusable)
        if self._truncates or not ends:
            return tuple(ends[-1:])
        # Where most part, and the longest.
        return (ends[0], ends[-1]) if ends[-1] >= ends[0] + LEAST else (ends[0],)

    def expect(self, request_id: str, points: tuple[int, ...]) -> tuple[int, ...]:
        """Take note at which lengths a prompt under way is still to be saved.

        Gives the keys that were :meth:`awaited`, and are not any more.
        """
        prompt = self._prompts.get(request_id)
        if prompt is None or not (prompt.awaited or points):
            return ()
        before = prompt.awaited
        _subtract(self._n_awaited, before)
        prompt.awaited = tuple(prompt.keys[_block_of(point)] for point in points)
        if self._truncates and points:
            prompt.awaited = prompt.keys[: _block_of(points[-1]) + 1]
        self._n_awaited.update(prompt.awaited)
        return tuple(key for key in before if key not in self._n_awaited)

    def awaited(self, request_id: str, n_stored: int) -> int | None:
        """The key for which a prompt under way will be saved, and from which this one has more."""
        prompt = self._prompts.get(request_id)
        if prompt is None or not self._n_awaited:
            return None
        if self._is_shared_beyond(prompt, n_stored) and prompt.keys[-1] in self._n_awaited:
            return prompt.keys[-1]
        if prompt.n_reusable < n_stored + LEAST:
            return None
        first = _block_of(n_stored + LEAST)
        return next((key for key in prompt.keys[first:] if key in self._n_awaited), None)

    def is_awaited(self, key: int) -> bool:
        """Whether a prompt under way will be saved for it."""
        return key in self._n_awaited

    # --------------------------------------------------------------------- snapshots

    def add(
        self, number: int, token_ids: tuple[int, ...], *, drafts: bool, of: str | None = None
    ) -> None:
        """Take note of a snapshot that holds these tokens, at least ``BLOCK`` of them.

        ``of``: a request that entered, whose prompt begins them, or begins with them.
        """
        keys = self._keys_of(token_ids, drafts, of)
        if not self._truncates:  # by those that go on after its last whole block, and by its like
            keys = keys[max(0, len(token_ids) // BLOCK - 1) :]
        self._snapshots[number] = _Snapshot(token_ids, keys)
        for key in keys:
            self._holders.setdefault(key, {})[number] = None

    def remove(self, number: int) -> None:
        """Forget a snapshot, if it is known."""
        snapshot = self._snapshots.pop(number, None)
        for key in snapshot.keys if snapshot is not None else ():
            holders = self._holders[key]
            del holders[number]
            if not holders:
                del self._holders[key]

    def longest(self, request_id: str) -> Hit:
        """The snapshot that spares a prompt most."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return NO_HIT
        return self._longest(prompt.token_ids, prompt.keys, prompt.n_reusable)

    def is_new(self, token_ids: tuple[int, ...], *, drafts: bool, of: str | None = None) -> bool:
        """Whether a snapshot of these tokens would spare those that begin with it enough.

        ``of`` as in :meth:`add`.
        """
        if len(token_ids) < LEAST:
            return False
        keys = self._keys_of(token_ids, drafts, of)
        return len(token_ids) - self._longest(token_ids, keys, len(token_ids)).n_tokens >= LEAST

    def _keys_of(self, token_ids: tuple[int, ...], drafts: bool, of: str | None) -> tuple[int, ...]:
        """The keys of tokens; a request's are known as far as its prompt goes."""
        known: tuple[int, ...] = ()
        if of is not None:
            prompt = self._prompts[of]
            known = prompt.keys[: min(prompt.n_reusable, len(token_ids)) // BLOCK]
        return _keys(token_ids, len(token_ids), drafts=drafts, known=known)

    def _longest(self, token_ids: tuple[int, ...], keys: tuple[int, ...], most: int) -> Hit:
        found = [i for i, key in enumerate(keys) if key in self._holders]
        for i in reversed(found):
            best = NO_HIT
            # Where they can be cut, all that have the key are as good, but for less than a block.
            n_candidates = 1 if self._truncates else _LOOKED_AT
            for number in islice(reversed(self._holders[keys[i]]), n_candidates):
                held = self._snapshots[number].token_ids
                n_tokens = self._n_spared(held, token_ids, min(BLOCK * (i + 1), most), most)
                if n_tokens > best.n_tokens:
                    best = Hit(number, n_tokens, len(held))
            if best.n_tokens >= LEAST:
                return best
        return NO_HIT

    def _n_spared(
        self, held: tuple[int, ...], token_ids: tuple[int, ...], n_alike: int, most: int
    ) -> int:
        """How many tokens a snapshot spares whose first ``n_alike`` tokens have the right key."""
        if not self._truncates:
            return len(held) if len(held) <= most and held == token_ids[: len(held)] else 0
        if held[:n_alike] != token_ids[:n_alike]:
            return 0
        most = min(most, len(held))
        while n_alike < most and held[n_alike] == token_ids[n_alike]:
            n_alike += 1
        return n_alike

    @staticmethod
    def _is_shared_beyond(prompt: _Prompt, n_stored: int) -> bool:
        """Whether others come that have use for all of a prompt, and more than what is stored."""
        return prompt.shared and prompt.n_reusable >= max(LEAST, n_stored + 1)

    def check_integrity(self) -> None:
        """Raise :class:`InternalError` if the state breaks its rules. Looks at everything."""
        prompts = Counter(key for prompt in self._prompts.values() for key in prompt.keys)
        recent = Counter(key for keys in self._recent for key in keys)
        awaited = Counter(key for prompt in self._prompts.values() for key in prompt.awaited)
        holders = {(key, n) for key, numbers in self._holders.items() for n in numbers}
        for rule, words in (
            (self._n_prompts == prompts + recent, "each prompt counts once"),
            (self._n_awaited == awaited, "what is awaited is what will be saved"),
            (
                holders == {(key, n) for n, s in self._snapshots.items() for key in s.keys},
                "each snapshot is found by its keys",
            ),
            (all(self._holders.values()), "no key is kept for nothing"),
        ):
            if not rule:
                raise InternalError(f"prefix index: it does not hold that {words}")


def _keys(
    token_ids: tuple[int, ...], n_tokens: int, *, drafts: bool, known: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The key of each block of the first ``n_tokens``, the last one being what is left.

    ``known``: those of the first blocks, which are whole.
    """
    keys = list(known)
    key = known[-1] if known else hash(drafts)
    for begin in range(BLOCK * len(known), n_tokens, BLOCK):
        key = hash((key, token_ids[begin : min(begin + BLOCK, n_tokens)]))
        keys.append(key)
    return tuple(keys)


def _block_of(n_tokens: int) -> int:
    """The block in which so many tokens end."""
    return -(-n_tokens // BLOCK) - 1


def _subtract(counts: Counter[int], keys: tuple[int, ...]) -> None:
    """Keys that are not counted any more are gone, so that counts do not grow for ever."""
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
