"""Sampled choices: in training the experts are drawn from the scores, without replacement."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.draws import call_key, fold, gumbel
from gatewright.parts.noise import CHOICE_NOISE
from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, WeightForm, check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import token_choice

_FORMS = ("raw", "renormalised")


class Sampled:
    """In training, K experts drawn from softmax(logits) one after the other without replacement; in
    evaluation the K best.

    Equation: Gumbel-max: the K highest of logits + g, g = -ln(-ln u), are such a draw: after expert i, j
    comes with p_j / (1 - p_i). The weights are the scores without noise, "raw" or "renormalised" over the
    drawn, so that no gradient passes through the draw; ranks are the order of the draw.
    Raises: UserError for other weights.
    Differs: fairseq draws in evaluation too, which makes it random; Switch (table 11) draws its one.
    """

    def __init__(self, num_selected: int, weights: str = "raw") -> None:
        if weights not in _FORMS:
            raise UserError(
                f"weights {weights!r}{did_you_mean(weights, _FORMS)}; allowed: {', '.join(_FORMS)}; "
                "drawn experts are weighted by their scores"
            )
        self.num_selected = num_selected
        self.weights: WeightForm = "raw" if weights == "raw" else "renormalised"

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        if not call.training:
            return token_choice(logits, scores, self.num_selected, self.weights, call.mask)
        key = fold(call_key(call, logits.device), CHOICE_NOISE)
        wide = torch.promote_types(logits.dtype, torch.float32)
        lots = gumbel(key, tuple(logits.shape), logits.device, wide).add_(logits.detach())
        drawn = token_choice(logits, lots, self.num_selected, "raw", call.mask)
        weights = scores.gather(-1, drawn.experts.clamp(min=0))
        if self.weights == "renormalised":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Assignment(drawn.experts, weights, drawn.num_experts)


def make_sampled(
    width: int,
    num_experts: int,
    num_selected: int,
    dtype: torch.dtype = torch.float32,
    *,
    weights: str = "raw",
) -> Router:
    """Return a softmax router with the rule `Sampled`. Raises: UserError for K outside 1..E, for K = 1 < E
    with "renormalised" (a constant gate), and for other weights.
    """
    rule = Sampled(num_selected, weights)
    check_selection(num_experts, num_selected, weights)
    return Router(width, num_experts, dtype, rule=rule)


register(
    RouterInfo(
        name="sampled",
        scores="softmax",
        selection="K experts drawn from the scores in training, the K best in evaluation",
        weights="raw scores, or renormalised over the drawn",
        capacity="none",
        losses=("balance",),
        causal=True,
        used_by="Switch Transformer table 11, fairseq",
        source="Gumbel-max; Switch Transformer appendix C",
        make=make_sampled,
    )
)
