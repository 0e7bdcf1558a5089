"""gpt-oss (OpenAI 2025, arXiv 2508.10925), as released.

K of E experts by their logits, a learned bias included, weighed by a softmax over the chosen. Experts have
biases and a cut SwiGLU. Every other layer sees a window of the past, and each head has a sink: a learned
score that takes a share of its attention and gives nothing. Positions are stretched by YaRN.
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
    num_layers: int = 2
    """L, decoder layers"""
    num_heads: int = 4
    """H, query heads"""
    num_kv_heads: int = 2
    """Hkv, key and value heads; divides num_heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 32
    """E, experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 4
    """K, experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 64
    """F, hidden width of an expert; one value, or one per layer"""
    moe_layers: str = "all"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    window: int = 64
    """keys that a token of layers 0, 2, 4, ... sees; the others see all"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 150_000.0
    """base of the rotary positions"""
    rope_scaling: str = "none"
    """stretched positions: none, linear:factor=F, or dynamic, yarn, llama3 with their numbers"""
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """weight of the balance loss (1 when balanced, mean over layers)"""


_YARN = "yarn:factor=32,original=4096,truncate=0"
PUBLISHED: dict[str, Settings] = {
    # The released configurations; 0.001 of a loss that sums to K = 4 when balanced is 0.004 of ours.
    "gpt-oss-20b": Settings(
        *(201088, 2880, 24, 64, 8, 64, 32, 4, 2880, "all", 2880, 128, 131072, 150_000.0, _YARN, False, 0.004)
    ),
    "gpt-oss-120b": Settings(
        *(201088, 2880, 36, 64, 8, 64, 128, 4, 2880, "all", 2880, 128, 131072, 150_000.0, _YARN, False, 0.004)
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s = settings

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, router="gpt_oss", activation="clamped_swiglu", expert_bias=True)

    layers = feed_forwards(s, sparse)
    if s.window < 1:
        raise UserError(f"window {s.window}; allowed: 1 or more")
    heads = (s.width, s.num_heads, s.num_kv_heads, s.head_dim)
    windows = [s.window if i % 2 == 0 else None for i in range(s.num_layers)]
    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        tie_embeddings=s.tie_embeddings,
        attentions=[
            Attention(*heads, bias=True, output_bias=True, window=window, sinks=True) for window in windows
        ],
        rope_scaling=s.rope_scaling,
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss."""
    return NextToken(balance_weight=settings.balance_weight)


DEVIATIONS: tuple[str, ...] = (
    "Dense layers, which the released models do not have, are SwiGLU without biases.",
    "Initialisation is ours (normal, std fan_in ** -0.5; biases and sinks 0); the training recipe is not "
    "published.",
)
