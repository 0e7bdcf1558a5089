"""Dropout whose zeros are a function of a key, so that recomputed and resumed passes see the same ones."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.draws import call_key, fold, uniform
from gatewright.parts.routing import RoutingCall

# What a key is folded with for dropout, so that it has nothing to do with the router's noise.
_DROPOUT = 0x6C73746D


def check_dropout(share: float) -> float:
    """Return `share` if it is one that can be left out; raise UserError otherwise."""
    if not 0 <= share < 1:
        raise UserError(f"dropout {share}; allowed: 0 or more and below 1; 0 is none")
    return share


def dropped(
    x: Float[Tensor, "*batch D"], share: float, key: Int64[Tensor, ""] | None
) -> Float[Tensor, "*batch D"]:
    """Return x with a `share` of its numbers set to 0 and the others divided by 1 - share; which ones is a
    function of the key alone (None draws one from torch's own generator).
    """
    own = fold(call_key(RoutingCall(key=key), x.device), _DROPOUT)
    stays = uniform(own, tuple(x.shape), x.device) >= share
    return x * stays.to(x.dtype).div_(1 - share)
