"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437).

DeepSeek-V2's attention and experts, balanced almost without a loss: a bias per expert, moved after each step
against its load, decides who is chosen and never how much a choice weighs. Scores are sigmoids, a token's
experts lie in few groups, and further blocks predict tokens behind the next.

Equations: 1-11, latent attention; 12-16, g_i = s_i / sum of the chosen s, chosen by s_i + b_i, s = sigmoid(u
. e_i); section 2.1.2, b_i -+ gamma, and groups by their two best; 17-20, alpha sum_i f_i P_i per sequence;
21-25, multi-token prediction, (lambda / D) sum over depths of its cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gatewright.backbones import feed_forwards, initialise, latent_decoder, moe_pattern
from gatewright.objectives import NextToken, check_weights
from gatewright.parts import MoELayer
from gatewright.parts.rules import build_router


@dataclass(frozen=True)
class Settings:
    """A small CPU default that predicts one token further; the published size is in PUBLISHED."""

    vocab_size: int = 257
    """V, ids of the tokenizer"""
    width: int = 64
    """D, width of the residual stream"""
    num_layers: int = 3
    """L, decoder layers"""
    num_heads: int = 2
    """H, attention heads"""
    latent: tuple[int, int, int, int, int] = (32, 32, 32, 16, 32)
    """ranks of queries (0: none), of keys and values; per head: numbers without position, with, of values"""
    num_experts: int | tuple[int, ...] = 64
    """E, routed experts per sparse layer; one value, or one per layer"""
    num_selected: int | tuple[int, ...] = 6
    """K, routed experts per token; one value, or one per layer"""
    expert_width: int | tuple[int, ...] = 32
    """F, hidden width of an expert; one value, or one per layer"""
    num_shared_experts: int = 1
    """experts that every token passes; 0 is none"""
    moe_layers: str = "first_dense:1"
    """which layers are sparse: all, none, every:N, first_dense:N, last:N"""
    ffn_width: int | tuple[int, ...] = 256
    """hidden width of the dense layers; one value, or one per layer"""
    groups: tuple[int, int] = (1, 1)
    """groups of experts (nodes), and M, how many of them a token's experts may lie in"""
    scale: float = 2.5
    """what the routed experts' output is multiplied with"""
    context: int = 256
    """longest sequence, in tokens"""
    rope_theta: float = 10_000.0
    """base of the rotary positions"""
    rope_scaling: str = "none"
    """stretched positions: none, linear:factor=F, or dynamic, yarn, llama3 with their numbers"""
    bias_rate: float = 0.001
    """gamma, how far a step moves each selection bias; 0 keeps them"""
    balance_weight: float = 0.0001
    """alpha, weight of each sparse layer's loss per sequence; the layers' losses are added"""
    future_tokens: int = 1
    """depths of multi-token prediction: further blocks, each for one token more; 0 is none"""
    future_weight: float = 0.3
    """lambda, weight of the mean cross-entropy of further tokens"""


PUBLISHED: dict[str, Settings] = {
    # Section 4.2; vocabulary, scale and YaRN's numbers from the configuration. 671B: no further block.
    "deepseek-v3": Settings(
        *(129280, 7168, 61, 128, (1536, 512, 128, 64, 128), 256, 8, 2048, 1, "first_dense:3", 18432, (8, 4)),
        *(2.5, 163840, 1e4, "yarn:factor=40,original=4096,mscale=1,mscale_all_dim=1", 0.001, 0.0001, 0),
    ),
}


def build(settings: Settings) -> nn.Module:
    """Return the decoder that these settings describe, freshly initialised."""
    s, (num_groups, kept) = settings, settings.groups
    check_weights(s, "bias_rate")

    def sparse(num_experts: int, num_selected: int, expert_width: int) -> MoELayer:
        options: dict[str, Any] = {
            "num_groups": num_groups,
            "groups_kept": kept,
            "scale": s.scale,
            "rate": s.bias_rate,
        }
        router = build_router("deepseek_v3", s.width, num_experts, num_selected, **options)
        sizes = (s.width, num_experts, num_selected, expert_width)
        return MoELayer(*sizes, router=router, num_shared_experts=s.num_shared_experts)

    model = latent_decoder(s, feed_forwards(s, sparse, last=s.future_tokens))
    return initialise.fan_in(model, embedding_std=s.width**-0.5)


def objective(settings: Settings) -> NextToken:
    """Return next-token prediction plus each sparse layer's loss per sequence (ours is their mean)."""
    s = settings
    check_weights(s, "balance_weight")
    pattern = moe_pattern(s.moe_layers, s.num_layers)
    num_sparse = sum(pattern) + s.future_tokens * pattern[-1]
    losses = {"sequence_balance": s.balance_weight * num_sparse} if s.balance_weight else {}
    return NextToken(losses=losses, future_weight=s.future_weight)


DEVIATIONS: tuple[str, ...] = (
    "The paper draws all weights with std 0.006, at its width; here fan-in (std fan_in ** -0.5), which small "
    "widths train with.",
    "gamma and lambda stay as set; the paper ends with gamma 0 and, from 10T tokens on, lambda 0.1.",
    "The loss per sequence counts the choices as made, by biased scores; equation 18 as printed counts those "
    "by scores alone.",
)
