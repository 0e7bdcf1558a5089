"""Grouped matmuls with a hand-written backward: gathers in both directions, nothing scattered, little kept.

Why by hand: with the inverse view of the plan, combining and the gradient of dispatching are both a
gather-sum, so no index_add is needed; multiplying the combine weight into the hidden row (not the output row)
gives the weight's gradient from tensors that the backward pass has anyway; and only x and the pre-activations
are kept for the backward pass.

Under torch.compile the same two functions run as one operator that the compiler does not look into:
F.grouped_mm describes itself to it for bf16 only, and the loop beside it looks at the numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatewright.kernels import everyone
from gatewright.kernels.activations import activate, activate_backward
from gatewright.kernels.everyone import is_everyone
from gatewright.kernels.plan import DispatchPlan, ExpertWeights
from gatewright.kernels.rows import (
    by_row,
    by_slot,
    gather_sum,
    outer_by_group,
    owners,
    rows_times_weights,
    sum_by_group,
)


class _Kept(NamedTuple):
    """The tensors that take part, in the order of both operators' arguments."""

    x: Tensor
    combine_weights: Tensor
    w_in: Tensor
    w_down: Tensor
    b_in: Tensor | None
    b_down: Tensor | None
    hidden_scale: Tensor | None


class _Gradients(NamedTuple):
    x: Tensor | None
    combine_weights: Tensor
    w_in: Tensor
    w_down: Tensor
    b_in: Tensor | None
    b_down: Tensor | None


def _forward(kept: _Kept, activation: str, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    """Return y and the pre-activations [M, F or 2F]; the combine weight is folded into the hidden rows."""
    x, weigh_input = kept.x, plan.weight_side == "input"
    rows = x.index_select(0, plan.token_ids)
    row_weights = by_row(kept.combine_weights, plan).to(x.dtype).unsqueeze(-1)
    if weigh_input:
        rows = rows.mul_(row_weights)
    pre = rows_times_weights(rows, kept.w_in.mT, plan.counts)
    if kept.b_in is not None:
        pre += kept.b_in.index_select(0, owners(plan))
    hidden = activate(activation, pre)
    if kept.hidden_scale is not None:
        hidden = hidden * kept.hidden_scale
    if not weigh_input:
        hidden = hidden * row_weights
    out = rows_times_weights(hidden, kept.w_down.mT, plan.counts)
    if kept.b_down is not None:
        bias = kept.b_down.index_select(0, owners(plan))
        out += bias if weigh_input else bias.mul_(row_weights)
    return gather_sum(out, plan), pre


def _backward(
    grad_y: Tensor, pre: Tensor, kept: _Kept, activation: str, plan: DispatchPlan, need_x: bool
) -> _Gradients:
    """Return the gradients; of x only where needed."""
    x, scale, weigh_input = kept.x, kept.hidden_scale, plan.weight_side == "input"
    accumulate = torch.promote_types(x.dtype, torch.float32)
    grad_out = grad_y.contiguous().index_select(0, plan.token_ids)
    row_weights = by_row(kept.combine_weights, plan).to(x.dtype).unsqueeze(-1)
    hidden = activate(activation, pre)
    if scale is not None:
        hidden = hidden * scale
    elif activation == "linear":
        hidden = hidden.clone()  # it is `pre` itself, which a second backward pass may need
    grad_hidden = rows_times_weights(grad_out, kept.w_down, plan.counts)
    if not weigh_input:
        grad_row_weights = (grad_hidden * hidden).sum(dim=-1, dtype=accumulate)
        if kept.b_down is not None:
            bias = kept.b_down.index_select(0, owners(plan))
            grad_row_weights += (grad_out * bias).sum(dim=-1, dtype=accumulate)
        hidden, grad_hidden = hidden.mul_(row_weights), grad_hidden.mul_(row_weights)
    grad_w_down = outer_by_group(grad_out, hidden, plan.counts)
    grad_b_down = None
    if kept.b_down is not None:
        grad_b_down = sum_by_group(grad_out if weigh_input else grad_out * row_weights, plan.counts)
    if scale is not None:
        grad_hidden = grad_hidden.mul_(scale)
    grad_pre = activate_backward(activation, grad_hidden, pre)
    grad_b_in = None if kept.b_in is None else sum_by_group(grad_pre, plan.counts)
    rows = x.index_select(0, plan.token_ids)
    weighed = rows * row_weights if weigh_input else rows
    grad_w_in = outer_by_group(grad_pre, weighed, plan.counts)
    grad_x = None
    if need_x or weigh_input:
        grad_rows = rows_times_weights(grad_pre, kept.w_in, plan.counts)
        if weigh_input:
            grad_row_weights = (grad_rows * rows).sum(dim=-1, dtype=accumulate)
            grad_rows = grad_rows.mul_(row_weights)
        grad_x = gather_sum(grad_rows, plan)
    grad_weights = by_slot(grad_row_weights, plan).to(kept.combine_weights.dtype)
    return _Gradients(grad_x, grad_weights, grad_w_in, grad_w_down, grad_b_in, grad_b_down)


class _GroupedExperts(torch.autograd.Function):
    """y = combine(FFN(x[token_ids]))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        combine_weights: Tensor,
        w_in: Tensor,
        w_down: Tensor,
        b_in: Tensor | None,
        b_down: Tensor | None,
        hidden_scale: Tensor | None,
        activation: str,
        plan: DispatchPlan,
    ) -> Tensor:
        kept = _Kept(x, combine_weights, w_in, w_down, b_in, b_down, hidden_scale)
        y, pre = _forward(kept, activation, plan)
        ctx.save_for_backward(pre, *kept)
        ctx.activation, ctx.plan = activation, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        pre, *kept = ctx.saved_tensors
        found = _backward(grad_y, pre, _Kept(*kept), ctx.activation, ctx.plan, ctx.needs_input_grad[0])
        return *found, None, None, None


_TENSORS = (
    "Tensor x, Tensor combine_weights, Tensor w_in, Tensor w_down, Tensor? b_in, Tensor? b_down, "
    "Tensor? hidden_scale, Tensor token_ids, Tensor counts, Tensor slots, "
    "bool all_kept, str activation, str weight_side"
)
_FORWARD, _BACKWARD = "gatewright::grouped_experts", "gatewright::grouped_experts_backward"


def _unpack(given: tuple[Any, ...]) -> tuple[_Kept, str, DispatchPlan]:
    token_ids, counts, slots, all_kept, activation, weight_side = given[7:]
    return _Kept(*given[:7]), activation, DispatchPlan(token_ids, counts, slots, all_kept, weight_side)


def _compiled_forward(*given: Any) -> tuple[Tensor, Tensor]:
    y, pre = _forward(*_unpack(given))
    # F.grouped_mm pads the rows of what it returns to 16 bytes; the compiler was told that they are not.
    return y, pre.contiguous()


def _compiled_backward(grad_y: Tensor, pre: Tensor, need_x: bool, *given: Any) -> tuple[Tensor, ...]:
    found = _backward(grad_y, pre, *_unpack(given), need_x=need_x)
    # An operator cannot return None: what is not there is an empty tensor.
    return tuple(pre.new_empty(0) if grad is None else grad.contiguous() for grad in found)


def _shape_of_forward(*given: Any) -> tuple[Tensor, Tensor]:
    x, w_in, token_ids = given[0], given[2], given[7]
    return torch.empty_like(x), x.new_empty(token_ids.shape[0], w_in.shape[1])


def _shape_of_backward(grad_y: Tensor, pre: Tensor, need_x: bool, *given: Any) -> tuple[Tensor, ...]:
    present = (need_x or given[12] == "input", True, True, True, given[4] is not None, given[5] is not None)
    return tuple(
        torch.empty_like(one, memory_format=torch.contiguous_format) if here else pre.new_empty(0)
        for one, here in zip(given[:6], present, strict=True)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:10])
    ctx.words = inputs[10:]


def _differentiate(ctx: Any, grad_y: Tensor, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    pre, *given = ctx.saved_tensors
    found = torch.ops.gatewright.grouped_experts_backward(
        grad_y, pre, ctx.needs_input_grad[0], *given, *ctx.words
    )
    there = [given[i] is not None and ctx.needs_input_grad[i] for i in range(6)]
    return *(grad if here else None for grad, here in zip(found, there, strict=True)), *[None] * 7


if not hasattr(torch.ops.gatewright, "grouped_experts"):
    torch.library.define(_FORWARD, f"({_TENSORS}) -> (Tensor, Tensor)")
    torch.library.impl(_FORWARD, "CompositeExplicitAutograd", _compiled_forward)
    torch.library.register_fake(_FORWARD, _shape_of_forward)
    torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_keep)
    torch.library.define(
        _BACKWARD,
        f"(Tensor grad_y, Tensor pre, bool need_x, {_TENSORS}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.impl(_BACKWARD, "CompositeExplicitAutograd", _compiled_backward)
    torch.library.register_fake(_BACKWARD, _shape_of_backward)


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, by grouped matmuls. Once differentiable."""
    if hidden_scale is None and is_everyone(plan):
        return everyone.expert_mlp(x, plan, combine_weights, weights)
    w = weights
    tensors = (x, combine_weights, w.w_in, w.w_down, w.b_in, w.b_down, hidden_scale)
    if torch.compiler.is_compiling():
        views = plan.token_ids, plan.counts, plan.slots, plan.all_kept
        y, _ = torch.ops.gatewright.grouped_experts(*tensors, *views, w.activation, plan.weight_side)
    else:
        y = _GroupedExperts.apply(*tensors, w.activation, plan)
    out: Tensor = y
    return out


def expert_mlp_sorted(
    rows: Float[Tensor, "M D"],
    counts: Int64[Tensor, "E"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "M D"]:
    """Return each sorted row's expert output [M, D]; `counts` [E] rows per expert, summing to M."""
    order = torch.arange(rows.shape[0], device=rows.device)
    plan = DispatchPlan(token_ids=order, counts=counts, slots=order.unsqueeze(-1), all_kept=True)
    ones = torch.ones(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    return expert_mlp(rows, plan, ones, weights, hidden_scale)
