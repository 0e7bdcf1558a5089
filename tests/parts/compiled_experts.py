"""Compile and export layers with every kind of expert and compare with eager mode; print what differs as
JSON.

A program of its own: the shape checks of the test run wrap every function, and cannot be compiled. With
"inductor" it compiles one layer to machine code.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gatewright.parts import Experts, MoELayer
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from gatewright.parts.shared import GatedShared

KEY = torch.tensor(5)
Build = Callable[[], MoELayer]


def nested() -> MoELayer:
    """Return a layer of a MoE layer and a dense one."""
    inner = [MoELayer(8, 3, 2, 4, expert_bias=True, expert_dropout=0.2), nn.Linear(8, 8)]
    return MoELayer(8, 2, 1, 4, weights="raw", experts=ModuleExperts(inner))


LAYERS: dict[str, tuple[Build, torch.dtype]] = {
    "dropless fp32": (lambda: MoELayer(8, 6, 2, 4), torch.float32),
    "dropless fp64": (lambda: MoELayer(8, 6, 2, 4, num_shared_experts=1), torch.float64),
    "capacity fp32": (lambda: MoELayer(8, 6, 2, 4, capacity_factor=0.7), torch.float32),
    "capacity fp64": (lambda: MoELayer(8, 6, 2, 4, capacity_factor=0.7), torch.float64),
    "padded": (lambda: MoELayer(8, 6, 2, 4, backend="padded"), torch.float64),
    "padded capacity": (
        lambda: MoELayer(8, 6, 2, 4, backend="padded", capacity_factor=0.7),
        torch.float64,
    ),
    "biases and dropout": (
        lambda: MoELayer(
            8, 6, 2, 5, activation="clamped_swiglu", expert_bias=True, expert_dropout=0.3, router="gpt_oss"
        ),
        torch.float64,
    ),
    "weights on the input": (lambda: MoELayer(8, 6, 1, 4, router="llama4"), torch.float64),
    "free experts and a gated shared one": (
        lambda: MoELayer(
            8, 6, 2, 4, experts=FreeExperts(Experts(8, 3, 4)), shared=GatedShared(8, 6), capacity_factor=0.9
        ),
        torch.float64,
    ),
    "nested": (nested, torch.float64),
}


def built(build: Build, dtype: torch.dtype) -> tuple[MoELayer, Tensor, Tensor]:
    """Return the layer, x [2, 7, D] and a mask of it."""
    torch.manual_seed(0)
    layer = build().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=dtype))
    x = torch.randn(2, 7, 8, dtype=dtype, requires_grad=True)
    return layer, x, torch.arange(14).view(2, 7) != 9


def results(build: Build, dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
    """Return output, gradients and counts by name."""
    torch._dynamo.reset()
    layer, x, mask = built(build, dtype)
    run = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    y, stats = run(x, mask, key=KEY)
    y.square().sum().backward()
    found = {"y": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    for name, record in stats.items():
        found |= {f"{name} counts": record.counts, f"{name} kept": record.kept}
    return {name: value for name, value in found.items() if value is not None}


def difference(build: Build, dtype: torch.dtype, backend: str) -> str:
    """Return "" or the first thing that compilation changes."""
    try:
        eager, compiled = results(build, dtype, None), results(build, dtype, backend)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1500]}"
    if eager.keys() != compiled.keys():
        return f"{sorted(eager.keys() ^ compiled.keys())} in one of the two only"
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for name, one in eager.items():
        error = (one.double() - compiled[name].double()).abs().max().item()
        if not error <= bound * max(one.double().abs().max().item(), 1e-2):
            return f"{name} differs by {error}"
    return ""


def exported(build: Build, dtype: torch.dtype) -> str:
    """Return "" or what a saved and loaded export of any length gives otherwise."""
    try:
        layer, x, _ = built(build, dtype)
        layer.eval()
        with torch.no_grad():
            length = torch.export.Dim("length", min=5, max=99)
            program = torch.export.export(layer, (x.detach(),), dynamic_shapes={"x": {1: length}})
            names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            if any("gatewright" in name for name in names):
                return f"operators of ours: {sorted(names)}"
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            buffer.seek(0)
            other = torch.randn(2, 11, 8, dtype=dtype)
            y, stats = torch.export.load(buffer).module()(other)
            expected, wanted = layer(other)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:1500]}"
    if stats["router"].counts.tolist() != wanted["router"].counts.tolist() or set(stats) != set(wanted):
        return "the statistics differ"
    off = (y - expected).abs().max().item()
    return "" if off < 1e-5 else f"y differs by {off}"


def main() -> None:
    """Print {case: what differs}."""
    if sys.argv[1:] == ["inductor"]:
        found = {"inductor": difference(*LAYERS["capacity fp32"], "inductor")}
    elif sys.argv[1:] == ["export"]:
        names = ("dropless fp32", "capacity fp32", "free experts and a gated shared one", "nested")
        found = {name: exported(*LAYERS[name]) for name in names}
    else:
        found = {name: difference(*case, "aot_eager") for name, case in LAYERS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
