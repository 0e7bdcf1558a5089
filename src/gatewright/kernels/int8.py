"""Weights in int8 with one fp32 scale per output row: a quarter of fp32's bytes to read for each token.

In exact arithmetic, for w [N, D] with q and s from `quantise`, each |w_ij - s_i q_ij| <= s_i / 2, so a linear
map errs by |y_i - y'_i| <= s_i / 2 sum_j |x_j|. Through a SwiGLU expert, with dg and du those bounds of gate
g and up u, and silu rising by at most 1.1 a step, |h - h'| <= 1.1 dg (|u| + du) + |silu(g)| du = dh, and then
|y_i - y'_i| <= sum_j (|w_ij| + s_i / 2) dh_j + s_i / 2 sum_j |h_j|, w and s of the second matrix.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

LARGEST = 127


def quantise(
    weight: Float[Tensor, "*batch N D"],
) -> tuple[Int8[Tensor, "*batch N D"], Float32[Tensor, "*batch N"]]:
    """Return q and s with weight = s q within s / 2: symmetric, s = largest magnitude of the row / 127 (1 for
    a row of zeros).

    Raises: ValueError for a weight that is not finite.
    """
    wide = weight.detach().double()
    most = wide.abs().amax(dim=-1) if weight.shape[-1] else wide.new_zeros(weight.shape[:-1])
    if not bool(torch.isfinite(most).all()):
        raise ValueError("weights are not finite; they have no scale")
    scale = (most / LARGEST).float()
    # A row too small for a scale in fp32 is zeros: it errs by less than the smallest number.
    scale = torch.where(scale > 0, scale, 1.0)
    held = (wide / scale.double().unsqueeze(-1)).round().clamp(-LARGEST, LARGEST)
    return held.to(torch.int8), scale


def dequantise(
    held: Int8[Tensor, "*batch N D"], scale: Float32[Tensor, "*batch N"], dtype: torch.dtype
) -> Float[Tensor, "*batch N D"]:
    """Return s q in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return (held.to(wide) * scale.to(wide).unsqueeze(-1)).to(dtype)
