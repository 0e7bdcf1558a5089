"""Mixtral of Experts (Jiang et al. 2024, arXiv 2401.04088).

Every feed-forward layer of a decoder becomes E SwiGLU experts; a linear router sends each token to its K best
and weighs them by a softmax over the chosen logits, so the weights sum to 1. No capacity, nothing dropped, no
shared expert.

Equations: section 2.1, G(x) = Softmax(TopK(x W_g)); y = sum_i G(x)_i SwiGLU_i(x).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Decoder, initialise, moe_pattern, per_layer
from gatewright.objectives import NextToken
from gatewright.parts import MLP, MoELayer


@dataclass(frozen=True)
class Settings:
    """A small, fine-grained CPU default; the published sizes are in PUBLISHED."""

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
    num_experts: int | tuple[int, ...] = 64
    """E, experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 4
    """K, experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 64
    """F, hidden width of an expert; one value, or one per layer"""
    moe_layers: str = "all"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary positions"""
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """weight of the balance loss (1 when balanced, mean over layers)"""


PUBLISHED: dict[str, Settings] = {
    # Table 1; expert and vocabulary sizes of 8x22B from its public configuration.
    "mixtral-8x7b": Settings(32000, 4096, 32, 32, 8, 128, 8, 2, 14336, "all", 14336, 32768, 1e6, False, 0.04),
    "mixtral-8x22b": Settings(
        32000, 6144, 56, 48, 8, 128, 8, 2, 16384, "all", 16384, 65536, 1e6, False, 0.04
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s, n = settings, settings.num_layers
    experts = per_layer("num_experts", s.num_experts, n)
    selected = per_layer("num_selected", s.num_selected, n)
    expert_width = per_layer("expert_width", s.expert_width, n)
    ffn_width = per_layer("ffn_width", s.ffn_width, n)
    layers: list[nn.Module] = [
        MoELayer(s.width, experts[i], selected[i], expert_width[i], weights="softmax_selected")
        if sparse
        else MLP(s.width, ffn_width[i])
        for i, sparse in enumerate(moe_pattern(s.moe_layers, n))
    ]
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
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss."""
    return NextToken(balance_weight=settings.balance_weight)


DEVIATIONS: tuple[str, ...] = (
    "The paper states no training recipe: the balance loss is ours, with weight 0.01 in the default and, in "
    "the published sizes, 0.04: the public configuration's 0.02 in our convention (its f sums to K = 2).",
    "Initialisation is ours (normal, std fan_in ** -0.5): the paper names none.",
)
