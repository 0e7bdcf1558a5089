"""The gate of 2013: a router over a small hidden layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.parts.router import Router
from gatewright.parts.rules import build_router


class HiddenGate(nn.Module):
    """A dense router that sees a hidden layer of the input: x [T, D] -> logits [T, E]; the gate is their
    softmax, `restrain` in the first phase.

    Equation: g(x) = softmax(B relu(A x + a) + b) (Eigen et al. 2013).
    Raises: UserError for numbers below 1.
    """

    def __init__(self, width: int, hidden_width: int, num_experts: int) -> None:
        super().__init__()
        if min(width, hidden_width, num_experts) < 1:
            raise UserError(
                f"gate of width {width}, gate_width {hidden_width}, num_experts {num_experts}; allowed: 1 "
                "or more"
            )
        self.hidden = nn.Linear(width, hidden_width)
        dense = build_router("dense", hidden_width, num_experts, num_experts)
        self.router = Router(hidden_width, num_experts, rule=dense.rule, bias=True)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Return the logits of every expert for every case."""
        return self.router(torch.relu(self.hidden(x)))
