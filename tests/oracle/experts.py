"""Slow, independent experts: biases, weights on the input, dropout, free experts, gated shared experts.

One token, one choice, one expert at a time, as in `moe`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.moe import act, dot, softmax


def biased_feed_forward(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    activation: str,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return w_down (scale * act(w_in x + b_in)) + b_down for one vector x [D]."""
    pre = torch.stack([dot(row, x) for row in w_in])
    if b_in is not None:
        pre = pre + b_in
    hidden = act(activation, pre)
    if scale is not None:
        hidden = hidden * scale
    out = torch.stack([dot(row, hidden) for row in w_down])
    return out if b_down is None else out + b_down


def mixture(
    x: Tensor,
    places: list[list[int]],
    combine: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    activation: str,
    *,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    side: str = "output",
    scales: dict[tuple[int, int], Tensor] | None = None,
) -> Tensor:
    """Return y [T, D]; `places[t]` are token t's experts, -1 where none; `scales[t, e]` [F] is dropout's."""
    rows = []
    for t, experts in enumerate(places):
        y = x[t] * 0
        for k, e in enumerate(experts):
            if e < 0:
                continue
            given = x[t] * combine[t, k] if side == "input" else x[t]
            out = biased_feed_forward(
                given,
                w_in[e],
                w_down[e],
                activation,
                None if b_in is None else b_in[e],
                None if b_down is None else b_down[e],
                None if scales is None else scales[t, e],
            )
            y = y + (out if side == "input" else combine[t, k] * out)
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


def constant_expert(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Return a1 x + a2 v, (a1, a2) = softmax(w x); w [2, D]."""
    first, second = softmax([dot(w[0], x), dot(w[1], x)])
    return first * x + second * v


def free_experts(
    x: Tensor,
    places: list[list[int]],
    combine: Tensor,
    kinds: list[str],
    num_ffn: int,
    w: Tensor,
    v: Tensor,
    side: str = "output",
) -> Tensor:
    """Return what the free experts add, y [T, D]: expert num_ffn + j is of kinds[j]; w [J, 2, D], v [J, D]
    are those of the constant ones in order.
    """
    rows = []
    for t, experts in enumerate(places):
        y = x[t] * 0
        for k, e in enumerate(experts):
            if e < num_ffn:
                continue
            kind = kinds[e - num_ffn]
            given = x[t] * combine[t, k] if side == "input" else x[t]
            if kind == "zero":
                out = given * 0
            elif kind == "copy":
                out = given
            else:
                j = kinds[: e - num_ffn].count("constant")
                out = constant_expert(given, w[j], v[j])
            y = y + (out if side == "input" else combine[t, k] * out)
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


def gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """Return out [T, D] times sigmoid(gate x), row by row; gate [D]."""
    rows = [out[t] / (1 + (-dot(gate, x[t])).exp()) for t in range(x.shape[0])]
    return torch.stack(rows) if rows else out
