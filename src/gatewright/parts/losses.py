"""Every loss over Stats by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

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
