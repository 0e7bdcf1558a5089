"""A slow, independent Mixture-of-Experts layer: one token, one choice, one expert at a time.

It judges the library, so it shares nothing with it: no sort, no gather, no softmax or logsumexp of torch's,
Python lists of scalars and vectors instead of stacked tensors. Any floating dtype works (fp64 is meant), and
autograd runs through all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """One layer's weights: router [E, D]; per expert w_in [F or 2F, D] (gate rows first) and w_down [D, F].

    `shared_in`, `shared_down`: the shared expert's pair, or none.
    """

    router: Tensor
    w_in: Tensor
    w_down: Tensor
    shared_in: Tensor | None = None
    shared_down: Tensor | None = None


@dataclass
class Record:
    """What a router's statistics should say: plain numbers and lists, the sums as 0-d tensors with gradient.

    The lists from `logits` on hold one entry per token, empty for padding.
    """

    counts: list[int]
    kept: list[int]
    dropped_by_rank: list[int]
    score_sums: list[Tensor]
    logsumexp_sum: Tensor
    logsumexp_square_sum: Tensor
    tokens: int = 0
    unrouted: int = 0
    nonfinite: int = 0
    logits: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)
    combine_weights: list[list[Tensor]] = field(default_factory=list)
    held: list[list[bool]] = field(default_factory=list)


def number(value: Tensor) -> float:
    """Return a scalar's value, for comparisons."""
    return value.detach().item()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the scalar product of two vectors."""
    return (a * b).sum()


def exponentials(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return exp(v - m) for each value, and m, their largest value as a constant."""
    largest = values[0].detach()
    for value in values[1:]:
        if number(value) > number(largest):
            largest = value.detach()
    return [(value - largest).exp() for value in values], largest


def softmax(values: list[Tensor]) -> list[Tensor]:
    """Return exp(v_i) / sum_j exp(v_j)."""
    powers, _ = exponentials(values)
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    return [power / total for power in powers]


def log_sum_exp(values: list[Tensor]) -> Tensor:
    """Return log sum_j exp(v_j)."""
    powers, largest = exponentials(values)
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    return total.log() + largest


def best(scores: list[Tensor], num_selected: int) -> list[int]:
    """Return the K ids of the highest scores, highest first; the lowest id first among equals."""
    left = list(range(len(scores)))
    picked: list[int] = []
    while len(picked) < num_selected:
        winner = left[0]
        for e in left[1:]:
            if number(scores[e]) > number(scores[winner]):
                winner = e
        picked.append(winner)
        left.remove(winner)
    return picked


def gates(logits: list[Tensor], chosen: list[int], form: str) -> list[Tensor]:
    """Return the combine weights of the chosen experts in one of the three forms."""
    if form == "softmax_selected":
        return softmax([logits[e] for e in chosen])
    scores = softmax(logits)
    raw = [scores[e] for e in chosen]
    if form == "raw":
        return raw
    if form == "renormalised":
        total = raw[0]
        for value in raw[1:]:
            total = total + value
        return [value / total for value in raw]
    raise ValueError(form)


def act(name: str, h: Tensor) -> Tensor:
    """Return the activation of one hidden vector; gated ones take [2F], gate first."""
    if name == "linear":
        return h
    if name == "relu":
        return torch.stack([v if number(v) > 0 else v * 0 for v in h])
    if name == "gelu":
        return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    half = h.shape[0] // 2
    gate, up = h[:half], h[half:]
    if name == "geglu":
        return act("gelu", gate) * up
    if name == "swiglu":
        return gate / (1 + (-gate).exp()) * up
    if name == "clamped_swiglu":
        # A value beyond a cut is the cut itself, a constant.
        gate = torch.stack([v if number(v) <= 7 else v * 0 + 7 for v in gate])
        up = torch.stack([v if -7 <= number(v) <= 7 else v * 0 + 7 * math.copysign(1, number(v)) for v in up])
        return (up + 1) * gate / (1 + (-1.702 * gate).exp())
    raise ValueError(name)


def feed_forward(x: Tensor, w_in: Tensor, w_down: Tensor, activation: str) -> Tensor:
    """Return w_down act(w_in x) for one vector x [D]."""
    hidden = act(activation, torch.stack([dot(row, x) for row in w_in]))
    return torch.stack([dot(row, hidden) for row in w_down])


def capacity(factor: float, num_selected: int, num_tokens: int, num_experts: int) -> int:
    """Return ceil(f K T / E), with f read as the decimal number that was written."""
    share = Fraction(repr(factor)) * num_selected * num_tokens
    return -((-share.numerator) // (share.denominator * num_experts))


def moe_layer(
    x: Tensor,
    weights: Weights,
    num_selected: int,
    *,
    form: str = "raw",
    activation: str = "swiglu",
    capacity_factor: float | None = None,
    mask: list[bool] | None = None,
) -> tuple[Tensor, Record]:
    """Return (y [T, D], Record) for x [T, D]; `mask` False = padding."""
    num_experts = weights.router.shape[0]
    real = [True] * x.shape[0] if mask is None else mask
    limit = None
    if capacity_factor is not None:
        limit = capacity(capacity_factor, num_selected, sum(real), num_experts)
    zero = x.new_zeros(())
    none = [0] * num_experts
    record = Record(none, list(none), [0] * num_selected, [zero] * num_experts, zero, zero)
    rows = []
    for t in range(x.shape[0]):
        y = x.new_zeros(x.shape[1])
        if not real[t]:
            _note(record, [], [], [], [], [])
        else:
            chosen, combine_weights, held = route(x[t], weights.router, num_selected, form, limit, record)
            for e, weight, here in zip(chosen, combine_weights, held, strict=True):
                if here:
                    y = y + weight * feed_forward(x[t], weights.w_in[e], weights.w_down[e], activation)
            if weights.shared_in is not None and weights.shared_down is not None:
                y = y + feed_forward(x[t], weights.shared_in, weights.shared_down, activation)
        rows.append(y)
    return (torch.stack(rows) if rows else x * 0), record


def route(
    x: Tensor, router: Tensor, num_selected: int, form: str, limit: int | None, record: Record
) -> tuple[list[int], list[Tensor], list[bool]]:
    """Return one token's experts, their weights and which had room, and write it all into the record."""
    logits = [dot(row, x) for row in router]
    scores = softmax(logits)
    chosen = best(scores, num_selected)
    combine_weights = gates(logits, chosen, form)
    held = []
    for rank, e in enumerate(chosen):
        record.counts[e] += 1
        room = limit is None or record.kept[e] < limit
        record.kept[e] += room
        record.dropped_by_rank[rank] += not room
        held.append(room)
    lse = log_sum_exp(logits)
    record.tokens += 1
    record.unrouted += not any(held)
    record.nonfinite += any(not math.isfinite(number(logit)) for logit in logits)
    record.score_sums = [total + score for total, score in zip(record.score_sums, scores, strict=True)]
    record.logsumexp_sum = record.logsumexp_sum + lse
    record.logsumexp_square_sum = record.logsumexp_square_sum + lse * lse
    _note(record, logits, scores, chosen, combine_weights, held)
    return chosen, combine_weights, held


def _note(
    record: Record,
    logits: list[Tensor],
    scores: list[Tensor],
    chosen: list[int],
    combine_weights: list[Tensor],
    held: list[bool],
) -> None:
    record.logits.append(logits)
    record.scores.append(scores)
    record.chosen.append(chosen)
    record.combine_weights.append(combine_weights)
    record.held.append(held)


def balance_loss(records: list[Record]) -> Tensor:
    """Return the mean over routers of E sum_e f_e P_e.

    f_e = assignments of e over all assignments, P_e = mean score of e.
    """
    total = torch.zeros((), dtype=torch.float64)
    for record in records:
        num_experts, assignments = len(record.counts), sum(record.counts)
        loss = torch.zeros((), dtype=torch.float64)
        for e in range(num_experts):
            if assignments:
                loss = loss + record.counts[e] / assignments * record.score_sums[e] / record.tokens
        total = total + num_experts * loss
    return total / len(records)


def z_loss(records: list[Record]) -> Tensor:
    """Return the mean over routers and tokens of logsumexp(logits) ** 2."""
    total = torch.zeros((), dtype=torch.float64)
    for record in records:
        if record.tokens:
            total = total + record.logsumexp_square_sum / record.tokens
    return total / len(records)
