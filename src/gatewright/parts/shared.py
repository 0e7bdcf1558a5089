"""Shared experts that a gate weighs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.parts.experts import MLP, fan_in_normal


class GatedShared(nn.Module):
    """Shared experts that each token weighs with one sigmoid: `mlp`, and the gate's weight [1, D].

    Equation: y = sigmoid(w x) FFN(x) (Qwen2-MoE, Qwen1.5-MoE); plain shared experts (DeepSeekMoE) have the
    weight 1. Args: as `MLP`; `ffn_width` is n times the expert width for n shared experts.
    """

    def __init__(
        self,
        width: int,
        ffn_width: int,
        activation: str = "swiglu",
        *,
        bias: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.mlp = MLP(width, ffn_width, activation, bias=bias, init_scale=init_scale)
        self.gate = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the MLP's weights as it does, and the gate's from a normal of std width ** -0.5."""
        self.mlp.reset_parameters()
        fan_in_normal(self.gate)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return sigmoid(w x) FFN(x), shape and dtype of x."""
        return torch.sigmoid(F.linear(x, self.gate)) * self.mlp(x)
