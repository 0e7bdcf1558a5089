"""Model state beside parameters: buffers that a checkpoint keeps, and rules that learn from loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gatewright.parts import Router


def saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that belong into a checkpoint: those of `state_dict`, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        (name, value) for name, value in model.state_dict(keep_vars=True).items() if name not in parameters
    ]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's parameters and saved buffers into a model of the same sizes."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *saved_buffers(model)]:
            value.copy_(weights[name])


def update_rules(routers: Mapping[str, Router], stats: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let every rule that learns from loads (selection bias, adaptive penalty) see one step's counts."""
    for name, router in routers.items():
        update = getattr(router.rule, "update", None)
        if update is not None and name in stats:
            update(stats[name]["counts"], stats[name]["tokens"])


def first_nonfinite(names: Mapping[Tensor, str], stats: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return where a number that is not finite was first seen: a router's logits, a gradient, or the loss."""
    layers = [name for name, counted in stats.items() if int(counted["nonfinite"])]
    if layers:
        return f"first seen in the logits of {layers[0]}"
    # Backward runs from the end of the model: the last parameter is the first that was touched.
    own = [name for p, name in names.items() if p.grad is not None and not p.grad.isfinite().all()]
    return f"first seen in the gradient of {own[-1]}" if own else "first seen in the loss"
