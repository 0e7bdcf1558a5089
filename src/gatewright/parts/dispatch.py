"""Layout: from an Assignment to a DispatchPlan, with or without capacity."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan
from gatewright.parts.routing import Assignment


def expert_capacity(capacity_factor: float, num_selected: int, num_tokens: int, num_experts: int) -> int:
    """Return C = ceil(f K T / E), the places of each expert for T tokens.

    Differs: Switch Transformer eq 3 and ST-MoE omit K (for K = 1 the two agree).
    """
    if not (capacity_factor > 0 and math.isfinite(capacity_factor)):
        raise UserError(
            f"capacity_factor {capacity_factor}; allowed: above 0, or none for dropless; 1.0 has no head-room"
        )
    # Read as the decimal that was written: in floats 1.1 * 50 is 55.00000000000001, whose ceiling is 56.
    return math.ceil(Fraction(str(capacity_factor)) * num_selected * num_tokens / num_experts)


def make_plan(assignment: Assignment, capacity: int | None = None) -> DispatchPlan:
    """Return both views of who is computed where; one stable sort, so rows stay in position order inside an
    expert.

    Position order counts token by token and, inside a token, by rank. With `capacity` C, an expert's
    assignments beyond its first C in that order are dropped: their slot is -1. None is dropless.
    """
    num_tokens, num_selected = assignment.experts.shape
    num_experts = assignment.num_experts
    flat = assignment.experts.reshape(-1)
    device = flat.device
    # Empty places sort behind the last expert.
    keys = torch.where(flat < 0, num_experts, flat)
    sorted_keys, order = torch.sort(keys, stable=True)
    with_empty = torch.bincount(keys, minlength=num_experts + 1)
    counts = with_empty[:num_experts]
    kept = sorted_keys < num_experts
    if capacity is not None:
        starts = counts.cumsum(0) - counts
        padded_starts = torch.cat([starts, starts.new_zeros(1)])
        rank_in_expert = torch.arange(flat.shape[0], device=device) - padded_starts[sorted_keys]
        kept = kept & (rank_in_expert < capacity)
        counts = counts.clamp(max=capacity)
    all_kept = bool(kept.all())
    if not all_kept:
        order = order[kept]
    slots = torch.full_like(flat, -1)
    slots[order] = torch.arange(order.shape[0], device=device)
    return DispatchPlan(
        token_ids=torch.div(order, max(num_selected, 1), rounding_mode="floor"),
        counts=counts,
        slots=slots.view(num_tokens, num_selected),
        all_kept=all_kept,
    )


def count_assignments(assignment: Assignment) -> Int64[Tensor, "E"]:
    """Return assignments per expert before capacity, [E] int64; empty places are not counted."""
    flat = assignment.experts.reshape(-1)
    return torch.bincount(flat + 1, minlength=assignment.num_experts + 1)[1:]
