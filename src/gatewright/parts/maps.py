"""Several linear maps of the same tokens as one: a router's logits and what its noise is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.parts.draws import runs_native


def linear_maps(x: Float[Tensor, "T D"], weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x times each weight [N, D], computed in `dtype`, out of autocast, as one multiplication."""
    with torch.autocast(x.device.type, enabled=False):
        weights = [weight.to(dtype) for weight in weights]
        if (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.is_contiguous()
            and runs_native(x.numel(), *weights)
        ):
            return _Maps.apply(x, *weights)
        x = x.to(dtype)
        if len(weights) == 1:
            return (F.linear(x, weights[0]),)
        joined = F.linear(x, torch.cat(weights))
    parts = joined.split([weight.shape[0] for weight in weights], dim=1)
    return tuple(part.contiguous() for part in parts)


class _Maps(torch.autograd.Function):
    """x W^T for each W, in C++: a panel of tokens is read once for all maps."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "T D"], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(torch.ops.gatewright.maps_forward(x, list(weights)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        due = [gradient.contiguous() for gradient in gradients]
        need_x = ctx.needs_input_grad[0]
        of_x, of_weights = torch.ops.gatewright.maps_backward(due, x, weights, need_x)
        return (of_x if need_x else None, *of_weights)
