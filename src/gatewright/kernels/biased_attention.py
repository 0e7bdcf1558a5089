"""Attention whose scores take a bias: relative positions, padding, and texts that look at other texts."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend_biased(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B H P head_dim"],
    v: Float[Tensor, "B H P head_dim"],
    bias: Float[Tensor, "#B #H #S P"],
    scale: float = 1.0,
) -> Float[Tensor, "B H S head_dim"]:
    """Return attention of q over k and v, in q's dtype; a query that sees no key gets 0.

    Equation: softmax(scale q k^T + bias) v; the bias is -inf where a key is not seen. T5 has scale 1: what
    1 / sqrt(head_dim) does elsewhere is in the initial weights (Raffel et al. 2020, section 2.1).
    """
    return F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=bias.to(q.dtype), scale=scale
    )
