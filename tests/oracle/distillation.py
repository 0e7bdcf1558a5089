"""The distillation loss, one token and one word at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def probabilities(logits: Sequence[float]) -> list[float]:
    """Return the softmax of one token's logits."""
    highest = max(logits)
    powers = [math.exp(value - highest) for value in logits]
    return [power / sum(powers) for power in powers]


def mixed_loss(
    logits: Sequence[Sequence[float]],
    taught: Sequence[Sequence[float]],
    targets: Sequence[int],
    teacher_weight: float,
) -> float:
    """Return the mean over tokens of -sum_v t_v log q_v, where t is `teacher_weight` of the teacher's
    probabilities and the rest of the right answer.
    """
    total = 0.0
    for own, his, target in zip(logits, taught, targets, strict=True):
        q, p = probabilities(own), probabilities(his)
        for word in range(len(own)):
            right = 1.0 if word == target else 0.0
            total -= (teacher_weight * p[word] + (1 - teacher_weight) * right) * math.log(q[word])
    return total / len(targets)
