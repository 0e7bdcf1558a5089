"""Linear maps without biases of the same tokens: queries, keys and values, an output, a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.native.step import Maps

# Tokens from which packing weights pays, and the largest sizes that do (see `_pays`).
_LEAST_TOKENS, _MOST_OUTPUTS, _MOST_WEIGHTS, _WIDEST_NARROW = 1024, 2048, 2**19, 128


def multiplied_in(x: Float[Tensor, "*batch D"]) -> torch.dtype:
    """Return the dtype that torch's linear maps of x multiply in here: autocast's, or x's own."""
    place = x.device.type
    known = torch.amp.is_autocast_available(place)
    if known and torch.is_autocast_enabled(place) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(place)
    return x.dtype


def takes(kind: torch.dtype, x: Float[Tensor, "*batch D"], weights: Sequence[Tensor]) -> bool:
    """Return whether native operators multiply x in `kind` with these weights: all fp32, or all of bf16 as
    `kind` is.
    """
    first = weights[0].dtype
    return (
        native.runs_for(x, *weights)
        and kind in native.DTYPES
        and first in (kind, torch.float32)
        and all(one.dtype == first for one in weights)
        and (kind == torch.bfloat16 or x.dtype == kind)
    )


def linears(
    x: Float[Tensor, "*batch D"], weights: Sequence[Float[Tensor, "_ D"]]
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Return x W^T for each weight W [N, D], in autocast's dtype where it is on."""
    kind = multiplied_in(x)
    # What is compiled or exported may not be held to sizes by a question: that comes second.
    if takes(kind, x, weights) and _pays(x, weights, kind):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        outs = Maps.apply(rows, kind == torch.bfloat16, *(weight.contiguous() for weight in weights))
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)
    return tuple(F.linear(x, weight) for weight in weights)


def _pays(x: Tensor, weights: Sequence[Tensor], kind: torch.dtype) -> bool:
    """Return whether these sizes are faster than torch's own, as measured: beyond them both do the same
    arithmetic, and torch's blocks for large matrices win.
    """
    width, outputs = x.shape[-1], [weight.shape[0] for weight in weights]
    few = max(outputs) <= _MOST_OUTPUTS and max(outputs) * width <= _MOST_WEIGHTS
    if kind == torch.bfloat16:
        # Torch's bf16 is fast from the first: what is left to gain is reading and narrowing x once.
        few = few and width <= _WIDEST_NARROW and 2 * sum(outputs) >= 3 * width
    return few and x.numel() >= _LEAST_TOKENS * width
