"""Compile a layer with every named router whole and compare it with eager mode; print what differs as JSON.

A program of its own: the shape checks of the test run wrap every function, and cannot be compiled.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from gatewright.parts import RouterInfo, all_routers
from tests.parts.every import KEY, layer_of, losses, tokens


def results(info: RouterInfo, compiled: bool) -> dict[str, Tensor | None]:
    """Return output, gradients and counts by name."""
    torch._dynamo.reset()
    layer = layer_of(info)
    x, ids = tokens(24)
    x.requires_grad_()
    run = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    y, stats = run(x, key=KEY, token_ids=ids)
    (y.square().sum() + losses(stats)).backward()
    found: dict[str, Tensor | None] = {"y": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    record = stats["router"]
    for name in ("counts", "kept", "unrouted", "group_counts", "first_counts"):
        found[name] = getattr(record, name)
    return found


def difference(info: RouterInfo) -> str:
    """Return "" or the first thing that compilation changes."""
    try:
        eager, compiled = results(info, False), results(info, True)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1500]}"
    for name, one in eager.items():
        other = compiled[name]
        if one is None or other is None:
            if any(value is not None and value.any() for value in (one, other)):
                return f"{name}: a gradient in one of the two only"
        elif not torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5):
            return f"{name} differs by {(one.double() - other.double()).abs().max()}"
    return ""


if __name__ == "__main__":
    print(json.dumps({info.name: difference(info) for info in all_routers() if info.name != "base"}))
