"""Experts that choose tokens, one group, one expert and one token at a time."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor

from tests.oracle.moe import number


def groups(real: list[bool], group_size: int | None) -> list[list[int]]:
    """Return the real tokens of each routing group."""
    size = max(group_size or len(real), 1)
    return [
        [t for t in range(start, min(start + size, len(real))) if real[t]]
        for start in range(0, len(real), size)
    ]


def places(share: float, num_experts: int, num_tokens: int) -> int:
    """Return min(n, ceil(share n / E)), with the share read as it was written."""
    return min(num_tokens, math.ceil(Fraction(repr(share)) * num_tokens / num_experts))


def best_tokens(column: dict[int, float], count: int) -> list[int]:
    """Return the `count` tokens of the highest value, the first token among equals."""
    left, taken = sorted(column), []
    for _ in range(count):
        winner = left[0]
        for t in left[1:]:
            if column[t] > column[winner]:
                winner = t
        taken.append(winner)
        left.remove(winner)
    return taken


def chosen_by_experts(
    scores: list[list[Tensor]], real: list[bool], share: float, group_size: int | None
) -> list[list[int]]:
    """Return, for each token, the experts that take it, in ascending id."""
    num_experts = len(scores[0]) if scores else 0
    taken: list[list[int]] = [[] for _ in scores]
    for group in groups(real, group_size):
        for e in range(num_experts):
            column = {t: number(scores[t][e]) for t in group}
            for t in best_tokens(column, places(share, num_experts, len(group))):
                taken[t].append(e)
    return taken


def route(
    scores: list[list[Tensor]], real: list[bool], share: float, group_size: int | None
) -> list[tuple[list[int], list[Tensor]]]:
    """Return each token's experts by falling score, and those scores."""
    routed = []
    for row, taken in zip(scores, chosen_by_experts(scores, real, share, group_size), strict=True):
        ranked = sorted(taken, key=lambda e: (-number(row[e]), e))
        routed.append((ranked, [row[e] for e in ranked]))
    return routed
