"""Noisy gating, slowly: one token, one expert at a time. The noise is handed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracle.moe import best, dot, number, softmax

# The least standard deviation that a probability is divided by.
LEAST_STD = 1e-6


def phi(z: Tensor) -> Tensor:
    """Return the normal distribution function."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def softplus(v: Tensor) -> Tensor:
    """Return ln(1 + e^v)."""
    return torch.log1p(v.exp())


def kth(values: list[Tensor], k: int) -> Tensor:
    """Return the k-th highest value."""
    return values[best(values, k)[-1]]


def kth_excluding(values: list[Tensor], k: int, i: int) -> Tensor:
    """Return the k-th highest value once that of i is taken out (2017, appendix A)."""
    return kth([value for e, value in enumerate(values) if e != i], k)


def load(
    clean: list[Tensor], noisy: list[Tensor], stds: list[Tensor], k: int, excluding: bool
) -> list[Tensor]:
    """Return each expert's probability of being in the top k under new noise of its own (2017 eq 8-9;
    V-MoE's form compares with the k-th of all).
    """
    if k == len(clean):
        return [torch.ones_like(value) for value in clean]
    chances = []
    for i, value in enumerate(clean):
        threshold = kth_excluding(noisy, k, i) if excluding else kth(noisy, k)
        std = stds[i] if number(stds[i]) > LEAST_STD else torch.full_like(stds[i], LEAST_STD)
        chances.append(phi((value - threshold) / std))
    return chances


def noisy_logits(
    x: Tensor, gate: Tensor, spread: Tensor, draws: Tensor, epsilon: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return one token's clean logits, H and standard deviations (2017 eq 4); `draws` is its noise [E]."""
    clean = [dot(row, x) for row in gate]
    stds = [softplus(dot(row, x)) + epsilon for row in spread]
    noisy = [value + std * number(draw) for value, std, draw in zip(clean, stds, draws, strict=True)]
    return clean, noisy, stds


def keep_top_k(noisy: list[Tensor], k: int) -> tuple[list[int], list[Tensor]]:
    """Return the k best and softmax(KeepTopK(H, k)) at them: eq 3 and 5, with -inf everywhere else."""
    chosen = best(noisy, k)
    kept = [value if e in chosen else torch.full_like(value, -math.inf) for e, value in enumerate(noisy)]
    gates = softmax(kept)
    return chosen, [gates[e] for e in chosen]


def drawn(logits: list[Tensor], lots: Tensor, k: int) -> tuple[list[int], list[Tensor]]:
    """Return the k experts of the highest logit + lot, one after the other, and their clean scores."""
    left = list(range(len(logits)))
    order = []
    for _ in range(k):
        totals = [logits[e].detach() + lots[e] for e in left]
        order.append(left.pop(best(totals, 1)[0]))
    scores = softmax(logits)
    return order, [scores[e] for e in order]
