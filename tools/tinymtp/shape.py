"""The numbers that define a tiny `qwen35` model, and the tensors that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Architecture of a `qwen35` model: a hybrid trunk and, usually, one MTP block behind it.

    Trunk layers are gated delta nets except every ``attention_interval``-th, which is full
    attention. The MTP block, when there is one, is full attention too.
    """

    vocab: int = 2048
    layers: int = 4
    attention_interval: int = 4
    width: int = 192
    ff: int = 512
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 64
    rope_dims: int = 16
    rope_sections: tuple[int, int, int, int] = (3, 3, 2, 0)
    rope_base: float = 10_000.0
    state_dim: int = 32
    key_heads: int = 6
    value_heads: int = 6
    conv_kernel: int = 4
    norm_eps: float = 1e-6
    context: int = 4096
    tied_output: bool = True
    mtp: bool = True

    def __post_init__(self) -> None:
        if sum(self.rope_sections) * 2 != self.rope_dims:
            raise ValueError("rope_sections must add up to half of rope_dims")
        if self.heads % self.kv_heads or self.value_heads % self.key_heads:
            raise ValueError("heads must be multiples of the heads they share")

    @property
    def blocks(self) -> int:
        """Trunk layers plus the MTP block: what GGUF calls the block count."""
        return self.layers + int(self.mtp)

    @property
    def key_width(self) -> int:
        return self.key_heads * self.state_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.state_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_width + self.value_width

    def is_recurrent(self, block: int) -> bool:
        """Whether a block is a gated delta net rather than attention."""
        return block < self.layers and (block + 1) % self.attention_interval != 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model: its GGUF name, and its shape as numpy sees it."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, self.width),
            "output_norm.weight": (self.width,),
        }
        if not self.tied_output:
            shapes["output.weight"] = (self.vocab, self.width)
        for block in range(self.blocks):
            shapes |= {f"blk.{block}.{name}": size for name, size in self._block(block).items()}
        return shapes

    def _block(self, block: int) -> dict[str, tuple[int, ...]]:
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (width,)}
        if self.is_recurrent(block):
            shapes |= {
                "attn_qkv.weight": (self.conv_channels, width),
                "attn_gate.weight": (self.value_width, width),
                "ssm_conv1d.weight": (self.conv_channels, self.conv_kernel),
                "ssm_dt.bias": (self.value_heads,),
                "ssm_a": (self.value_heads,),
                "ssm_beta.weight": (self.value_heads, width),
                "ssm_alpha.weight": (self.value_heads, width),
                "ssm_norm.weight": (self.state_dim,),
                "ssm_out.weight": (width, self.value_width),
            }
        else:
            shapes |= {
                # Each head's query is followed by that head's output gate.
                "attn_q.weight": (2 * self.heads * self.head_dim, width),
                "attn_k.weight": (self.kv_heads * self.head_dim, width),
                "attn_v.weight": (self.kv_heads * self.head_dim, width),
                "attn_output.weight": (width, self.heads * self.head_dim),
                "attn_q_norm.weight": (self.head_dim,),
                "attn_k_norm.weight": (self.head_dim,),
            }
        shapes |= {
            "post_attention_norm.weight": (width,),
            "ffn_gate.weight": (self.ff, width),
            "ffn_up.weight": (self.ff, width),
            "ffn_down.weight": (width, self.ff),
        }
        if block == self.layers:
            shapes |= {
                "nextn.eh_proj.weight": (width, 2 * width),
                "nextn.enorm.weight": (width,),
                "nextn.hnorm.weight": (width,),
                "nextn.shared_head_norm.weight": (width,),
            }
        return shapes
