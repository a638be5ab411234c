"""The `qwen35` architecture in PyTorch, for training.

Parameters carry the names and shapes of the GGUF tensors, so exporting is copying. The one
exception is ``ssm_a``, which is learnt as a logarithm (see :meth:`Network.weights`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tinymtp.shape import Shape

_CHUNK = 32


class _RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Convolution(nn.Module):
    """Causal convolution over time, each channel by itself."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-0.5, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        # Shifted sums compile to one loop; conv1d with as many groups as channels does not.
        length, kernel = x.shape[1], self.weight.shape[1]
        padded = F.pad(x.float(), (0, 0, kernel - 1, 0))
        taps = (padded[:, tap : tap + length] * self.weight[:, tap] for tap in range(kernel))
        return torch.stack(list(taps)).sum(0)


class _StepSize(nn.Module):
    """The bias of the gate that decides how fast the recurrent state decays."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))


class _Block(nn.Module):
    """A residual mixer, recurrent or attention, and a residual gated feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        out_gain = 1 / math.sqrt(2 * shape.layers)
        self.attn_norm = _RmsNorm(shape.width, shape.norm_eps)
        self.post_attention_norm = _RmsNorm(shape.width, shape.norm_eps)
        self.ffn_gate = _linear(shape.width, shape.ff)
        self.ffn_up = _linear(shape.width, shape.ff)
        self.ffn_down = _linear(shape.ff, shape.width, out_gain)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.attn_norm(x))
        inner = self.post_attention_norm(x)
        change: Tensor = self.ffn_down(F.silu(self.ffn_gate(inner)) * self.ffn_up(inner))
        return x + change


class _AttentionBlock(_Block):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width, head_dim = shape.width, shape.head_dim
        self.attn_q = _linear(width, 2 * shape.heads * head_dim)
        self.attn_k = _linear(width, shape.kv_heads * head_dim)
        self.attn_v = _linear(width, shape.kv_heads * head_dim)
        self.attn_output = _linear(shape.heads * head_dim, width, 1 / math.sqrt(2 * shape.layers))
        self.attn_q_norm = _RmsNorm(head_dim, shape.norm_eps)
        self.attn_k_norm = _RmsNorm(head_dim, shape.norm_eps)

    def mix(self, x: Tensor) -> Tensor:
        shape = self.shape
        batch, length, _ = x.shape
        query, gate = (
            self.attn_q(x).view(batch, length, shape.heads, 2 * shape.head_dim).chunk(2, -1)
        )
        key = self.attn_k(x).view(batch, length, shape.kv_heads, shape.head_dim)
        value = self.attn_v(x).view(batch, length, shape.kv_heads, shape.head_dim)
        cos, sin = _rotations(shape, length)
        query = _rotate(self.attn_q_norm(query), cos, sin).to(value.dtype)
        key = _rotate(self.attn_k_norm(key), cos, sin).to(value.dtype)
        copies = shape.heads // shape.kv_heads
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.repeat_interleave(copies, 2).transpose(1, 2),
            value.repeat_interleave(copies, 2).transpose(1, 2),
            is_causal=True,
        ).transpose(1, 2)
        change: Tensor = self.attn_output((mixed * gate.sigmoid()).reshape(batch, length, -1))
        return change


class _Nextn(nn.Module):
    """What the MTP block has beyond an attention block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.eh_proj = _linear(2 * shape.width, shape.width)
        self.enorm = _RmsNorm(shape.width, shape.norm_eps)
        self.hnorm = _RmsNorm(shape.width, shape.norm_eps)
        self.shared_head_norm = _RmsNorm(shape.width, shape.norm_eps)

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        combined: Tensor = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return combined


class _MtpBlock(_AttentionBlock):
    """The block that takes a hidden state and the token that followed, and guesses the next."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.nextn = _Nextn(shape)


class _DeltaNetBlock(_Block):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width, heads = shape.width, shape.value_heads
        self.attn_qkv = _linear(width, shape.conv_channels)
        self.attn_gate = _linear(width, shape.value_width)
        self.ssm_conv1d = _Convolution(shape.conv_channels, shape.conv_kernel)
        self.ssm_dt = _StepSize(heads)
        self.ssm_a = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.ssm_beta = _linear(width, heads)
        self.ssm_alpha = _linear(width, heads)
        self.ssm_norm = _RmsNorm(shape.state_dim, shape.norm_eps)
        self.ssm_out = _linear(shape.value_width, width, 1 / math.sqrt(2 * shape.layers))

    def mix(self, x: Tensor) -> Tensor:
        shape = self.shape
        batch, length, _ = x.shape
        qkv = F.silu(self.ssm_conv1d(self.attn_qkv(x)))
        query, key, value = (
            part.view(batch, length, -1, shape.state_dim)
            for part in torch.split(qkv, [shape.key_width, shape.key_width, shape.value_width], -1)
        )
        # Value head h reads with key head h modulo their number, so the heads are tiled.
        copies = shape.value_heads // shape.key_heads
        query = _unit(query, shape.norm_eps).repeat(1, 1, copies, 1)
        key = _unit(key, shape.norm_eps).repeat(1, 1, copies, 1)
        decay = F.softplus(self.ssm_alpha(x).float() + self.ssm_dt.bias) * -self.ssm_a.exp()
        write = self.ssm_beta(x).float().sigmoid()
        mixed = self.ssm_norm(gated_delta_rule(query, key, value, decay, write))
        gate = F.silu(self.attn_gate(x)).view(batch, length, -1, shape.state_dim)
        change: Tensor = self.ssm_out((mixed * gate).reshape(batch, length, -1))
        return change


class Network(nn.Module):
    """The trunk, and the MTP block that guesses one token further than the trunk."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if not (shape.mtp and shape.tied_output):
            raise ValueError("only tied-output models with an MTP block are trained here")
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        nn.init.normal_(self.token_embd.weight, std=0.02)
        self.blk = nn.ModuleList(
            _DeltaNetBlock(shape) if shape.is_recurrent(layer) else _AttentionBlock(shape)
            for layer in range(shape.layers)
        )
        self.blk.append(_MtpBlock(shape))
        self.output_norm = _RmsNorm(shape.width, shape.norm_eps)
        sizes = {name: tuple(weight.shape) for name, weight in self.named_parameters()}
        assert sizes == shape.tensors()

    @property
    def mtp_block(self) -> _MtpBlock:
        block = self.blk[self.shape.layers]
        assert isinstance(block, _MtpBlock)
        return block

    def compile_blocks(self) -> None:
        """Compile each kind of block once; that is far quicker than compiling the whole."""
        for block in self.blk:
            block.compile(dynamic=False)

    def trunk(self, ids: Tensor) -> Tensor:
        """The normalised hidden state at each position, from which the next token is read."""
        x = self.token_embd(ids)
        for block in self.blk[: self.shape.layers]:
            x = block(x)
        hidden: Tensor = self.output_norm(x)
        return hidden

    def draft(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """One application of the MTP block to every position.

        Position i pairs the token there with ``hidden`` of the position before, and its
        result guesses the token after. Feeding the result back as ``hidden`` makes the guess
        one step deeper.
        """
        before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
        nextn = self.mtp_block.nextn
        x = self.mtp_block(nextn.combine(self.token_embd(ids), before))
        drafted: Tensor = nextn.shared_head_norm(x)
        return drafted

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.token_embd.weight)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The tensors as a GGUF holds them."""
        return {
            name: (-weight.exp() if name.endswith("ssm_a") else weight).detach().numpy().copy()
            for name, weight in self.named_parameters()
        }


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, write: Tensor
) -> Tensor:
    """What each head reads from its state, computed chunk by chunk.

    The state S maps keys to values. A step first shrinks it by exp(decay), then replaces the
    share ``write`` of what it holds under the step's key by the step's value, then reads it
    with the query. Within a chunk all the replacements are found at once, by solving a
    triangular system. Sizes: [batch, time, heads, state_dim], without the last for the gates.
    """
    batch, length, heads, dim = value.shape
    padding = -length % _CHUNK
    chunks = (length + padding) // _CHUNK

    def chunked(x: Tensor) -> Tensor:
        x = F.pad(x.flatten(3), (0, 0, 0, 0, 0, padding)).transpose(1, 2)
        return x.reshape(batch, heads, chunks, _CHUNK, -1)

    query = chunked(query) / math.sqrt(dim)
    key, value = chunked(key), chunked(value)
    decay, write = chunked(decay[..., None]).cumsum(-2), chunked(write[..., None])

    causal = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=value.device).tril()
    since = (decay - decay.transpose(-1, -2)).masked_fill(~causal, -1e30).exp()
    grown = decay.exp()
    system = ((key * write) @ key.transpose(-1, -2) * since).tril(-1)
    system = system + torch.eye(_CHUNK, device=value.device)
    solved = torch.linalg.solve_triangular(
        system, torch.cat([value * write, key * write * grown], -1), upper=False, unitriangular=True
    )
    wanted, removed = solved.chunk(2, -1)
    within = (query @ key.transpose(-1, -2)) * since
    from_state = query * grown
    remaining = (decay[..., -1:, :] - decay).exp()
    into_state = (key * remaining).transpose(-1, -2)
    kept = grown[..., -1:, :]

    state = value.new_zeros(batch, heads, dim, dim)
    read = []
    for chunk in range(chunks):
        change = wanted[:, :, chunk] - removed[:, :, chunk] @ state
        read.append(from_state[:, :, chunk] @ state + within[:, :, chunk] @ change)
        state = state * kept[:, :, chunk] + into_state[:, :, chunk] @ change
    return torch.stack(read, 2).reshape(batch, heads, -1, dim).transpose(1, 2)[:, :length]


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.7 * gain / math.sqrt(inputs))
    return layer


def _unit(x: Tensor, eps: float) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(eps)


def _rotations(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    powers = torch.arange(0, shape.rope_dims, 2) / shape.rope_dims
    angles = torch.arange(length)[:, None] * shape.rope_base**-powers
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first dimensions, which pair up half a span apart."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
