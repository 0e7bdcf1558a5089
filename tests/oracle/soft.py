"""Soft MoE, one sequence, one slot and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.moe import dot, feed_forward, softmax


def unit(vector: Tensor) -> Tensor:
    """Return v / sqrt(|v|^2 + 1e-6)."""
    return vector / (dot(vector, vector) + 1e-6).sqrt()


def soft_moe(
    x: Tensor,
    phi: Tensor,
    scale: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    activation: str,
    real: list[bool],
) -> Tensor:
    """Return y [S, D] for one sequence x [S, D]; phi [D, E p], slot i of expert floor(i / p)."""
    slots, each = phi.shape[1], phi.shape[1] // w_in.shape[0]
    tokens = [t for t in range(x.shape[0]) if real[t]]
    vectors = [phi[:, i] if scale is None else scale * unit(phi[:, i]) for i in range(slots)]
    logits = {t: [dot(x[t] if scale is None else unit(x[t]), v) for v in vectors] for t in tokens}
    outputs = []
    for i in range(slots):
        mixed = x.new_zeros(x.shape[1])
        if tokens:
            for t, share in zip(tokens, softmax([logits[t][i] for t in tokens]), strict=True):
                mixed = mixed + share * x[t]
        outputs.append(feed_forward(mixed, w_in[i // each], w_down[i // each], activation))
    rows = []
    for t in range(x.shape[0]):
        y = x.new_zeros(x.shape[1])
        if real[t]:
            for share, output in zip(softmax(logits[t]), outputs, strict=True):
                y = y + share * output
        rows.append(y)
    return torch.stack(rows) if rows else x * 0
