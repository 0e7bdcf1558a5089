"""The sides of a row: our layer, transformers' layers, and dense layers of equal active FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewright.kernels import DispatchPlan, ExpertWeights, activate, expert_mlp
from gatewright.measuring.grid import DTYPES, Cell, Pass, Shape, dense_width
from gatewright.measuring.rivals import IMPLEMENTATIONS, TransformersLayer, switch_balance
from gatewright.measuring.rounds import Turn
from gatewright.parts import MLP, MoELayer, Stats, balance_loss

OURS, FEW, LINEAR, KERNEL = "ours", "ours_fewest_experts", "dense_linear", "dense_kernel"
LAYER = "dense_layer"
DENSE = (LINEAR, KERNEL, LAYER)
TRANSFORMERS = tuple(f"transformers_{name}" for name in IMPLEMENTATIONS)
COEFFICIENT = 0.01  # of the balance loss, for every sparse side


@dataclass(frozen=True)
class Side:
    """One layer: x [T, D] -> (y [T, D], what its balance loss is made of), and that loss for sparse ones."""

    layer: Callable[[Tensor], tuple[Tensor, Any]]
    loss: Callable[[Any], Tensor] | None
    parameters: tuple[nn.Parameter, ...]

    def turn(self, x: Tensor, grad: Tensor, kind: Pass, keep_gradients: bool) -> Turn:
        """Return this side's part of a round. Forward alone runs as inference does, recording nothing; with
        the backward pass, y's gradient is `grad` [T, D] and a sparse side adds its balance loss's.
        """

        def forward() -> None:
            with torch.no_grad():
                self.layer(x)

        def both() -> None:
            y, seen = self.layer(x)
            if self.loss is None:
                y.backward(grad)
            else:
                torch.autograd.backward([y, COEFFICIENT * self.loss(seen)], [grad, None])

        def clear() -> None:
            for leaf in (x, *self.parameters):
                if keep_gradients and leaf.grad is not None:
                    leaf.grad.zero_()
                else:
                    leaf.grad = None

        return Turn(both if kind == "forward-backward" else forward, clear)


def build_sides(cell: Cell, backend: str | None, names: Sequence[str]) -> dict[str, Side]:
    """Return the named sides of a row; sparse ones hold equal weights, and so do the dense ones.

    Draws from torch's generator.
    """
    dtype, shape = DTYPES[cell.dtype], cell.shape
    ours = our_layer(shape, backend).to(dtype)
    dense = MLP(shape.width, dense_width(shape)).to(dtype)
    makers: dict[str, Callable[[], Side]] = {
        OURS: lambda: _ours(ours),
        FEW: lambda: _ours(our_layer(cell.few or shape, backend).to(dtype)),
        LINEAR: lambda: Side(partial(_by_linear, dense), None, tuple(dense.parameters())),
        LAYER: lambda: Side(lambda x: (dense(x), None), None, tuple(dense.parameters())),
        KERNEL: lambda: dense_by_kernel(dense, shape.tokens, backend),
    }
    for side, implementation in zip(TRANSFORMERS, IMPLEMENTATIONS, strict=True):
        makers[side] = partial(transformers_side, ours, shape, implementation)
    return {name: makers[name]() for name in names}


def our_layer(shape: Shape, backend: str | None) -> MoELayer:
    """Return our layer of a shape: token choice, renormalised weights, raw ones for a single choice."""
    weights: Any = "raw" if shape.num_selected == 1 else "renormalised"
    _, width, expert_width, num_experts, num_selected = shape
    return MoELayer(width, num_experts, num_selected, expert_width, weights=weights, backend=backend)


def _by_linear(dense: MLP, x: Tensor) -> tuple[Tensor, None]:
    """Return the dense layer's output as torch alone computes it."""
    return F.linear(activate(dense.activation, F.linear(x, dense.w_in)), dense.w_down), None


def _ours(layer: MoELayer) -> Side:
    def loss(seen: Stats) -> Tensor:
        return balance_loss(seen)

    return Side(layer, loss, tuple(layer.parameters()))


def dense_by_kernel(dense: MLP, tokens: int, backend: str | None) -> Side:
    """Return the dense layer computed by our expert kernel: one expert that every token goes to."""
    w_in, w_down = (nn.Parameter(weight.detach()[None].clone()) for weight in (dense.w_in, dense.w_down))
    rows = torch.arange(tokens)
    plan = DispatchPlan(rows, torch.tensor([tokens]), rows.unsqueeze(-1), all_kept=True)
    ones = torch.ones(tokens, 1)

    def layer(x: Tensor) -> tuple[Tensor, None]:
        return expert_mlp(x, plan, ones, ExpertWeights(w_in, w_down, dense.activation), backend), None

    return Side(layer, None, (w_in, w_down))


def transformers_side(ours: MoELayer, shape: Shape, implementation: str) -> Side:
    """Return transformers' layer in one implementation, with our layer's weights."""
    theirs = TransformersLayer(shape, implementation).to(ours.router.weight.dtype)
    experts: Any = ours.experts
    with torch.no_grad():
        theirs.router.copy_(ours.router.weight)
        theirs.experts.get_parameter("gate_up_proj").copy_(experts.w_in)
        theirs.experts.get_parameter("down_proj").copy_(experts.w_down)
    return Side(theirs, switch_balance, tuple(theirs.parameters()))
