"""Token choice: each token takes its K best experts. Most models since 2017 are this rule with their own
scores and weights.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import TopK
from gatewright.parts.router import Router
from gatewright.parts.routing import (
    Assignment,
    RoutingCall,
    WeightForm,
    WeightSide,
    check_selection,
    select_top,
)
from gatewright.parts.rules.registry import RouterInfo, register


def token_choice(
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    num_selected: int,
    weights: WeightForm = "raw",
    mask: Bool[Tensor, "T"] | None = None,
    scale: float = 1.0,
) -> Assignment:
    """Return the assignment in which each token takes its K best experts.

    Args: `logits`, `scores` [T, E]; `mask` [T] bool, False = padding, whose places stay empty.
    `scale` multiplies the weights (DeepSeek-V2 and V3: routed scaling factor).
    Weights: "raw" keeps the scores of the chosen (Switch eq 2; OLMoE eq 1); "renormalised" divides them by
    their sum; "softmax_selected" is softmax over the chosen logits (Mixtral: Softmax(TopK(x W_g))), the same
    numbers when scores are a softmax.
    Raises: UserError for K outside 1..E, and for K = 1 < E with a normalised form (a constant gate).
    """
    check_selection(scores.shape[-1], num_selected, weights)
    experts = select_top(scores, num_selected)
    if weights == "softmax_selected":
        chosen = torch.softmax(logits.gather(-1, experts), dim=-1)
    else:
        chosen = scores.gather(-1, experts)
        if weights == "renormalised":
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    if scale != 1.0:
        chosen = chosen * scale
    if mask is not None:
        experts = torch.where(mask.unsqueeze(-1), experts, -1)
    return Assignment(experts=experts, weights=chosen, num_experts=scores.shape[-1])


class TokenChoice:
    """The rule of `token_choice` as an object: K, weight form and scale.

    Equation: Switch eq 2 ("raw"), Mixtral section 2.1 ("softmax_selected"), DeepSeek-V3 eq 13 and 16
    ("renormalised" sigmoid scores times `scale` 2.5), Llama-4 (`weight_side` "input").
    """

    def __init__(
        self,
        num_selected: int,
        weights: WeightForm = "renormalised",
        scale: float = 1.0,
        weight_side: WeightSide = "output",
    ) -> None:
        if not scale > 0:
            raise UserError(f"scale {scale}; allowed: above 0; 1 leaves the weights as they are")
        self.num_selected, self.weights = num_selected, weights
        self.scale, self.weight_side = scale, weight_side

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        chosen = token_choice(logits, scores, self.num_selected, self.weights, call.mask, self.scale)
        return Assignment(chosen.experts, chosen.weights, chosen.num_experts, self.weight_side)

    def as_top_k(self) -> TopK | None:
        """Return what this rule does as plain data; None for a class that decides otherwise."""
        if type(self).__call__ is not TokenChoice.__call__ or self.weight_side != "output":
            return None
        return TopK(self.num_selected, self.weights, self.scale)


def _make(**fixed: Any) -> Any:
    """Return `make` for a Router of token choice; `fixed` are the rule's and the router's settings."""
    scores, bias = fixed.pop("scores", "softmax"), fixed.pop("bias", False)

    def make(
        width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Router:
        settings = {**fixed, **options}
        check_selection(num_experts, num_selected, settings.get("weights", "renormalised"))
        rule = TokenChoice(num_selected, **settings)
        return Router(width, num_experts, dtype, rule=rule, scores=scores, bias=bias)

    return make


register(
    RouterInfo(
        name="token_choice",
        scores="softmax",
        selection="each token its K best experts",
        weights="renormalised over the chosen",
        capacity="none",
        losses=("balance",),
        causal=True,
        used_by="Mixtral, Qwen3",
        source="Mixtral section 2.1",
        make=_make(weights="renormalised"),
    )
)
register(
    RouterInfo(
        name="token_choice_raw",
        scores="softmax",
        selection="each token its K best experts",
        weights="raw scores",
        capacity="none",
        losses=("balance", "z"),
        causal=True,
        used_by="OLMoE, DeepSeekMoE, DeepSeek-V2 (scaled)",
        source="OLMoE eq 1",
        make=_make(weights="raw"),
    )
)
