"""BASE's assignment by trying all of them."""

from __future__ import annotations

from torch import Tensor

from tests.oracle.moe import number


def assignments(num_tokens: int, num_experts: int) -> list[list[int]]:
    """Return every way to give each of T tokens an expert with floor(T/E) to ceil(T/E) tokens each."""
    ways: list[list[int]] = [[]]
    for _ in range(num_tokens):
        ways = [[*way, e] for way in ways for e in range(num_experts)]
        ways = [way for way in ways if way.count(way[-1]) <= -(-num_tokens // num_experts)]
    least = num_tokens // num_experts
    return [way for way in ways if all(way.count(e) >= least for e in range(num_experts))]


def value(scores: list[list[Tensor]], way: list[int]) -> float:
    """Return the sum of the scores that an assignment takes."""
    return sum(number(row[e]) for row, e in zip(scores, way, strict=True))


def best_value(scores: list[list[Tensor]], num_experts: int) -> float:
    """Return the greatest sum of scores that equal loads allow."""
    return max(value(scores, way) for way in assignments(len(scores), num_experts))


def sigmoid(value: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-v))."""
    return 1 / (1 + (-value).exp())
