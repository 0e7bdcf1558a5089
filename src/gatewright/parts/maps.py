"""Several linear maps of the same tokens as one: a router's logits and what its noise is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.native.few import few_rows_maps, takes_few
from gatewright.kernels.native.step import Maps
from gatewright.parts.draws import runs_native


def linear_maps(x: Float[Tensor, "T D"], weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x times each weight [N, D], computed in `dtype`, out of autocast, as one multiplication."""
    found = _of_few(x, weights, dtype)
    if found is not None:
        return tuple(found)
    with torch.autocast(x.device.type, enabled=False):
        weights = [weight.to(dtype) for weight in weights]
        if (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.is_contiguous()
            and runs_native(x.numel(), *weights)
        ):
            return Maps.apply(x, False, *weights)
        x = x.to(dtype)
        if len(weights) == 1:
            return (F.linear(x, weights[0]),)
        joined = F.linear(x, torch.cat(weights))
    parts = joined.split([weight.shape[0] for weight in weights], dim=1)
    return tuple(part.contiguous() for part in parts)


def _of_few(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor] | None:
    """Return the maps of a few tokens, as in decoding; None for other calls."""
    if x.dtype == dtype:
        return few_rows_maps(x, weights)
    if dtype != torch.float32 or not native.runs_for(x) or not takes_few(x.shape[0], x, *weights):
        return None
    return few_rows_maps(x.to(dtype), [weight.to(dtype) for weight in weights])
