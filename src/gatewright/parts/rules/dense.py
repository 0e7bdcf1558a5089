"""Dense mixture: every token uses every expert, weighed by the whole softmax. The gate of 1991 and 2013."""

from __future__ import annotations

from typing import Any

import torch

from gatewright.errors import UserError
from gatewright.parts.router import Router
from gatewright.parts.rules.registry import RouterInfo, register
from gatewright.parts.rules.token_choice import TokenChoice


class Dense(TokenChoice):
    """The rule that drops nobody: token choice with K = E and raw softmax weights, which sum to 1.

    Equation: y = sum_e p_e(x) FFN_e(x), p = softmax(W_r x) (Jacobs et al. 1991). Every expert gets a gradient
    from every token, so no balance loss is needed to keep experts alive.
    Differs: the gates of Eigen et al. 2013 see a hidden layer of the input (`parts/hidden_gate.py`).
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts, "raw")


def _make(
    width: int, num_experts: int, num_selected: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Router:
    if num_selected != num_experts:
        raise UserError(
            f"router 'dense' with num_selected {num_selected}; allowed: {num_experts}, all experts; "
            "for fewer experts per token, take 'token_choice_raw'"
        )
    return Router(width, num_experts, dtype, rule=Dense(num_experts, **options))


register(
    RouterInfo(
        name="dense",
        scores="softmax",
        selection="every expert (K = E)",
        weights="raw scores, which sum to 1",
        capacity="none",
        losses=(),
        causal=True,
        used_by="mixtures of local experts (1991), deep mixtures (2013)",
        source="Jacobs et al. 1991; Eigen et al. 2013",
        make=_make,
    )
)
