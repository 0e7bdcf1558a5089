"""OLMoE: Open Mixture-of-Experts Language Models (Muennighoff et al. 2024, arXiv 2409.02060, ICLR 2025).

A decoder whose every layer holds many narrow SwiGLU experts; each token takes its K best, weighed by their
raw softmax probabilities, which are not made to sum to 1. Dropless. A balance loss and a router z-loss are
added; queries and keys are normalised over their whole width; weights come from a truncated normal.

Equations: 1, y = sum over the top K of softmax(r(x))_i E_i(x); 2, L = L_CE + alpha L_LB + beta L_RZ;
3, L_LB = E sum_i f_i P_i; 4, L_RZ = mean over tokens of logsumexp(r(x))^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gatewright.backbones import Decoder, initialise, moe_pattern, per_layer
from gatewright.objectives import NextToken
from gatewright.parts import MLP, MoELayer


@dataclass(frozen=True)
class Settings:
    """A small CPU default with the paper's 64 experts of which 8 are active; its own size is in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 2
    """L, decoder layers"""
    num_heads: int = 2
    """H, attention heads"""
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
    tie_embeddings: bool = False
    """use the embedding as output matrix"""
    balance_weight: float = 0.01
    """alpha, weight of the balance loss (1 when balanced, mean over layers)"""
    z_weight: float = 0.001
    """beta, weight of the router z-loss (mean over layers)"""


PUBLISHED: dict[str, Settings] = {
    # Table 10; section 4's dense twin has a feed-forward width of 8192.
    "olmoe-1b-7b": Settings(50304, 2048, 16, 16, 128, 64, 8, 1024, "all", 8192, 4096),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s, n = settings, settings.num_layers
    experts = per_layer("num_experts", s.num_experts, n)
    selected = per_layer("num_selected", s.num_selected, n)
    expert_width = per_layer("expert_width", s.expert_width, n)
    ffn_width = per_layer("ffn_width", s.ffn_width, n)
    layers: list[nn.Module] = [
        MoELayer(s.width, experts[i], selected[i], expert_width[i], weights="raw")
        if sparse
        else MLP(s.width, ffn_width[i])
        for i, sparse in enumerate(moe_pattern(s.moe_layers, n))
    ]
    model = Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers,
        head_dim=s.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        qk_norm="width",
        tie_embeddings=s.tie_embeddings,
    )
    return initialise.normal(model, std=0.02, cut=3.0)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus the weighted balance loss and z-loss (equation 2)."""
    return NextToken(balance_weight=settings.balance_weight, z_weight=settings.z_weight)


DEVIATIONS: tuple[str, ...] = (
    "The z-loss is averaged over layers; the paper's equation 4 is one layer's and leaves their sum open.",
    "The paper decays every parameter, embeddings and norms included; here the run's settings decide.",
)
