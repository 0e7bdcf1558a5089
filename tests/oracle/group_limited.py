"""Group-limited choice, biased choice and the bias's own learning, one token and one expert at a time."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor

from tests.oracle.moe import best, number, softmax


def scores_of(kind: str, logits: list[Tensor]) -> list[Tensor]:
    """Return the scores of one token's logits."""
    if kind == "softmax":
        return softmax(logits)
    if kind == "sigmoid":
        return [1 / (1 + (-v).exp()) for v in logits]
    if kind == "sqrt_softplus":
        return [(1 + v.exp()).log().sqrt() for v in logits]
    if kind == "identity":
        return list(logits)
    raise ValueError(kind)


def total(values: list[Tensor]) -> Tensor:
    """Return the sum of at least one value."""
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def choose(
    scores: list[Tensor],
    bias: list[float],
    num_selected: int,
    num_groups: int,
    groups_kept: int,
    group_score: str,
) -> list[int]:
    """Return one token's experts, best first: the best of biased scores within the best groups."""
    biased = [score.detach() + add for score, add in zip(scores, bias, strict=True)]
    size = len(scores) // num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    worth = []
    for group in members:
        falling = sorted((number(biased[e]) for e in group), reverse=True)
        worth.append(falling[0] if group_score == "max" else sum(falling[:2]))
    left, kept = list(range(num_groups)), []
    for _ in range(groups_kept):
        winner = max(left, key=lambda g: (worth[g], -g))
        kept.append(winner)
        left.remove(winner)
    allowed = [e for g in sorted(kept) for e in members[g]]
    ranks = best([biased[e] for e in allowed], num_selected)
    return [allowed[r] for r in ranks]


def weigh(scores: list[Tensor], chosen: list[int], form: str, scale: float) -> list[Tensor]:
    """Return the combine weights, from unbiased scores."""
    raw = [scores[e] for e in chosen]
    if form == "renormalised":
        raw = [value / total(raw) for value in raw]
    return [scale * value for value in raw]


def device_counts(chosen: list[list[int]], num_experts: int, num_groups: int) -> list[int]:
    """Return, per group, how many tokens send it at least one choice."""
    size = num_experts // num_groups
    return [sum(any(e // size == g for e in token) for token in chosen) for g in range(num_groups)]


def learn(bias: list[float], counts: list[int], rate: float, rule: str, normalised: bool) -> list[float]:
    """Return the bias after one step of u sign(mean - c_i), or of u (mean - c_i), or that over the mean."""
    mean = Fraction(sum(counts), len(counts))
    after = []
    for old, count in zip(bias, counts, strict=True):
        lack = mean - count
        if rule == "sign":
            step = math.copysign(1.0, lack) if lack else 0.0
        else:
            step = float(lack / mean if normalised and mean else lack)
        after.append(old + rate * step)
    return after
