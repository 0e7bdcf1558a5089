"""Every loss over Stats by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.balancing import balance_loss, gshard_loss, z_loss
from gatewright.parts.device_losses import communication_loss, device_loss
from gatewright.parts.rule_losses import cosine_loss, depth_loss, entropy_loss, relu_loss, threshold_loss
from gatewright.parts.variation import importance_loss, load_loss

# name -> function(stats). Two want options: device (num_devices), communication (that and devices_kept).
LOSSES: dict[str, Callable[..., Tensor]] = {
    "balance": balance_loss,
    "sequence_balance": partial(balance_loss, scope="sequence"),
    "gshard": gshard_loss,
    "importance": importance_loss,
    "load": load_loss,
    "z": z_loss,
    "device": device_loss,
    "communication": communication_loss,
    "cosine": cosine_loss,
    "entropy": entropy_loss,
    "threshold": threshold_loss,
    "depth": depth_loss,
    "relu": relu_loss,
}


def named_loss(name: str) -> Callable[..., Tensor]:
    """Return the loss of a name as a function of Stats; whole numbers that it wants follow colons, in order:
    "z", "device:8", "communication:8:3".

    Raises: UserError for an unknown name, and for more or fewer numbers than it wants.
    """
    first, *numbers = name.split(":")
    if first not in LOSSES:
        raise UserError(
            f"loss {first!r} is unknown{did_you_mean(first, LOSSES)}; allowed: {', '.join(LOSSES)}"
        )
    function = LOSSES[first]
    if isinstance(function, partial):
        wanted: list[str] = []
    else:
        given = inspect.signature(function).parameters.values()
        wanted = [p.name for p in given if p.default is p.empty][1:]
    if len(numbers) != len(wanted) or not all(number.isdecimal() for number in numbers):
        told = ":".join([first, *(word.upper() for word in wanted)])
        raise UserError(f"loss {name!r}; allowed: {told}, with whole numbers")
    options = dict(zip(wanted, map(int, numbers), strict=True))
    return partial(function, **options) if options else function
