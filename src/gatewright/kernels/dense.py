"""The plain feed-forward layer: two linear maps with an activation between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels.activations import activate
from gatewright.kernels.linears import multiplied_in, takes
from gatewright.kernels.native.step import Mlp


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
    if _pays(x, w_down) and takes(kind, x, given):
        laid = [None if one is None else one.contiguous() for one in (w_in, w_down, b_in, b_down)]
        rows = x.reshape(-1, x.shape[-1]).to(kind).contiguous()
        out: Tensor = Mlp.apply(rows, *laid, activation)
        return out.view(x.shape)
    return F.linear(activate(activation, F.linear(x, w_in, b_in)), w_down, b_down)


def _pays(x: Tensor, w_down: Tensor) -> bool:
    return True
