"""The `qwen35` architecture in plain numpy, as something to compare an engine with.

It shares no code with the library or with the tools that make models: it reads a GGUF and
computes in double precision, the recurrent layers one token at a time. Engine and reference
agree best on f32 files; a file's quantised weights are expanded here, while llama.cpp also
quantises what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(slots=True)
class Drafting:
    """What greedy drafting did."""

    tokens: list[int]
    """The generated tokens."""
    drafted: int
    accepted: int
    drafted_by_depth: list[int]
    """How many drafts were made at depth 1, 2, ..."""
    accepted_by_depth: list[int]
    """How many of them were accepted, all the shallower ones of their step included."""
    steps: int
    """Verify steps; the token that ends the prompt's own decode is not among them."""

    @property
    def tokens_per_step(self) -> float:
        return (len(self.tokens) - 1) / self.steps


@dataclass(slots=True)
class _AttentionCache:
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def truncate(self, length: int) -> None:
        del self.keys[length:], self.values[length:]


@dataclass(slots=True)
class _RecurrentCache:
    recent: Array
    """The last inputs of the convolution, oldest first."""
    state: Array
    """[head, key dimension, value dimension]"""


class Reference:
    """A model read from a GGUF file."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._weights: dict[str, Array] = {}
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            sizes = tuple(int(size) for size in reversed(tensor.shape))
            self._weights[tensor.name] = values.astype(np.float64).reshape(sizes)

        def value(key: str, default: int | None = None) -> Any:
            found = reader.get_field(f"qwen35.{key}")
            if found is None and default is not None:
                return default
            assert found is not None, key
            return found.contents()

        self._has_mtp = bool(value("nextn_predict_layers", 0))
        self._layers: int = value("block_count") - int(self._has_mtp)
        self._interval: int = value("full_attention_interval")
        self._heads: int = value("attention.head_count")
        self._kv_heads: int = value("attention.head_count_kv")
        self._head_dim: int = value("attention.key_length")
        self._rope_dims: int = value("rope.dimension_count")
        self._rope_base: float = value("rope.freq_base")
        self._eps: float = value("attention.layer_norm_rms_epsilon")
        self._state_dim: int = value("ssm.state_size")
        self._key_heads: int = value("ssm.group_count")
        self._value_heads: int = value("ssm.time_step_rank")
        self._conv_kernel: int = value("ssm.conv_kernel")
        output = "output.weight"
        self._output = self._weights[output if output in self._weights else "token_embd.weight"]

    def trunk(self, tokens: Sequence[int]) -> tuple[Array, Array]:
        """Hidden states after the output norm and logits, a row per token."""
        return self._continue_trunk(tokens, self._new_caches())

    def mtp(self, tokens: Sequence[int], previous: Array) -> tuple[Array, Array]:
        """Hidden states and logits of the MTP block.

        Row i of ``previous`` is the hidden state of the position before token i, which is zero
        for the first token of a text. The logits of row i are for the token after token i.
        """
        return self._continue_mtp(tokens, previous, _AttentionCache())

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Continue a prompt by ``count`` of the likeliest tokens."""
        return self._greedy_with_hidden(prompt, count)[0]

    def simulate_drafting(self, prompt: Sequence[int], count: int, depth: int) -> Drafting:
        """Generate ``count`` tokens greedily, drafting ahead as an engine does.

        The prompt's decode gives the first token. Each step then drafts up to ``depth`` tokens,
        feeding each guess and its hidden state back, but never past the end of what is wanted;
        it accepts the drafts that match the trunk, and adds the trunk's own next token.
        Nothing stops at an end token.
        """
        generated, hidden = self._greedy_with_hidden(prompt, count)
        text = [*prompt, *generated]
        previous = np.vstack([np.zeros_like(hidden[:1]), hidden])
        result = Drafting(generated, 0, 0, [0] * depth, [0] * depth, 0)
        cache = _AttentionCache()
        newest = len(prompt)
        while newest < len(text) - 1:
            result.steps += 1
            # True hidden states replace those of the drafts of the step before.
            fed = len(cache)
            known = slice(fed, newest + 1)
            rows, logits = self._continue_mtp(text[known], previous[known], cache)
            accepted, matching = 0, True
            deepest = min(depth, len(text) - 2 - newest)
            for level in range(deepest):
                guess = int(logits[-1].argmax())
                result.drafted_by_depth[level] += 1
                matching = matching and guess == text[newest + 1 + level]
                if matching:
                    result.accepted_by_depth[level] += 1
                    accepted += 1
                if level + 1 < deepest:
                    rows, logits = self._continue_mtp([guess], rows[-1:], cache)
            cache.truncate(newest + 1)
            newest += accepted + 1
        result.drafted = sum(result.drafted_by_depth)
        result.accepted = sum(result.accepted_by_depth)
        return result

    def _greedy_with_hidden(self, prompt: Sequence[int], count: int) -> tuple[list[int], Array]:
        caches = self._new_caches()
        hidden, logits = self._continue_trunk(prompt, caches)
        all_hidden, generated = [hidden], [int(logits[-1].argmax())]
        while len(generated) < count:
            hidden, logits = self._continue_trunk(generated[-1:], caches)
            all_hidden.append(hidden)
            generated.append(int(logits[-1].argmax()))
        return generated, np.vstack(all_hidden)

    def _new_caches(self) -> list[_AttentionCache | _RecurrentCache]:
        return [
            _AttentionCache()
            if (layer + 1) % self._interval == 0
            else _RecurrentCache(
                np.zeros((self._conv_kernel - 1, len(self._w(layer, "ssm_conv1d.weight")))),
                np.zeros((self._value_heads, self._state_dim, self._state_dim)),
            )
            for layer in range(self._layers)
        ]

    def _continue_trunk(
        self, tokens: Sequence[int], caches: list[_AttentionCache | _RecurrentCache]
    ) -> tuple[Array, Array]:
        x = self._weights["token_embd.weight"][list(tokens)]
        for layer, cache in enumerate(caches):
            x = self._block(layer, x, cache)
        hidden = self._norm(x, self._weights["output_norm.weight"])
        return hidden, hidden @ self._output.T

    def _continue_mtp(
        self, tokens: Sequence[int], previous: Array, cache: _AttentionCache
    ) -> tuple[Array, Array]:
        assert self._has_mtp
        block = self._layers
        embedded = self._weights["token_embd.weight"][list(tokens)]
        both = np.hstack(
            [
                self._norm(embedded, self._w(block, "nextn.enorm.weight")),
                self._norm(previous, self._w(block, "nextn.hnorm.weight")),
            ]
        )
        x = self._block(block, both @ self._w(block, "nextn.eh_proj.weight").T, cache)
        hidden = self._norm(x, self._w(block, "nextn.shared_head_norm.weight"))
        return hidden, hidden @ self._output.T

    def _w(self, block: int, name: str) -> Array:
        return self._weights[f"blk.{block}.{name}"]

    def _norm(self, x: Array, weight: Array) -> Array:
        scaled: Array = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._eps) * weight
        return scaled

    def _block(self, block: int, x: Array, cache: _AttentionCache | _RecurrentCache) -> Array:
        normed = self._norm(x, self._w(block, "attn_norm.weight"))
        if isinstance(cache, _AttentionCache):
            x = x + self._attention(block, normed, cache)
        else:
            x = x + self._delta_net(block, normed, cache)
        normed = self._norm(x, self._w(block, "post_attention_norm.weight"))
        gate = _silu(normed @ self._w(block, "ffn_gate.weight").T)
        up = normed @ self._w(block, "ffn_up.weight").T
        return x + (gate * up) @ self._w(block, "ffn_down.weight").T

    def _attention(self, block: int, x: Array, cache: _AttentionCache) -> Array:
        count, start = len(x), len(cache)
        # A head's rows in the query matrix: its query, then the gate on its output.
        both = (x @ self._w(block, "attn_q.weight").T).reshape(count, self._heads, 2, -1)
        query = self._norm(both[:, :, 0], self._w(block, "attn_q_norm.weight"))
        gate = _sigmoid(both[:, :, 1])
        key = (x @ self._w(block, "attn_k.weight").T).reshape(count, self._kv_heads, -1)
        key = self._norm(key, self._w(block, "attn_k_norm.weight"))
        value = (x @ self._w(block, "attn_v.weight").T).reshape(count, self._kv_heads, -1)
        cache.keys += list(self._rotate(key, start))
        cache.values += list(value)
        query = self._rotate(query, start)

        group = self._heads // self._kv_heads
        keys = np.repeat(np.stack(cache.keys), group, 1)
        values = np.repeat(np.stack(cache.values), group, 1)
        scores = np.einsum("qhd,khd->hqk", query, keys) / np.sqrt(self._head_dim)
        future = np.arange(len(keys)) > np.arange(start, start + count)[:, None]
        scores = np.where(future, -np.inf, scores)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed: Array = np.einsum("hqk,khd->qhd", shares, values) * gate
        return mixed.reshape(count, -1) @ self._w(block, "attn_output.weight").T

    def _rotate(self, x: Array, start: int) -> Array:
        """Rotate pairs of the first dimensions by an angle that grows with the position."""
        half = self._rope_dims // 2
        speeds = self._rope_base ** (-np.arange(half) / half)
        angles = np.arange(start, start + len(x))[:, None, None] * speeds
        first, second = x[..., :half], x[..., half : 2 * half]
        turned = [
            first * np.cos(angles) - second * np.sin(angles),
            first * np.sin(angles) + second * np.cos(angles),
            x[..., 2 * half :],
        ]
        return np.concatenate(turned, -1)

    def _delta_net(self, block: int, x: Array, cache: _RecurrentCache) -> Array:
        gate = _silu(x @ self._w(block, "attn_gate.weight").T)
        alpha = x @ self._w(block, "ssm_alpha.weight").T + self._w(block, "ssm_dt.bias")
        step = np.logaddexp(0, alpha)
        keep = np.exp(step * self._w(block, "ssm_a"))
        write = _sigmoid(x @ self._w(block, "ssm_beta.weight").T)
        kernel = self._w(block, "ssm_conv1d.weight")
        inputs = np.vstack([cache.recent, x @ self._w(block, "attn_qkv.weight").T])
        cache.recent = inputs[len(x) :]

        read = []
        for at in range(len(x)):
            window = inputs[at : at + self._conv_kernel]
            heads = _silu(np.einsum("tc,ct->c", window, kernel)).reshape(-1, self._state_dim)
            query, key, value = np.split(heads, [self._key_heads, 2 * self._key_heads])
            # Value head h uses key head h modulo their number.
            repeats = (self._value_heads // self._key_heads, 1)
            query = np.tile(self._unit(query), repeats) / np.sqrt(self._state_dim)
            key = np.tile(self._unit(key), repeats)
            state = cache.state * keep[at, :, None, None]
            stored = np.einsum("hk,hkv->hv", key, state)
            change = (value - stored) * write[at, :, None]
            cache.state = state + key[:, :, None] * change[:, None, :]
            read.append(np.einsum("hk,hkv->hv", query, cache.state))
        mixed = self._norm(np.stack(read), self._w(block, "ssm_norm.weight"))
        return (mixed.reshape(len(x), -1) * gate) @ self._w(block, "ssm_out.weight").T

    def _unit(self, x: Array) -> Array:
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        scaled: Array = x / np.maximum(length, self._eps)
        return scaled


def _sigmoid(x: Array) -> Array:
    squashed: Array = 1 / (1 + np.exp(-x))
    return squashed


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)
