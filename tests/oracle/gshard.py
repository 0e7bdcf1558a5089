"""GShard's algorithm 1 as it is printed: one routing group, one token, one counter at a time.

The coin numbers are handed in. `literal` advances the second expert's counter for a token that its coin
rejects, as printed; otherwise a rejected choice takes no place, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle.moe import Weights, best, capacity, dot, feed_forward, softmax


@dataclass
class Gated:
    """What one token got: expert -> its place in the expert's queue, and expert -> its weight."""

    first: int
    places: dict[int, int] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    wanted: list[int] = field(default_factory=list)


def algorithm_1(
    scores: list[list[Tensor]], limit: int, coins: list[float] | None, literal: bool = False
) -> tuple[list[Gated], list[int], Tensor]:
    """Return what each token of one group got, the first choices of each expert, and l_aux as printed.

    Args: `scores` per token, `limit` C, `coins` u per token or none: every second choice is used.
    """
    num_tokens, num_experts = len(scores), len(scores[0])
    counters = [0] * num_experts
    gated = []
    for s in range(num_tokens):
        e1, e2 = best(scores[s], 2)
        g1 = scores[s][e1] / (scores[s][e1] + scores[s][e2])
        one = Gated(first=e1, wanted=[e1])
        c = counters[e1]
        if c < limit:
            one.places[e1], one.weights[e1] = c, g1
        counters[e1] = c + 1
        gated.append(one)
    first_counts = list(counters)
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(num_experts):
        mean = torch.zeros((), dtype=torch.float64)
        for s in range(num_tokens):
            mean = mean + scores[s][e] / num_tokens
        loss = loss + first_counts[e] / num_tokens * mean
    for s in range(num_tokens):
        e1, e2 = best(scores[s], 2)
        g2 = scores[s][e2] / (scores[s][e1] + scores[s][e2])
        accepted = coins is None or 2 * g2.item() > coins[s]
        c = counters[e2]
        if accepted:
            gated[s].wanted.append(e2)
        if c < limit and accepted:
            gated[s].places[e2], gated[s].weights[e2] = c, g2
        if accepted or literal:
            counters[e2] = c + 1
    return gated, first_counts, loss / num_experts


def gshard_layer(
    x: Tensor,
    weights: Weights,
    factor: float,
    group_size: int | None,
    mask: list[bool],
    coins: list[float] | None,
    literal: bool,
    activation: str = "swiglu",
) -> tuple[Tensor, list[Gated | None], list[list[int]], Tensor]:
    """Return y [T, D] of the layer, what each token got (none for padding), the first choices of each
    group, and the mean of l_aux over the groups that hold tokens.
    """
    num_tokens, num_experts = x.shape[0], weights.router.shape[0]
    size = group_size or max(num_tokens, 1)
    rows, got, first_counts, losses = [], [], [], []
    for start in range(0, num_tokens, size):
        group = range(start, min(start + size, num_tokens))
        real = [t for t in group if mask[t]]
        gated: dict[int, Gated] = {}
        counts = [0] * num_experts
        if real:
            scores = [softmax([dot(row, x[t]) for row in weights.router]) for t in real]
            limit = capacity(factor, 2, len(real), num_experts)
            flips = None if coins is None else [coins[t] for t in real]
            found, counts, loss = algorithm_1(scores, limit, flips, literal)
            gated = dict(zip(real, found, strict=True))
            losses.append(loss)
        first_counts.append(counts)
        for t in group:
            y = torch.zeros_like(x[t])
            for e, weight in gated[t].weights.items() if t in gated else ():
                y = y + weight * feed_forward(x[t], weights.w_in[e], weights.w_down[e], activation)
            rows.append(y)
            got.append(gated.get(t))
    mean = torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)
    return torch.stack(rows) if rows else x * 0, got, first_counts, mean
