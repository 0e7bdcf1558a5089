"""Dense feed-forward layers of any number of hidden layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import activate
from gatewright.parts import MLP
from gatewright.parts.experts import fan_in_normal


class DeepMLP(MLP):
    """A feed-forward layer of `depth` ReLU layers of one width, [..., D] -> [..., D]; `w_in` [F, D],
    `w_middle` [depth - 1, F, F], `w_down` [D, F]. With depth 1 it is an MLP.
    """

    def __init__(self, width: int, ffn_width: int, depth: int) -> None:
        if depth < 1:
            raise UserError(f"ffn_depth {depth}; allowed: 1 or more hidden layers")
        super().__init__(width, ffn_width, "relu")
        self.w_middle = nn.Parameter(torch.empty(depth - 1, ffn_width, ffn_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights as an MLP's are drawn."""
        super().reset_parameters()
        if hasattr(self, "w_middle"):  # the base class calls this before there is one
            fan_in_normal(self.w_middle)

    def forward(
        self, x: Float[Tensor, "*batch D"], *, key: Int64[Tensor, ""] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Return the layer's output, shape of x; nothing here is drawn by a `key`."""
        hidden = activate("relu", F.linear(x, self.w_in))
        for weight in self.w_middle:
            hidden = activate("relu", F.linear(hidden, weight))
        return F.linear(hidden, self.w_down)


def dense_layer(width: int, ffn_width: int, depth: int = 1) -> MLP | None:
    """Return a ReLU layer of `depth` hidden layers; None for an `ffn_width` of 0."""
    if ffn_width == 0:
        return None
    return MLP(width, ffn_width, "relu") if depth == 1 else DeepMLP(width, ffn_width, depth)
