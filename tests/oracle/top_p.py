"""Top-p, slowly: one token, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.moe import best, number, softmax


def top_p(logits: list[Tensor], p: float, at_most: int) -> tuple[list[int], list[Tensor]]:
    """Return the experts of one token and their raw weights: the best ones, until their scores reach p."""
    scores = softmax(logits)
    taken: list[int] = []
    reached = 0.0
    for e in best(scores, at_most):
        if reached >= p:
            break
        taken.append(e)
        reached = reached + number(scores[e])
    return taken, [scores[e] for e in taken]


def entropy(logits: list[Tensor]) -> Tensor:
    """Return -sum_e P_e ln P_e of one token."""
    total = torch.zeros((), dtype=torch.float64)
    for score in softmax(logits):
        total = total - score * score.log()
    return total
