"""The plain feed-forward layer: two linear maps with an activation between them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels.activations import activate
from gatewright.kernels.few_rows import few_rows_linear
from gatewright.kernels.linears import multiplied_in, takes
from gatewright.kernels.native.step import Mlp

# Tokens from which packing weights pays, and the largest sizes that do (see `fits`).
_LEAST_TOKENS, _MOST_WEIGHTS, _WIDEST_NARROW = 128, 3 * 2**17, 128


def dense_mlp(
    x: Float[Tensor, "*batch D"],
    w_in: Float[Tensor, "H D"],
    w_down: Float[Tensor, "D F"],
    activation: str,
    b_in: Float[Tensor, "H"] | None = None,
    b_down: Float[Tensor, "D"] | None = None,
) -> Float[Tensor, "*batch D"]:
    """Return w_down act(w_in x + b_in) + b_down, in autocast's dtype where it is on; H is F, or 2F with the
    gate first.
    """
    kind = multiplied_in(x)
    given = [one for one in (w_in, w_down, b_in, b_down) if one is not None]
    pays = fits(w_down.shape[0], w_down.shape[1], kind) and takes(kind, x, given)
    if pays and x.numel() >= _LEAST_TOKENS * x.shape[-1]:
        laid = [None if one is None else one.contiguous() for one in (w_in, w_down, b_in, b_down)]
        rows = x.reshape(-1, x.shape[-1]).to(kind).contiguous()
        out: Tensor = Mlp.apply(rows, *laid, activation)
        return out.view(x.shape)
    return few_rows_linear(activate(activation, few_rows_linear(x, w_in, b_in)), w_down, b_down)


def fits(width: int, ffn_width: int, kind: torch.dtype) -> bool:
    """Return whether a layer of these sizes is computed natively, multiplied in `kind`: those that were
    measured to be faster. Beyond, its weights leave the caches, and torch's blocks for large matrices win.
    """
    return width * ffn_width <= _MOST_WEIGHTS and (kind == torch.float32 or width <= _WIDEST_NARROW)
