"""X-MoE's router, slowly: one token, one expert, one scalar product at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.moe import dot, number, softmax


@dataclass(frozen=True)
class CosineWeights:
    """projection [d_e, D], experts [E, d_e], temperature [1]."""

    projection: Tensor
    experts: Tensor
    temperature: Tensor


def direction(vector: Tensor) -> Tensor:
    """Return v / |v|; nothing for the zero vector."""
    square = dot(vector, vector)
    return vector / square.sqrt() if number(square) > 0 else torch.zeros_like(vector)


def cosines(x: Tensor, weights: CosineWeights) -> list[Tensor]:
    """Return the cosine of one token x [D] with each expert."""
    token = direction(torch.stack([dot(row, x) for row in weights.projection]))
    return [dot(token, direction(expert)) for expert in weights.experts]


def scores(x: Tensor, weights: CosineWeights, gate: str) -> list[Tensor]:
    """Return softmax(s / tau) or sigmoid(s / tau) of one token, tau held at 0.01 or more."""
    tau = weights.temperature[0]
    if number(tau) < 0.01:
        tau = torch.full_like(tau, 0.01)
    logits = [s / tau for s in cosines(x, weights)]
    return softmax(logits) if gate == "softmax" else [1 / (1 + (-logit).exp()) for logit in logits]


def fixed_shares(x: Tensor, weights: CosineWeights, gate: str) -> list[Tensor]:
    """Return softmax(s / tau0) of one token: tau0 is 0.3 for the softmax gate, 0.07 for the sigmoid one."""
    tau0 = {"softmax": 0.3, "sigmoid": 0.07}[gate]
    return softmax([s / tau0 for s in cosines(x, weights)])
