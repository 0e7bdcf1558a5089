"""Sinkhorn's balanced plan in scalars, and the choice from it."""

from __future__ import annotations

import math

from torch import Tensor

from tests.oracle.expert_choice import groups
from tests.oracle.moe import best, number

EPSILON = 1e-8


def plan(logits: list[list[float]], tolerance: float, rounds: int) -> tuple[list[list[float]], int]:
    """Return P for one group of tokens, and the rounds that it took."""
    num_tokens, num_experts = len(logits), len(logits[0])
    costs = [[math.exp(value - max(row)) for value in row] for row in logits]
    columns, gone, change = [1.0] * num_experts, 0, math.inf
    while gone < rounds and change > tolerance:
        gone += 1
        rows = [
            1 / num_tokens / (sum(c * d for c, d in zip(cost, columns, strict=True)) + EPSILON)
            for cost in costs
        ]
        before = columns
        columns = [
            1 / num_experts / (sum(rows[t] * costs[t][e] for t in range(num_tokens)) + EPSILON)
            for e in range(num_experts)
        ]
        change = sum(abs(new - old) for new, old in zip(columns, before, strict=True)) / sum(columns)
    shares = [[rows[t] * costs[t][e] * columns[e] for e in range(num_experts)] for t in range(num_tokens)]
    return shares, gone


def route(
    logits: list[list[Tensor]],
    scores: list[list[Tensor]],
    real: list[bool],
    num_selected: int,
    group_size: int | None,
    training: bool,
    rounds: int,
) -> list[tuple[list[int], list[Tensor]]]:
    """Return each token's experts by falling share of the plan (of score in evaluation), and their scores."""
    ranked: list[list[Tensor]] = [list(row) for row in scores]
    for group in groups(real, group_size):
        if training and group:
            shares, _ = plan([[number(value) for value in logits[t]] for t in group], 1e-4, rounds)
            for t, row in zip(group, shares, strict=True):
                ranked[t] = [scores[t][e].new_tensor(value) for e, value in enumerate(row)]
    chosen = [best(row, num_selected) if here else [] for row, here in zip(ranked, real, strict=True)]
    return [(ids, [row[e] for e in ids]) for ids, row in zip(chosen, scores, strict=True)]
