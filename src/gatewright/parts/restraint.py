"""The rule of 2013 that keeps experts equally used early in training: who is far ahead is left out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from gatewright.errors import UserError


class Restrained(NamedTuple):
    """The gates that are used, and each expert's sum of them over all examples so far."""

    gates: Float[Tensor, "T E"]
    totals: Float64[Tensor, "E"]


def restrain(
    logits: Float[Tensor, "T E"],
    totals: Float64[Tensor, "E"],
    margin: float,
    *,
    batched: bool = False,
) -> Restrained:
    """Return the softmax over the experts that are not too far ahead, and the new totals.

    Equation: G_i(t) = sum_{t' <= t} g_i(x_t'), Gbar = mean_i G_i; where G_i(t - 1) - Gbar(t - 1) > margin,
    g_i(x_t) = 0 and the others are renormalised (Eigen et al. 2013, running assignment).
    The rule goes example by example, in the order of the rows. `batched` decides once, by the totals before
    the first row, for all rows. G counts the gates that are used, so that Gbar(t) = t / E, and
    G_i - Gbar never exceeds margin + (1 - 1 / E), or margin + T (1 - 1 / E) with `batched`.
    The choice is a constant: an expert that is left out gets no gradient from that example.
    Raises: UserError for a margin below 0.
    """
    if not margin >= 0:
        raise UserError(
            f"margin {margin}; allowed: 0 or more, in examples' worth of gate; inf is no constraint"
        )
    before = totals.tolist()
    if batched:
        allowed = torch.tensor(_within(before, margin), device=logits.device).expand_as(logits)
        gates = _softmax_over(logits, allowed)
        return Restrained(gates, totals + gates.detach().double().sum(0))
    rows, after = _one_by_one(logits.detach().tolist(), before, margin)
    allowed = torch.tensor(rows, dtype=torch.bool, device=logits.device).view_as(logits)
    return Restrained(_softmax_over(logits, allowed), totals.new_tensor(after))


def _within(totals: list[float], margin: float) -> list[bool]:
    """Return which experts are at most `margin` above the mean; never none, whatever the rounding."""
    bound = max(sum(totals) / len(totals) + margin, min(totals))
    return [total <= bound for total in totals]


def _one_by_one(
    logits: list[list[float]], totals: list[float], margin: float
) -> tuple[list[list[bool]], list[float]]:
    """Return who is allowed in each row, and the totals after the last."""
    rows = []
    for row in logits:
        allowed = _within(totals, margin)
        rows.append(allowed)
        # The largest of those allowed, not of all: the others' exponentials might all be 0 beside it.
        top = max(value for value, own in zip(row, allowed, strict=True) if own)
        parts = [math.exp(value - top) if own else 0.0 for value, own in zip(row, allowed, strict=True)]
        whole = sum(parts)
        totals = [total + part / whole for total, part in zip(totals, parts, strict=True)]
    return rows, totals


def _softmax_over(logits: Float[Tensor, "T E"], allowed: Bool[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    return torch.softmax(logits.masked_fill(~allowed, -torch.inf), dim=-1)
