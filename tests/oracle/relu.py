"""ReLU routing, its penalty and its lambda, one token and one expert at a time."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from tests.oracle.moe import number


def route(logits: list[list[Tensor]], mask: list[bool]) -> list[list[tuple[int, Tensor]]]:
    """Return each token's (expert, weight) pairs by falling weight, the lowest id first among equals."""
    chosen = []
    for row, real in zip(logits, mask, strict=True):
        pairs = [(e, value) for e, value in enumerate(row) if real and number(value) > 0]
        chosen.append(sorted(pairs, key=lambda pair: (-number(pair[1]), pair[0])))
    return chosen


def counts(chosen: list[list[tuple[int, Tensor]]], num_experts: int) -> list[int]:
    """Return how many tokens use each expert."""
    return [sum(e == pair[0] for token in chosen for pair in token) for e in range(num_experts)]


def penalty(
    chosen: list[list[tuple[int, Tensor]]], num_experts: int, num_selected: int, tokens: int, factor: float
) -> Tensor | float:
    """Return factor * sum over tokens and experts of f_e R(x_t)_e, f_e = E / (k T) * tokens of e."""
    loads = counts(chosen, num_experts)
    result: Tensor | float = 0.0
    for token in chosen:
        for e, value in token:
            result = result + num_experts / (num_selected * tokens) * loads[e] * value
    return factor * result


def learn(factor: float, loads: list[int], num_selected: int, tokens: int, alpha: float) -> float:
    """Return lambda after one step: times alpha while the share of zeros is below 1 - k/E, over it above."""
    if not tokens:
        return factor
    share = 1 - Fraction(sum(loads), tokens * len(loads))
    target = 1 - Fraction(num_selected, len(loads))
    return factor * alpha ** ((target > share) - (target < share))
