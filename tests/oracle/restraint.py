"""Slow, independent running assignment of 2013: one example at a time, shares zeroed and divided again."""

from __future__ import annotations

import math


def restrained(
    logits: list[list[float]], totals: list[float], margin: float, every: int = 1
) -> tuple[list[list[float]], list[float]]:
    """Return gates [T][E] and the totals after them; who is left out is decided anew after `every` rows."""
    totals, gates, out = list(totals), [], [False] * len(totals)
    for t, row in enumerate(logits):
        if t % every == 0:
            mean = sum(totals) / len(totals)
            out = [total - mean > margin for total in totals]
        exps = [math.exp(value) for value in row]
        shares = [value / sum(exps) for value in exps]
        kept = [0.0 if gone else share for share, gone in zip(shares, out, strict=True)]
        gates.append([share / sum(kept) for share in kept])
        if every == 1:
            totals = [total + gate for total, gate in zip(totals, gates[-1], strict=True)]
        elif (t + 1) % every == 0 or t + 1 == len(logits):
            own = gates[t // every * every :]
            totals = [total + sum(g[e] for g in own) for e, total in enumerate(totals)]
    return gates, totals
