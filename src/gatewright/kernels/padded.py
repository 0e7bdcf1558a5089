"""Static shapes: every expert has C places, filled or not, and one batched matmul runs over all of them.

Plain operators and autograd throughout, so that compilers and exporters take it as it is; what a shape is
never depends on the numbers. Costs E * C rows: with a capacity about what the dropless form costs, without
one C is T, as in dense evaluation of every expert.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels.activations import activate
from gatewright.kernels.plan import DispatchPlan, ExpertWeights
from gatewright.kernels.reference import by_row, combine


def _places(plan: DispatchPlan) -> int:
    """Return C, the rows that an expert can hold. Raises: UserError where a plan breaks its promise."""
    places = plan.num_tokens if plan.capacity is None else min(plan.capacity, plan.token_ids.shape[0])
    # Compiled code may not look.
    if not torch.compiler.is_compiling() and bool((plan.counts > places).any()):
        raise UserError(
            f"an expert has {int(plan.counts.max())} rows, the plan promises {places}; allowed: one row per "
            "token and expert, or the plan's capacity; use the backend 'grouped', or plan with a capacity"
        )
    return places


def layout(
    plan: DispatchPlan,
) -> tuple[Int64[Tensor, "E C"], Bool[Tensor, "E C"], Int64[Tensor, "T K"]]:
    """Return each place's sorted row [E, C], whether it is filled, and each slot's place [T, K]."""
    places, device = _places(plan), plan.counts.device
    starts = plan.counts.cumsum(0) - plan.counts
    position = torch.arange(places, device=device)
    filled = position < plan.counts.unsqueeze(-1)
    row_of_place = torch.where(filled, starts.unsqueeze(-1) + position, 0)
    owner = torch.bucketize(plan.slots, plan.counts.cumsum(0), right=True).clamp(max=plan.num_experts - 1)
    place_of_slot = owner * places + plan.slots - starts[owner]
    return row_of_place, filled, torch.where(plan.slots < 0, -1, place_of_slot)


def spread(
    rows: Float[Tensor, "M A"], row_of_place: Int64[Tensor, "E C"], filled: Bool[Tensor, "E C"]
) -> Float[Tensor, "E C A"]:
    """Return rows [M, A] at their places [E, C, A], zero where none is."""
    # One row of zeros behind the last, so that no rows at all can be spread too.
    source = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
    picked = source.index_select(0, torch.where(filled, row_of_place, rows.shape[0]).reshape(-1))
    return picked.view(*filled.shape, rows.shape[-1])


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, over [E, C, D]; C is the plan's capacity or T."""
    row_of_place, filled, place_of_slot = layout(plan)
    rows = x.index_select(0, plan.token_ids)
    if plan.weight_side == "input":
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(wide) * by_row(combine_weights.to(wide), plan).unsqueeze(-1)).to(x.dtype)
        combine_weights = torch.ones_like(combine_weights)
    scale = None if hidden_scale is None else spread(hidden_scale, row_of_place, filled)
    out = _blocks(spread(rows, row_of_place, filled), weights, scale)
    return combine_places(out, place_of_slot, combine_weights)


def combine_places(
    out: Float[Tensor, "E C D"], place_of_slot: Int64[Tensor, "T K"], combine_weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return y [T, D], y_t = sum_k combine_weights[t, k] * out[place_of_slot[t, k]], as `combine` sums."""
    counts = place_of_slot.new_full((out.shape[0],), out.shape[1])
    rows = torch.arange(out.shape[0] * out.shape[1], device=out.device)
    return combine(out.flatten(0, 1), DispatchPlan(rows, counts, place_of_slot, False), combine_weights)


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
