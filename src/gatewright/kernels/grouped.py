"""Grouped matmuls with a hand-written backward: gathers in both directions, nothing scattered, little kept.

Why by hand: with the inverse view of the plan, combining and the gradient of dispatching are both a
gather-sum, so no index_add is needed; multiplying the combine weight into the hidden row (not the output row)
gives the weight's gradient from tensors that the backward pass has anyway; and only x and the pre-activations
are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatewright.kernels.activations import activate, activate_backward
from gatewright.kernels.plan import DispatchPlan, ExpertWeights

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _aligned(*tensors: Tensor) -> bool:
    """Whether F.grouped_mm takes these: a dtype it knows, and row strides that are multiples of 16 bytes."""
    return all(t.dtype in _GROUPED_DTYPES and t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


def _rows_times_weights(
    rows: Float[Tensor, "M A"], weights: Float[Tensor, "E A B"], counts: Int64[Tensor, "E"]
) -> Float[Tensor, "M B"]:
    """Return rows [M, A] times weights [E, A, B] by group -> [M, B]; `weights` may be a transposed view."""
    offsets = counts.cumsum(0, dtype=torch.int32)
    stored = weights if weights.is_contiguous() else weights.mT
    if rows.shape[0] and _aligned(rows, stored):
        return F.grouped_mm(rows, weights, offs=offsets)
    out = rows.new_empty(rows.shape[0], weights.shape[-1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weights[e], out=out[start:end])
        start = end
    return out


def _outer_by_group(
    left: Float[Tensor, "M A"], right: Float[Tensor, "M B"], counts: Int64[Tensor, "E"]
) -> Float[Tensor, "E A B"]:
    """Return left[group].T @ right[group] -> [E, A, B] for left [M, A], right [M, B]: the weights'
    gradient.
    """
    offsets = counts.cumsum(0, dtype=torch.int32)
    if left.shape[0] and _aligned(left, right):
        return F.grouped_mm(left.t(), right, offs=offsets)
    out = left.new_zeros(counts.shape[0], left.shape[1], right.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=out[e])
        start = end
    return out


def _gather_sum(rows: Float[Tensor, "M D"], plan: DispatchPlan) -> Float[Tensor, "T D"]:
    """Return sum_k rows[slots[t, k]] -> [T, D], dropped slots adding nothing; sums in at least fp32."""
    num_tokens, num_selected = plan.slots.shape
    if num_tokens == 0 or rows.shape[0] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1])
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    slots = plan.slots
    if not plan.all_kept:
        wide = torch.cat([wide, wide.new_zeros(1, wide.shape[1])])
        slots = torch.where(slots < 0, rows.shape[0], slots)
    if num_selected == 1:
        return wide.index_select(0, slots.view(-1)).to(rows.dtype)
    return F.embedding_bag(slots, wide, mode="sum").to(rows.dtype)


def _by_row(values: Float[Tensor, "T K"], plan: DispatchPlan) -> Float[Tensor, "M"]:
    """Return values [T, K] in sorted-row order, [M]."""
    flat = plan.slots.reshape(-1)
    out = values.new_empty(plan.token_ids.shape[0])
    if plan.all_kept:
        out[flat] = values.reshape(-1)
        return out
    kept = flat >= 0
    out[flat[kept]] = values.reshape(-1)[kept]
    return out


def _by_slot(values: Float[Tensor, "M"], plan: DispatchPlan) -> Float[Tensor, "T K"]:
    """Return values [M] at their [T, K] slots, zero where dropped."""
    if plan.all_kept:
        return values.index_select(0, plan.slots.reshape(-1)).view_as(plan.slots)
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[torch.where(plan.slots < 0, values.shape[0], plan.slots)]


class _GroupedExperts(torch.autograd.Function):
    """y = combine(FFN(x[token_ids])) with the combine weight folded into the hidden rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        combine_weights: Tensor,
        w_in: Tensor,
        w_down: Tensor,
        activation: str,
        plan: DispatchPlan,
    ) -> Tensor:
        rows = x.index_select(0, plan.token_ids)
        pre = _rows_times_weights(rows, w_in.mT, plan.counts)
        row_weights = _by_row(combine_weights, plan).to(x.dtype)
        hidden = activate(activation, pre) * row_weights.unsqueeze(-1)
        out = _rows_times_weights(hidden, w_down.mT, plan.counts)
        ctx.save_for_backward(x, combine_weights, w_in, w_down, pre)
        ctx.activation, ctx.plan = activation, plan
        return _gather_sum(out, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, combine_weights, w_in, w_down, pre = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        grad_out = grad_y.contiguous().index_select(0, plan.token_ids)
        row_weights = _by_row(combine_weights, plan).to(x.dtype).unsqueeze(-1)
        hidden = activate(ctx.activation, pre)
        grad_hidden = _rows_times_weights(grad_out, w_down, plan.counts)
        accumulate = torch.promote_types(x.dtype, torch.float32)
        grad_row_weights = (grad_hidden * hidden).sum(dim=-1, dtype=accumulate)
        grad_w_down = _outer_by_group(grad_out, hidden.mul_(row_weights), plan.counts)
        grad_pre = activate_backward(ctx.activation, grad_hidden.mul_(row_weights), pre)
        grad_w_in = _outer_by_group(grad_pre, x.index_select(0, plan.token_ids), plan.counts)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _gather_sum(_rows_times_weights(grad_pre, w_in, plan.counts), plan)
        grad_weights = _by_slot(grad_row_weights, plan).to(combine_weights.dtype)
        return grad_x, grad_weights, grad_w_in, grad_w_down, None, None


def expert_mlp(
    x: Float[Tensor, "T D"], plan: DispatchPlan, combine_weights: Float[Tensor, "T K"], weights: ExpertWeights
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, by grouped matmuls. Once differentiable."""
    out: Tensor = _GroupedExperts.apply(
        x, combine_weights, weights.w_in, weights.w_down, weights.activation, plan
    )
    return out


def expert_mlp_sorted(
    rows: Float[Tensor, "M D"], counts: Int64[Tensor, "E"], weights: ExpertWeights
) -> Float[Tensor, "M D"]:
    """Return each sorted row's expert output [M, D]; `counts` [E] rows per expert, summing to M."""
    order = torch.arange(rows.shape[0], device=rows.device)
    plan = DispatchPlan(token_ids=order, counts=counts, slots=order.unsqueeze(-1), all_kept=True)
    ones = torch.ones(rows.shape[0], 1, dtype=rows.dtype, device=rows.device)
    return expert_mlp(rows, plan, ones, weights)
