"""gpt-oss: a router with a bias, the K best logits, and a softmax over those K."""

from __future__ import annotations

from typing import Any

import torch

from gatewright.parts.router import Router
from gatewright.parts.routing import check_selection
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


class LogitChoice(TokenChoice):
    """Each token takes its K best logits, weighed by a softmax over these K alone; the weights sum to 1.

    Equation: l = W_r x + b; w = softmax of the K largest l (released model code of gpt-oss, K = 4). The bias
    b is learned and takes part in both, the choice and the weights (unlike a selection bias). The same
    numbers as a softmax over all, renormalised over the chosen, where that softmax does not underflow.
    Args: to be used with the scores "identity", so that the choice is made on logits.
    """

    def __init__(self, num_selected: int = 4) -> None:
        super().__init__(num_selected, "softmax_selected")


def _make(
    width: int, num_experts: int, num_selected: int = 4, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    check_selection(num_experts, num_selected, "softmax_selected")
    rule = LogitChoice(num_selected, **options)
    return Router(width, num_experts, dtype, rule=rule, scores="identity", bias=True)


register(
    RouterInfo(
        name="gpt_oss",
        scores="logits, with a learned bias",
        selection="each token its K best experts (K = 4)",
        weights="softmax over the chosen logits",
        capacity="none",
        losses=("balance",),
        causal=True,
        used_by="gpt-oss-20b, gpt-oss-120b",
        source="released model code of gpt-oss",
        make=_make,
    )
)
