"""Linear maps as modules, and of a few tokens, as in decoding: by dot products at the memory's pace."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.kernels.linears import linears
from gatewright.kernels.native.few import few_rows_maps


def few_rows_linear(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, "N D"], bias: Float[Tensor, "N"] | None = None
) -> Float[Tensor, "*batch N"]:
    """Return F.linear(x, weight, bias), by the native kernels for up to 8 tokens without gradient."""
    found = few_rows_maps(x, (weight,))
    if found is None:
        return F.linear(x, weight, bias)
    return found[0] if bias is None else found[0] + bias


def apply_linears(x: Float[Tensor, "*batch D"], modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return what each module gives for x; plain linear maps of the same tokens as one.

    A module of another class, with a bias or with a hook is called: who replaced or watches it counts on
    that.
    """
    weights = [weight for module in modules if (weight := _plain_weight(module)) is not None]
    if len(weights) < len(modules):
        return [module(x) for module in modules]
    found = few_rows_maps(x, weights)
    return list(linears(x, weights)) if found is None else found


def _plain_weight(module: nn.Module) -> Tensor | None:
    """Return the weight of a linear map that does nothing else, None for any other module."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    # Straight from where they lie: this is asked thrice per layer and token.
    own = module._parameters
    return None if own.get("bias") is not None or "forward" in module.__dict__ else own.get("weight")
