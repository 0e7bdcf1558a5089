"""Layout: from an Assignment to a DispatchPlan, with or without capacity."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.kernels import DispatchPlan
from gatewright.parts.capacity import Order, expert_capacity
from gatewright.parts.groups import group_ids, num_groups
from gatewright.parts.routing import Assignment

__all__ = ["count_assignments", "expert_capacity", "made_choices", "make_plan", "queue_positions"]


def made_choices(assignment: Assignment) -> Bool[Tensor, "T K"]:
    """Return which places name an expert that is to be computed: neither empty nor withdrawn."""
    made = assignment.experts >= 0
    return made if assignment.withdrawn is None else made & ~assignment.withdrawn


def queue_positions(
    assignment: Assignment, group_size: int | None = None, order: Order = "position"
) -> Int64[Tensor, "T K"]:
    """Return how many choices of the same expert and routing group stand before each, [T, K] int64.

    `order` as in `Capacity`. Withdrawn choices stand in the queue; what stands at empty places means
    nothing.
    """
    num_tokens, places = assignment.experts.shape
    flat = assignment.experts.reshape(-1)
    device = flat.device
    groups = group_ids(num_tokens, group_size, device).repeat_interleave(places)
    last = num_groups(num_tokens, group_size) * assignment.num_experts
    keys = torch.where(flat < 0, last, groups * assignment.num_experts + flat)
    sequence = torch.arange(flat.shape[0], device=device).view(num_tokens, places)
    if order == "batch_priority" and places:
        highest = assignment.weights.detach().amax(dim=1)
        sequence = sequence[torch.sort(highest, descending=True, stable=True).indices]
    if order != "position":
        sequence = sequence.t()
    sequence = sequence.reshape(-1)
    ordered, queue = torch.sort(keys[sequence], stable=True)
    lengths = torch.bincount(keys, minlength=last + 1)
    starts = lengths.cumsum(0) - lengths
    positions = torch.empty_like(flat)
    positions[sequence[queue]] = torch.arange(flat.shape[0], device=device) - starts[ordered]
    return positions.view(num_tokens, places)


def make_plan(
    assignment: Assignment,
    capacity: int | Int64[Tensor, "G"] | None = None,
    *,
    group_size: int | None = None,
    order: Order = "position",
    static: bool = False,
) -> DispatchPlan:
    """Return both views of who is computed where; stable sorts, so rows stay in position order inside an
    expert.

    Position order counts token by token and, inside a token, by rank. With `capacity` C, or C per group [G],
    an expert's assignments beyond its first C of a group in `order` are dropped: their slot is -1. None is
    dropless. `static` keeps a row for every place, the dropped and empty ones behind the last expert's, so
    that no shape depends on the numbers (for compile, export and recomputation).
    """
    num_tokens, num_selected = assignment.experts.shape
    num_experts = assignment.num_experts
    flat = assignment.experts.reshape(-1)
    made = made_choices(assignment)
    if capacity is not None:
        limit: int | Tensor = capacity
        if isinstance(capacity, Tensor):
            limit = capacity[group_ids(num_tokens, group_size, flat.device)].unsqueeze(-1)
        made = made & (queue_positions(assignment, group_size, order) < limit)
    # Empty and dropped places sort behind the last expert.
    keys = torch.where(made.reshape(-1), flat, num_experts)
    sorted_keys, order_of_rows = torch.sort(keys, stable=True)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    kept = sorted_keys < num_experts
    all_kept = not static and bool(kept.all())
    slots = torch.full_like(flat, -1)
    if static:
        rows = torch.arange(flat.shape[0], device=flat.device)
        slots[order_of_rows] = torch.where(kept, rows, -1)
    else:
        if not all_kept:
            order_of_rows = order_of_rows[kept]
        slots[order_of_rows] = torch.arange(order_of_rows.shape[0], device=flat.device)
    return DispatchPlan(
        token_ids=torch.div(order_of_rows, max(num_selected, 1), rounding_mode="floor"),
        counts=counts,
        slots=slots.view(num_tokens, num_selected),
        all_kept=all_kept,
        weight_side=assignment.weight_side,
    )


def count_assignments(assignment: Assignment) -> Int64[Tensor, "E"]:
    """Return assignments per expert before capacity, [E] int64; empty and withdrawn places are not
    counted.
    """
    flat = torch.where(made_choices(assignment), assignment.experts, -1).reshape(-1)
    return torch.bincount(flat + 1, minlength=assignment.num_experts + 1)[1:]
