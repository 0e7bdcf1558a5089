"""Ranking rows of scores: numpy's vectorised sort of packed 64-bit keys where it can see the numbers.

torch's sorts carry an index beside each value; a key that holds both is sorted as one number, by vector
instructions: measured 7 ms against 77 ms for 16,384 rows of 64 (one core, AVX-512).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_PACKED = (torch.float32, torch.bfloat16, torch.float16)
_LOW = 2**32 - 1


def ranks_fast(scores: Float[Tensor, "T E"]) -> bool:
    """Return whether `rank_rows` packs these: 32-bit numbers or fewer, eager, on the CPU."""
    return scores.dtype in _PACKED and scores.device.type == "cpu" and not torch.compiler.is_compiling()


def rank_rows(scores: Float[Tensor, "T E"]) -> Int64[Tensor, "T E"]:
    """Return the ids [T, E] of each row's scores in falling order, the lowest id first among equals; a NaN
    counts as the highest. Carries no gradient.
    """
    scores = scores.detach()
    if not ranks_fast(scores) or scores.numel() == 0:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices
    # Adding 0 makes -0 and 0 the same bits; NaNs get the largest positive integer.
    wide = scores.float() + 0.0
    bits = wide.view(torch.int32)
    # As signed integers, floats of both signs now stand in order.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if bool(wide.amax().isnan()):
        order = torch.where(wide.isnan(), 2**31 - 1, order)
    keys = order.bitwise_not_().long()
    keys <<= 32
    keys |= torch.arange(scores.shape[1])
    keys.numpy().sort(axis=-1)
    keys &= _LOW
    return keys
