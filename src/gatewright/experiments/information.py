"""How much two divisions of the same cases say of each other, from a table of (soft) counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(counts: Tensor) -> float:
    """Return the entropy of counts [N] as shares, in nats.

    Equation: H = -sum p log p, 0 log 0 = 0.
    """
    p = counts.double() / counts.double().sum()
    return float(torch.special.entr(p).sum())


def effective(counts: Tensor) -> float:
    """Return how many equally used experts would be as uneven as these counts [E]: exp(H), 1 to E."""
    return math.exp(entropy(counts))


def information(counts: Tensor) -> float:
    """Return the mutual information of rows and columns of counts [N, M], in nats.

    Equation: I = H(rows) + H(columns) - H(cells).
    """
    return entropy(counts.sum(1)) + entropy(counts.sum(0)) - entropy(counts.flatten())


def known(counts: Tensor) -> float:
    """Return which share of the rows' entropy the columns tell: I / H(rows), 0 to 1; 0 if there is none."""
    rows = entropy(counts.sum(1))
    return information(counts) / rows if rows > 1e-9 else 0.0


def shared(counts: Tensor) -> float:
    """Return the information as a share of the smaller entropy, 0 (independent) to 1."""
    smaller = min(entropy(counts.sum(1)), entropy(counts.sum(0)))
    return information(counts) / smaller if smaller > 1e-9 else 0.0
