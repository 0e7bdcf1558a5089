"""Experts of one linear map and a squashing function each: those of the mixtures of 1991 and 2013."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.errors import UserError, did_you_mean

SQUASHES = ("logistic", "softmax", "linear", "relu")
"""Of an expert's outputs: each by itself into 0..1, together into a distribution, as they are, cut at 0."""


def squash(name: str, h: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
    """Return the outputs of C sums: "logistic", "softmax" (over the last axis), "linear" or
    "relu".
    """
    if name in ("linear", "relu"):
        return torch.relu(h) if name == "relu" else h
    return torch.sigmoid(h) if name == "logistic" else torch.softmax(h, dim=-1)


def check_squash(name: str) -> str:
    """Return `name` if it is a known squashing function; raise UserError otherwise."""
    if name not in SQUASHES:
        raise UserError(
            f"squash {name!r} is unknown{did_you_mean(name, SQUASHES)}; allowed: {', '.join(SQUASHES)}"
        )
    return name


class LinearExperts(nn.Module):
    """E experts, [T, D] -> [T, E, C], all of them computed: `weight` [E, C, D] and `bias` [E, C].

    Equation: o_e = squash(W_e x + b_e). With C = 1 and "logistic" an expert draws one line: where o = 1/2.
    Raises: UserError for an unknown squash and for numbers below 1.
    """

    def __init__(self, width: int, num_experts: int, num_outputs: int = 1, squash: str = "logistic") -> None:
        super().__init__()
        if min(width, num_experts, num_outputs) < 1:
            raise UserError(
                f"width {width}, num_experts {num_experts}, num_outputs {num_outputs}; allowed: 1 or more"
            )
        self.squash = check_squash(squash)
        self.weight = nn.Parameter(torch.empty(num_experts, num_outputs, width))
        self.bias = nn.Parameter(torch.empty(num_experts, num_outputs))
        self.reset_parameters()

    def reset_parameters(self, bound: float = 0.1) -> None:
        """Draw weights and biases evenly from -bound to bound."""
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E C"]:
        """Return every expert's outputs for every case."""
        return squash(self.squash, torch.einsum("td,ecd->tec", x, self.weight) + self.bias)
