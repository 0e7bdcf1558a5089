"""Qwen1.5-MoE and Qwen2's mixture of experts (Yang et al. 2024, arXiv 2407.10671), as released.

K of E narrow experts by their raw softmax probabilities, beside a shared one that each token weighs with a
sigmoid of its own. Queries, keys and values have biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Attention, Decoder, feed_forwards, initialise
from gatewright.errors import UserError
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer, WeightForm
from gatewright.parts.shared import GatedShared


@dataclass(frozen=True)
class Settings:
    """A small CPU default; the released sizes are in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 2
    """L, decoder layers"""
    num_heads: int = 2
    """H, query heads"""
    num_kv_heads: int = 2
    """Hkv, key and value heads; divides num_heads"""
    head_dim: int = 32
    """numbers per head"""
    num_experts: int | tuple[int, ...] = 60
    """E, routed experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 4
    """K, routed experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 32
    """F, hidden width of a routed expert; one value, or one per layer"""
    shared_width: int = 128
    """hidden width of the shared expert"""
    moe_layers: str = "all"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary positions"""
    rope_scaling: str = "none"
    """stretched positions: none, linear:factor=F, or dynamic, yarn, llama3 with their numbers"""
    weights: WeightForm = "raw"
    """of the chosen experts: raw probabilities, or renormalised"""
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """weight of the balance loss (1 when balanced, mean over layers)"""


PUBLISHED: dict[str, Settings] = {
    # The released configurations; 0.001 of a loss that sums to K when balanced is K times that of ours.
    "qwen1.5-moe-a2.7b": Settings(
        *(151936, 2048, 24, 16, 16, 128, 60, 4, 1408, 5632, "all", 5632, 8192, 1e6, "none", "raw"),
        *(False, 0.004),
    ),
    "qwen2-57b-a14b": Settings(
        *(151936, 3584, 28, 28, 4, 128, 64, 8, 2560, 20480, "all", 18944, 131072, 1e6, "none", "raw"),
        *(False, 0.008),
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s = settings
    if s.shared_width < 1:
        raise UserError(f"shared_width {s.shared_width}; allowed: 1 or more")

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, weights=s.weights, shared=GatedShared(s.width, s.shared_width))

    layers = feed_forwards(s, sparse)
    heads = (s.width, s.num_heads, s.num_kv_heads, s.head_dim)
    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        norm_eps=1e-6,
        tie_embeddings=s.tie_embeddings,
        attentions=[Attention(*heads, bias=True) for _ in layers],
        rope_scaling=s.rope_scaling,
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss."""
    return NextToken(balance_weight=settings.balance_weight)


DEVIATIONS: tuple[str, ...] = (
    "No sliding window in some layers, which the configuration can ask for and no released one does.",
    "Initialisation is ours (normal, std fan_in ** -0.5).",
)
