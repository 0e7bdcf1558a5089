"""Qwen3's mixtures of experts (Yang et al. 2025, arXiv 2505.09388), as released.

Mixtral's rule with many narrow experts: K of E by a softmax, renormalised over the chosen. Queries and keys
are normalised head by head; no shared expert. Trained with a balance loss over the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Decoder, feed_forwards, initialise
from gatewright.objectives import NextToken
from gatewright.parts import MoELayer, WeightForm


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
    num_experts: int | tuple[int, ...] = 64
    """E, experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 8
    """K, experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 32
    """F, hidden width of an expert; one value, or one per layer"""
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
    weights: WeightForm = "renormalised"
    """of the chosen experts: renormalised, or raw probabilities"""
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """weight of the balance loss (1 when balanced, mean over layers)"""


PUBLISHED: dict[str, Settings] = {
    # The released configurations; 0.001 of a loss that sums to K = 8 when balanced is 0.008 of ours.
    "qwen3-30b-a3b": Settings(
        *(151936, 2048, 48, 32, 4, 128, 128, 8, 768, "all", 6144, 40960, 1e6, "none", "renormalised"),
        *(False, 0.008),
    ),
    "qwen3-235b-a22b": Settings(
        *(151936, 4096, 94, 64, 4, 128, 128, 8, 1536, "all", 12288, 40960, 1e6, "none", "renormalised"),
        *(False, 0.008),
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s = settings

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        return MoELayer(s.width, num_experts, num_selected, expert_width, weights=s.weights)

    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        feed_forwards(s, sparse),
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        norm_eps=1e-6,
        qk_norm="head",
        tie_embeddings=s.tie_embeddings,
        rope_scaling=s.rope_scaling,
    )
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss."""
    return NextToken(balance_weight=settings.balance_weight)


DEVIATIONS: tuple[str, ...] = (
    "The balance loss is taken over the micro-batch unless a run asks for `--balance-scope global_batch`, "
    "Qwen3's own.",
    "Initialisation is ours (normal, std fan_in ** -0.5).",
)
