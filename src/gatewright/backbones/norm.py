"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.kernels import add_norm, rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis and scale: x [..., D] -> [..., D].

    Equation: y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), in at least fp32.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Return the normalised x in x's dtype."""
        return rms_norm(x, self.weight, self.eps)

    def after_adding(
        self, x: Float[Tensor, "*batch D"], y: Float[Tensor, "*batch D"]
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Return x + y and the normalised sum."""
        return add_norm(x, y, self.weight, self.eps)
