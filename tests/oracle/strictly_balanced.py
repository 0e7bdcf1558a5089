"""Strictly balanced gating (2017, appendix F), one token and one expert at a time."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.expert_choice import chosen_by_experts
from tests.oracle.moe import number


def route(
    scores: list[list[Tensor]],
    real: list[bool],
    thresholds: list[Tensor],
    num_selected: int,
    group_size: int | None,
    training: bool,
) -> tuple[list[tuple[list[int], list[Tensor]]], Tensor]:
    """Return each token's experts by falling weight with those weights, and equation 20's sum."""
    by_batch = chosen_by_experts(scores, real, num_selected, group_size)
    total = sum((value.sum() * 0 for value in thresholds), thresholds[0] * 0)
    routed = []
    for t, row in enumerate(scores):
        above = [e for e in range(len(row)) if real[t] and number(row[e]) > number(thresholds[e])]
        for e in range(len(row)):
            total = total + ((e in above) - (e in by_batch[t])) * (row[e] - thresholds[e])
        taken = by_batch[t] if training else above
        ranked = sorted(taken, key=lambda e: (-number(row[e]), e))
        whole = sum((row[e] for e in ranked), row[0] * 0)
        routed.append((ranked, [row[e] / whole for e in ranked]))
    return routed, total
