"""Llama-4: the best experts by raw logit, each given its input times sigmoid(logit)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.parts.router import Router
from gatewright.parts.routing import Assignment, RoutingCall, check_selection, select_top
from gatewright.parts.rules.registry import RouterInfo, register


class SigmoidInput:
    """Each token takes its K best logits; what an expert is given is weighed, not what it returns.

    Equation: y = sum over the chosen e of FFN_e(sigmoid(l_e) x), l = W_r x (released model code of Llama-4,
    where K = 1 and one shared expert stands beside, with weight 1). A weight on the input passes through the
    expert's activation, so it is not the same as one on the output. The weights of a token need not sum to 1,
    so that K = 1 trains the router too.
    Differs: the released code computes all experts for all tokens, with input 0 where not chosen; the same
    for experts without biases, since FFN(0) = 0.
    """

    def __init__(self, num_selected: int = 1) -> None:
        self.num_selected = num_selected

    def __call__(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], call: RoutingCall
    ) -> Assignment:
        """Return who goes where."""
        num_experts = logits.shape[-1]
        check_selection(num_experts, self.num_selected, "raw")
        # By logit: sigmoid is 1 for every large logit in fp32, and would tie them.
        experts = select_top(logits, self.num_selected)
        weights = torch.sigmoid(logits.gather(-1, experts))
        if call.mask is not None:
            experts = torch.where(call.mask.unsqueeze(-1), experts, -1)
        return Assignment(experts, weights, num_experts, weight_side="input")


def _make(
    width: int, num_experts: int, num_selected: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    check_selection(num_experts, num_selected, "raw")
    return Router(width, num_experts, dtype, rule=SigmoidInput(num_selected, **options), scores="sigmoid")


register(
    RouterInfo(
        name="llama4",
        scores="sigmoid",
        selection="each token its K best experts by logit (K = 1)",
        weights="raw sigmoid, on the expert's input",
        capacity="none",
        losses=(),
        causal=True,
        used_by="Llama-4 Scout and Maverick",
        source="released model code of Llama-4",
        make=_make,
    )
)
