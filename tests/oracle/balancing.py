"""Slow, independent balance losses: token by token, expert by expert, on one router's own choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.moe import best, log_sum_exp, softmax


@dataclass
class Seen:
    """What one router did with its real tokens: per token the logits, scores that sum to 1, the chosen
    experts (highest first) and the group that it belongs to.
    """

    num_experts: int
    logits: list[list[Tensor]]
    scores: list[list[Tensor]]
    chosen: list[list[int]]
    group: list[int]


def see(logits: Tensor, num_selected: int, mask: list[bool] | None = None, size: int | None = None) -> Seen:
    """Return what token choice on a softmax does with logits [T, E]; `size` tokens make a group."""
    seen = Seen(logits.shape[1], [], [], [], [])
    for t in range(logits.shape[0]):
        if mask is not None and not mask[t]:
            continue
        row = [logits[t, e] for e in range(seen.num_experts)]
        seen.logits.append(row)
        seen.scores.append(softmax(row))
        seen.chosen.append(best(seen.scores[-1], num_selected))
        seen.group.append(0 if size is None else t // size)
    return seen


def zero() -> Tensor:
    """Return 0."""
    return torch.zeros((), dtype=torch.float64)


def counts_of(seen: Seen) -> list[int]:
    """Return how often each expert is chosen."""
    counts = [0] * seen.num_experts
    for chosen in seen.chosen:
        for e in chosen:
            counts[e] += 1
    return counts


def mean_score(seen: Seen, e: int) -> Tensor:
    """Return P_e."""
    total = zero()
    for row in seen.scores:
        total = total + row[e]
    return total / max(len(seen.scores), 1)


def balance(seen: Seen, counts: list[int] | None = None) -> Tensor:
    """Return E sum_e f_e P_e, f from the counts handed in or the tokens' own."""
    counts = counts_of(seen) if counts is None else counts
    loss, assigned = zero(), sum(counts)
    for e in range(seen.num_experts):
        if assigned:
            loss = loss + counts[e] / assigned * mean_score(seen, e)
    return seen.num_experts * loss


def groups_of(seen: Seen) -> list[Seen]:
    """Return the groups that hold tokens, each as a router of its own."""
    found = []
    for group in sorted(set(seen.group)):
        here = [i for i, g in enumerate(seen.group) if g == group]
        found.append(
            Seen(
                seen.num_experts,
                [seen.logits[i] for i in here],
                [seen.scores[i] for i in here],
                [seen.chosen[i] for i in here],
                [group for _ in here],
            )
        )
    return found


def mean(values: list[Tensor]) -> Tensor:
    """Return the mean, 0 of nothing."""
    total = zero()
    for value in values:
        total = total + value
    return total / max(len(values), 1)


def sequence_balance(seen: Seen) -> Tensor:
    """Return DeepSeek-V3 eq 17-20 averaged over sequences."""
    return mean([balance(group) for group in groups_of(seen)])


def gshard(seen: Seen) -> Tensor:
    """Return E^2 times the printed loss (1 / E) sum_e (c_e / S) m_e, c first choices; mean over groups."""
    values = []
    for group in groups_of(seen):
        printed = zero()
        for e in range(seen.num_experts):
            first = sum(1 for chosen in group.chosen if chosen and chosen[0] == e)
            printed = printed + first / len(group.scores) * mean_score(group, e)
        values.append(seen.num_experts**2 * (printed / seen.num_experts))
    return mean(values)


def z(seen: Seen) -> Tensor:
    """Return the mean of logsumexp ** 2."""
    return mean([log_sum_exp(row) ** 2 for row in seen.logits])


def squared_variation(values: list[Tensor]) -> Tensor:
    """Return variance over mean squared, each of the E values counting 1 / E; 0 where all are 0."""
    middle = mean(values)
    if middle.item() == 0:
        return zero()
    return mean([(value - middle) ** 2 for value in values]) / middle**2


def importance(seen: Seen) -> Tensor:
    """Return CV^2 of the summed scores."""
    return squared_variation([mean_score(seen, e) * len(seen.scores) for e in range(seen.num_experts)])


def load(seen: Seen) -> Tensor:
    """Return CV^2 of the counts."""
    return squared_variation([torch.tensor(float(c), dtype=torch.float64) for c in counts_of(seen)])


def device(seen: Seen, num_devices: int) -> Tensor:
    """Return sum_d (mean of f in d) (sum of P in d), f_e = E counts_e / (K T)."""
    counts, size, loss = counts_of(seen), seen.num_experts // num_devices, zero()
    for d in range(num_devices):
        f, probability = 0.0, zero()
        for e in range(d * size, (d + 1) * size):
            f += seen.num_experts * counts[e] / max(sum(counts), 1) / size
            probability = probability + mean_score(seen, e)
        loss = loss + f * probability
    return loss


def communication(seen: Seen, num_devices: int, devices_kept: int) -> Tensor:
    """Return sum_d f''_d P''_d, f''_d = D / (M T) * tokens that use an expert of d."""
    size, loss = seen.num_experts // num_devices, zero()
    for d in range(num_devices):
        sent = sum(1 for chosen in seen.chosen if any(e // size == d for e in chosen))
        probability = zero()
        for e in range(d * size, (d + 1) * size):
            probability = probability + mean_score(seen, e)
        loss = loss + num_devices * sent / (devices_kept * max(len(seen.chosen), 1)) * probability
    return loss


def device_counts(seen: Seen, num_devices: int) -> list[int]:
    """Return the tokens that each device receives."""
    size = seen.num_experts // num_devices
    return [
        sum(1 for chosen in seen.chosen if any(e // size == d for e in chosen)) for d in range(num_devices)
    ]


def entropy(seen: Seen) -> Tensor:
    """Return the mean of -sum_e P_e ln P_e."""
    values = []
    for row in seen.scores:
        total = zero()
        for score in row:
            total = total - score * score.log()
        values.append(total)
    return mean(values)


def cosine(seen: Seen, temperature: float) -> Tensor:
    """Return E sum_e f_e mean_t softmax(s_t / tau0)_e, the logits taken as the cosines s."""
    counts, loss = counts_of(seen), zero()
    sharpened = [softmax([value / temperature for value in row]) for row in seen.logits]
    for e in range(seen.num_experts):
        if sharpened:
            loss = loss + counts[e] / sum(counts) * mean([row[e] for row in sharpened])
    return seen.num_experts * loss
