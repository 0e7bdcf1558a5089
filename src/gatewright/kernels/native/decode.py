"""Half a decoder block for a few tokens as one operator: the same operators inside, called from C++."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels.native.route import TopK
from gatewright.kernels.plan import ExpertWeights


def decode_attention(
    x: Float[Tensor, "B S D"],
    norm: Float[Tensor, "D"],
    eps: float,
    maps: tuple[Tensor, Tensor, Tensor, Tensor],
    angles: tuple[Float[Tensor, "S head_dim"], Float[Tensor, "S head_dim"]],
    cache: tuple[Float[Tensor, "B Hkv capacity head_dim"], Float[Tensor, "B Hkv capacity head_dim"]],
    past: int,
) -> Float[Tensor, "B S D"]:
    """Return what causal attention adds to x, without gradient: normed, mapped, turned, stored behind the
    `past` positions of the cache, attended, mapped back. `maps` are those of query, key, value and output.
    """
    out: Tensor = torch.ops.gatewright.decode_attention(x, norm, eps, *maps, *angles, *cache, past)
    return out


def decode_experts(
    x: Float[Tensor, "B S D"],
    y: Float[Tensor, "B S D"],
    norm: Float[Tensor, "D"],
    eps: float,
    router: Float[Tensor, "E D"],
    scores: str,
    top: TopK,
    weights: ExpertWeights,
) -> Float[Tensor, "B S D"]:
    """Return x + y and what a dropless sparse layer adds to their norm, without gradient."""
    w = weights
    out: Tensor = torch.ops.gatewright.decode_experts(
        *(x, y, norm, eps, router, top.bias, top.num_selected, scores, top.weights, top.scale),
        *(top.least_sum, w.w_in, w.w_down, w.scale_in, w.scale_down, w.b_in, w.b_down),
        w.activation,
    )
    return out


def register() -> None:
    """Return nothing: tell torch the shapes of both operators."""
    for name in ("decode_attention", "decode_experts"):
        torch.library.register_fake(f"gatewright::{name}", _like_first)


def _like_first(x: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
