"""Static shapes: every expert has C places, filled or not, and one batched matmul runs over all of them.

Plain operators and autograd throughout, so that compilers and exporters take it as it is; what a shape is
never depends on the numbers. Costs E * C rows: with a capacity about what the dropless form costs, without
one C is T, as in dense evaluation of every expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels.activations import activate
from gatewright.kernels.plan import DispatchPlan, ExpertWeights
from gatewright.kernels.reference import by_row


class Layout(NamedTuple):
    """Where rows stand among E experts of C places each: every place's row and whether it is `filled`
    [E, C]; every slot's expert and place [T, K], expert -1 where it was dropped.
    """

    row: Int64[Tensor, "E C"]
    filled: Bool[Tensor, "E C"]
    expert: Int64[Tensor, "T K"]
    place: Int64[Tensor, "T K"]


def layout(plan: DispatchPlan) -> Layout:
    """Return the plan's static form. Raises: UserError where an expert has more rows than was promised."""
    places = max(plan.num_tokens if plan.capacity is None else plan.capacity, 1)
    # Compiled code may not look.
    if not torch.compiler.is_compiling() and bool((plan.counts > places).any()):
        raise UserError(
            f"an expert has {int(plan.counts.max())} rows, the plan promises {places}; allowed: one row per "
            "token and expert, or the plan's capacity; use the backend 'grouped', or plan with a capacity"
        )
    ends = plan.counts.cumsum(0)
    starts = ends - plan.counts
    place = torch.arange(places, device=ends.device)
    filled = place < plan.counts.unsqueeze(-1)
    kept = plan.slots >= 0
    expert = torch.bucketize(plan.slots, ends, right=True).clamp(max=plan.num_experts - 1)
    return Layout(
        row=torch.where(filled, starts.unsqueeze(-1) + place, 0),
        filled=filled,
        expert=torch.where(kept, expert, -1),
        place=torch.where(kept, plan.slots - starts[expert], 0),
    )


def spread(rows: Float[Tensor, "M A"], where: Layout) -> Float[Tensor, "E C A"]:
    """Return rows [M, A] at their places [E, C, A], zero where none is. Differentiable."""
    # One row of zeros behind the last, so that no rows at all can be spread too.
    source = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
    return F.embedding(torch.where(where.filled, where.row, rows.shape[0]), source)


def combine_places(
    out: Float[Tensor, "E C D"], where: Layout, combine_weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return y [T, D], y_t = sum_k combine_weights[t, k] * out[its place]; a dropped choice adds zero.

    Sums in at least fp32 and returns the dtype of `out`, as `reference.combine` does.
    """
    picked = out[where.expert.clamp(min=0), where.place]
    accumulate = torch.promote_types(out.dtype, torch.float32)
    weighted = picked.to(accumulate) * combine_weights.to(accumulate).unsqueeze(-1)
    return torch.where(where.expert.unsqueeze(-1) >= 0, weighted, 0).sum(dim=1).to(out.dtype)


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, over [E, C, D]; C is the plan's capacity or T."""
    where = layout(plan)
    rows = x.index_select(0, plan.token_ids)
    if plan.weight_side == "input":
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(wide) * by_row(combine_weights.to(wide), plan).unsqueeze(-1)).to(x.dtype)
        combine_weights = torch.ones_like(combine_weights)
    scale = None if hidden_scale is None else spread(hidden_scale, where)
    return combine_places(_blocks(spread(rows, where), weights, scale), where, combine_weights)


def _blocks(block: Tensor, weights: ExpertWeights, scale: Tensor | None) -> Tensor:
    """Return every expert's output for its places, [E, C, D] -> [E, C, D]."""
    pre = torch.bmm(block, weights.w_in.mT)
    if weights.b_in is not None:
        pre = pre + weights.b_in.unsqueeze(1)
    hidden = activate(weights.activation, pre)
    if scale is not None:
        hidden = hidden * scale
    out = torch.bmm(hidden, weights.w_down.mT)
    return out if weights.b_down is None else out + weights.b_down.unsqueeze(1)


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
