"""Compile layers with capacities whole and compare it with eager mode; print what differs as JSON. A
program of its own, as tests/parts/compiled.py.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from gatewright.parts import Capacity, MoELayer

RECORDED = ("counts", "kept", "dropped_by_rank", "unrouted", "first_counts", "group_counts", "group_tokens")


def results(
    backend: str | None, capacity: Capacity, group_size: int | None, masked: bool
) -> dict[str, Tensor]:
    """Return output, gradient of x and counts by name; no backend is eager mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MoELayer(6, 4, 2, 5, capacity=capacity, group_size=group_size).double()
    x = torch.randn(14, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[:, 0] += 1
    mask = torch.arange(14) % 5 != 2 if masked else None
    run = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    y, stats = run(x, mask)
    y.square().sum().backward()
    assert x.grad is not None
    record = stats["router"]
    return {"y": y.detach(), "gradient": x.grad} | {name: getattr(record, name) for name in RECORDED}


def difference(backend: str, *options: object) -> str:
    """Return "" or the first thing that compilation changes."""
    try:
        eager, compiled = results(None, *options), results(backend, *options)  # type: ignore[arg-type]
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1500]}"
    for name, one in eager.items():
        if not torch.allclose(one.double(), compiled[name].double(), rtol=1e-12, atol=1e-14):
            return f"{name} differs: {one.tolist()} and {compiled[name].tolist()}"
    return ""


if __name__ == "__main__":
    backend = sys.argv[1] if len(sys.argv) > 1 else "aot_eager"
    found = {"position": difference(backend, Capacity(0.7), None, False)}
    capacity = Capacity(0.7, order="batch_priority", reroute=True)
    found["batch_priority, groups, padding, reroute"] = difference(backend, capacity, 5, True)
    # A decimal whose numerator would leave int64.
    found["rank, groups, a third"] = difference(backend, Capacity(1 / 3, order="rank"), 5, False)
    print(json.dumps(found))
