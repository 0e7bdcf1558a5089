"""Mixture-of-Depths, one token at a time."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.expert_choice import best_tokens, groups, places
from tests.oracle.moe import number


def route(
    logits: list[Tensor], real: list[bool], share: float, group_size: int | None, training: bool
) -> tuple[list[tuple[list[int], list[Tensor]]], Tensor | float]:
    """Return each token's choice ([0] or none) with its weight, and the summed cross-entropy."""
    top: set[int] = set()
    for group in groups(real, group_size):
        column = {t: number(logits[t]) for t in group}
        top |= set(best_tokens(column, places(share, 1, len(group))))
    total: Tensor | float = 0.0
    routed = []
    for t, logit in enumerate(logits):
        if real[t]:
            passing = 1 / (1 + (-logit).exp())
            total = total - (passing if t in top else 1 - passing).log()
        taken = t in top if training else real[t] and number(logit) > 0
        routed.append(([0], [logit]) if taken else ([], []))
    return routed, total
