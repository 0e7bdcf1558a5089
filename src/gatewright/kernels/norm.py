"""Root-mean-square normalisation, alone and of a sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.native.step import Norm


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype, computed in at least
    fp32.
    """
    if native.runs_for(x, weight):
        rows, scale = _rows(x), weight.float().contiguous()
        if not torch.is_grad_enabled():  # as in decoding, where a function of autograd costs more than this
            return torch.ops.gatewright.norm_forward(rows, None, scale, eps)[1].view(x.shape)
        out: Tensor = Norm.apply(rows, None, scale, eps)
        return out.view(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


def add_norm(
    x: Float[Tensor, "*batch D"], y: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """Return s = x + y, in the wider of both dtypes, and `rms_norm(s, weight, eps)`."""
    if native.runs_for(x, y, weight) and torch.promote_types(x.dtype, y.dtype) == x.dtype:
        rows, more, scale = _rows(x), _rows(y), weight.float().contiguous()
        if torch.is_grad_enabled():
            total, normed = Norm.apply(rows, more, scale, eps)
        else:
            total, normed, _ = torch.ops.gatewright.norm_forward(rows, more, scale, eps)
        return total.view(x.shape), normed.view(x.shape)
    total = x + y
    return total, rms_norm(total, weight, eps)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
