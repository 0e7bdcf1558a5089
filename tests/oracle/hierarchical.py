"""Two levels of noisy gating, slowly (2017, appendix B): one token, one group, one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle.moe import number
from tests.oracle.noise import keep_top_k, load, noisy_logits


@dataclass(frozen=True)
class Weights:
    """Each level's W_g and W_noise, [a, D] and [E, D]; with `noisy` False the noise is left out."""

    primary: Tensor
    primary_noise: Tensor
    secondary: Tensor
    secondary_noise: Tensor
    noisy: bool = True


@dataclass
class Totals:
    """Sums over tokens: of gates and chances by expert, of chances and choices by group."""

    importance: list[Tensor]
    inner: list[Tensor]
    outer: list[Tensor]
    choices: list[int] = field(default_factory=list)

    def load(self) -> list[Tensor]:
        """Return Load_ij = Loadprim_i * Load_i(X_i)_j / |X_i| (eq 14)."""
        inside = len(self.inner) // len(self.outer)
        return [
            self.outer[e // inside] * chance / (self.choices[e // inside] + 1e-10)
            for e, chance in enumerate(self.inner)
        ]


def totals(num_experts: int, num_groups: int) -> Totals:
    """Return sums over no tokens."""
    zero = torch.zeros((), dtype=torch.float64)
    return Totals([zero] * num_experts, [zero] * num_experts, [zero] * num_groups, [0] * num_groups)


def route(
    x: Tensor,
    weights: Weights,
    draws: tuple[Tensor, Tensor],
    k: tuple[int, int],
    epsilon: float,
    sums: Totals,
) -> tuple[list[int], list[Tensor]]:
    """Return one token's experts in falling order of weight and their weights (eq 12); add to `sums`.

    `draws`: the token's noise on groups [a] and on experts [E]. `k`: how many of the groups, and in each.
    """
    num_groups = weights.primary.shape[0]
    inside = weights.secondary.shape[0] // num_groups
    clean, noisy, stds = noisy_logits(x, weights.primary, weights.primary_noise, draws[0], epsilon)
    noisy = noisy if weights.noisy else clean
    for i, chance in enumerate(load(clean, noisy, stds, k[0], excluding=True)):
        sums.outer[i] = sums.outer[i] + chance
    pairs: list[tuple[int, Tensor]] = []
    for i, outer in zip(*keep_top_k(noisy, k[0]), strict=True):
        sums.choices[i] += 1
        rows = slice(i * inside, (i + 1) * inside)
        own = noisy_logits(x, weights.secondary[rows], weights.secondary_noise[rows], draws[1][rows], epsilon)
        within = own[1] if weights.noisy else own[0]
        for j, chance in enumerate(load(own[0], within, own[2], k[1], excluding=True)):
            sums.inner[rows.start + j] = sums.inner[rows.start + j] + chance
        for j, gate in zip(*keep_top_k(within, k[1]), strict=True):
            pairs.append((rows.start + j, outer * gate))
            sums.importance[rows.start + j] = sums.importance[rows.start + j] + outer * gate
    pairs.sort(key=lambda pair: (-number(pair[1]), pair[0]))
    return [e for e, _ in pairs], [weight for _, weight in pairs]
