"""One linear map per expert over sorted rows, with gradients: for experts whose middle is not one of ours.

An operator that compilers do not look into, for the reasons that `grouped` gives.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.kernels.rows import outer_by_group, rows_times_weights

_FORWARD, _BACKWARD = "gatewright::linear_by_group", "gatewright::linear_by_group_backward"


def linear_by_group(
    rows: Float[Tensor, "M A"], weights: Float[Tensor, "E B A"], counts: Int64[Tensor, "E"]
) -> Float[Tensor, "M B"]:
    """Return rows [M, A] through their experts' matrices [E, B, A], by grouped matmuls -> [M, B]; `counts`
    [E] rows per expert. `weights` may be a transposed view: nothing is copied.

    Rows behind the last expert's hold anything, in the output and in the gradient of `rows`, and are not
    read. Once differentiable.
    """
    found: Tensor = torch.ops.gatewright.linear_by_group(rows, weights, counts)
    return found


def _forward(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    return rows_times_weights(rows, weights.mT, counts).contiguous()


def _backward(
    grad: Tensor, rows: Tensor, weights: Tensor, counts: Tensor, need_rows: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    # An operator cannot return None: what is not asked for is an empty tensor.
    grad, nothing = grad.contiguous(), grad.new_empty(0)
    of_rows = rows_times_weights(grad, weights, counts).contiguous() if need_rows else nothing
    if not need_weights:
        return of_rows, nothing
    rows = rows.contiguous()
    if weights.is_contiguous():
        return of_rows, outer_by_group(grad, rows, counts).contiguous()
    # Laid out as the weights are, so that nobody has to copy it to add it up.
    return of_rows, outer_by_group(rows, grad, counts).contiguous().mT


def _shape_of_forward(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


def _shape_of_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, counts: Tensor, need_rows: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    of_rows = grad.new_empty(rows.shape if need_rows else (0,))
    if not need_weights:
        return of_rows, grad.new_empty(0)
    if weights.is_contiguous():
        return of_rows, grad.new_empty(weights.shape)
    return of_rows, grad.new_empty(weights.mT.shape).mT


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    need_rows, need_weights, _ = ctx.needs_input_grad
    of_rows, of_weights = torch.ops.gatewright.linear_by_group_backward(
        grad, *ctx.saved_tensors, need_rows, need_weights
    )
    return of_rows if need_rows else None, of_weights if need_weights else None, None


if not hasattr(torch.ops.gatewright, "linear_by_group"):
    torch.library.define(_FORWARD, "(Tensor rows, Tensor weights, Tensor counts) -> Tensor")
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _forward)
    torch.library.register_fake(_FORWARD, _shape_of_forward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_keep)
    torch.library.define(
        _BACKWARD,
        "(Tensor grad, Tensor rows, Tensor weights, Tensor counts, bool need_rows, bool need_weights) -> "
        "(Tensor, Tensor)",
    )
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _backward)
    torch.library.register_fake(_BACKWARD, _shape_of_backward)
