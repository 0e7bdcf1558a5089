"""Llama 4's text models (Meta 2025), as released.

Each token takes the expert of its highest logit, whose *input* is weighed by the logit's sigmoid, beside a
shared expert. Three of four layers turn queries and keys by position and see the chunk of the text that the
token is in; every fourth sees everything, knows no positions, and sharpens its attention with the length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Attention, Decoder, feed_forwards, initialise
from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default; the released sizes are in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 4
    """L, decoder layers"""
    num_heads: int = 4
    """H, query heads"""
    num_kv_heads: int = 2
    """Hkv, key and value heads; divides num_heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 16
    """E, routed experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 1
    """K, routed experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 64
    """F, hidden width of an expert, of the shared one too; one value, or one per layer"""
    moe_layers: str = "all"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    chunk: int = 128
    """tokens of a chunk, beyond whose begin layers with positions do not see"""
    temperature: tuple[float, float] = (8192.0, 0.1)
    """f and a of layers without positions: queries times 1 + a ln(1 + floor((p + 1) / f))"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 500_000.0
    """base of the rotary positions"""
    rope_scaling: str = "none"
    """stretched positions: none, linear:factor=F, or dynamic, yarn, llama3 with their numbers"""
    qk_norm: bool = True
    """normalise turned queries and keys"""
    balance_weight: float = 0.01
    """weight of the balance loss (1 when balanced, mean over layers)"""


_STRETCHED = "llama3:factor=16,original=8192,low=1,high=1"
PUBLISHED: dict[str, Settings] = {
    # The released configurations' text parts.
    "llama4-scout": Settings(
        *(202048, 5120, 48, 40, 8, 128, 16, 1, 8192, "all", 16384, 8192, (8192.0, 0.1), 10485760, 5e5),
        *(_STRETCHED, True, 0.001),
    ),
    "llama4-maverick": Settings(
        *(202048, 5120, 48, 40, 8, 128, 128, 1, 8192, "every:2", 16384, 8192, (8192.0, 0.1), 1048576, 5e5),
        *("none", False, 0.001),
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s = settings
    if s.chunk < 1 or not s.temperature[0] > 0:
        raise UserError(f"chunk {s.chunk}, temperature {s.temperature}; allowed: 1 or more, f above 0")

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, router="llama4", num_shared_experts=1)

    def attention(layer: int) -> Attention:
        heads = (s.width, s.num_heads, s.num_kv_heads, s.head_dim)
        if layer % 4 == 3:
            return Attention(*heads, rotary=False, temperature=s.temperature)
        norm = "unit" if s.qk_norm else "none"
        return Attention(*heads, interleaved=True, window=s.chunk, chunked=True, qk_norm=norm)

    layers = feed_forwards(s, sparse)
    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers,
        head_dim=s.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        attentions=[attention(layer) for layer in range(s.num_layers)],
        rope_scaling=s.rope_scaling,
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss."""
    return NextToken(balance_weight=settings.balance_weight)


DEVIATIONS: tuple[str, ...] = (
    "Text alone: no images.",
    "Initialisation is ours (normal, std fan_in ** -0.5), and so is the balance loss: the training recipe is "
    "not published.",
)
