"""Models from a paper's settings: what the files of several papers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gatewright.backbones.latent import LatentAttention, LatentSizes
from gatewright.backbones.pattern import moe_pattern, per_layer
from gatewright.backbones.scaling import RopeScaling
from gatewright.backbones.transformer import Block, Decoder
from gatewright.errors import UserError
from gatewright.parts import MLP, Router, build_router


def feed_forwards(
    settings: Any, make: Callable[[int, int, int], nn.Module], last: int = 0
) -> list[nn.Module]:
    """Return one feed-forward module per layer by a paper's settings: `make(num_experts, num_selected,
    expert_width)` where `moe_layers` says sparse, else a plain SwiGLU of `ffn_width`; and behind them `last`
    further ones like the last layer's.
    """
    s, n = settings, settings.num_layers
    if last < 0:
        raise UserError(f"future_tokens {last}; allowed: 0 or more")
    experts = per_layer("num_experts", s.num_experts, n)
    selected = per_layer("num_selected", s.num_selected, n)
    expert_width = per_layer("expert_width", s.expert_width, n)
    ffn_width = per_layer("ffn_width", s.ffn_width, n)
    pattern = moe_pattern(s.moe_layers, n)
    return [
        make(experts[i], selected[i], expert_width[i]) if pattern[i] else MLP(s.width, ffn_width[i])
        for i in (*range(n), *(n - 1,) * last)
    ]


def latent_decoder(settings: Any, layers: Sequence[nn.Module], norm_eps: float = 1e-6) -> Decoder:
    """Return a decoder with latent attention by a paper's settings (vocab_size, width, num_layers, num_heads,
    latent, context, rope_theta, rope_scaling); feed-forward modules beyond num_layers make blocks that
    predict further tokens.
    """
    s, sizes, scaling = settings, LatentSizes(*settings.latent), RopeScaling.parse(settings.rope_scaling)
    attentions = [
        LatentAttention(s.width, s.num_heads, sizes, norm_eps=norm_eps, score_factor=scaling.score_factor)
        for _ in layers
    ]
    pairs = list(zip(attentions, layers, strict=True))
    return Decoder(
        s.vocab_size,
        s.width,
        s.num_heads,
        layers[: s.num_layers],
        head_dim=sizes.head_dim,
        context=s.context,
        rope_theta=s.rope_theta,
        norm_eps=norm_eps,
        attentions=attentions[: s.num_layers],
        rotary_dim=sizes.rotary_dim,
        rope_scaling=scaling,
        future=[Block(s.width, *pair, norm_eps) for pair in pairs[s.num_layers :]],
    )


def gated_router(gate: str, width: int, num_experts: int, num_selected: int) -> Router:
    """Return a router of 2017 by its setting: "flat" (noisy top-K), "groups:A" (hierarchical, A groups) or
    "balanced" (batchwise, thresholds learned).
    """
    name, _, groups = gate.partition(":")
    if name == "groups" and groups.isdecimal():
        return build_router("hierarchical", width, num_experts, num_selected, num_groups=int(groups))
    if gate not in ("flat", "balanced"):
        raise UserError(f"gate {gate!r} is unknown; allowed: flat, groups:A (A groups), balanced")
    rule = "noisy_top_k" if gate == "flat" else "batchwise"
    return build_router(rule, width, num_experts, num_selected)
