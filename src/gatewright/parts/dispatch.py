"""Layout: from an Assignment to a DispatchPlan, with or without capacity."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.kernels import DispatchPlan
from gatewright.kernels.native.plan import plan_rows
from gatewright.parts.capacity import Order, expert_capacity
from gatewright.parts.groups import count_into, group_ids, num_groups
from gatewright.parts.routing import Assignment

__all__ = ["count_assignments", "expert_capacity", "made_choices", "make_plan", "queue_positions"]

# On a CPU torch counts integer keys from so many on (radix sort), and compares them below: many times slower.
_RADIX = 32768
_WORTH_PADDING = 8192


def made_choices(assignment: Assignment) -> Bool[Tensor, "T K"]:
    """Return which places name an expert that is to be computed: neither empty nor withdrawn."""
    made = assignment.experts >= 0
    return made if assignment.withdrawn is None else made & ~assignment.withdrawn


def _stable_order(keys: Tensor, most: int) -> Tensor:
    """Return the places [N] of keys [N] in 0..most in rising order, equal keys as they stand."""
    size = keys.shape[0]
    if keys.is_cpu and size < _WORTH_PADDING:
        return torch.sort(keys, stable=True).indices
    # A radix sort takes one pass per byte of the key.
    kind = torch.uint8 if most < 2**8 else torch.int16 if most < 2**15 else torch.int32
    if keys.is_cpu and size < _RADIX:
        padded = torch.full((_RADIX,), most, dtype=kind)
        padded[:size] = keys
        return torch.sort(padded, stable=True).indices[:size]
    return torch.sort(keys.to(kind), stable=True).indices


def choice_queues(
    experts: Int64[Tensor, "T K"], num_experts: int, group_size: int | None
) -> tuple[Int64[Tensor, "T K"], int]:
    """Return the queue that each choice stands in, expert * G + group, and E * G, where empty places stand;
    and E * G itself.
    """
    count = num_groups(experts.shape[0], group_size)
    queues = experts
    if count > 1:
        queues = experts * count + group_ids(experts.shape[0], group_size, experts.device).unsqueeze(-1)
    last = num_experts * count
    return torch.where(experts < 0, last, queues), last


def highest_weights(assignment: Assignment) -> Float[Tensor, "T"]:
    """Return the highest weight of each token's choices, [T], -inf for a token without any; no gradient."""
    weights = torch.where(assignment.experts < 0, -torch.inf, assignment.weights.detach())
    return weights.amax(dim=1) if weights.shape[1] else weights.sum(dim=1)


def queue_positions(
    assignment: Assignment, group_size: int | None = None, order: Order = "position"
) -> Int64[Tensor, "T K"]:
    """Return how many choices of the same expert and routing group stand before each, [T, K] int64.

    `order` as in `Capacity`. Withdrawn choices stand in the queue; what stands at empty places means
    nothing.
    """
    num_tokens, places = assignment.experts.shape
    queues, last = choice_queues(assignment.experts, assignment.num_experts, group_size)
    lengths = count_into(queues.reshape(-1), last + 1)
    tokens = None
    if order == "batch_priority":
        tokens = torch.sort(highest_weights(assignment), descending=True, stable=True).indices
        queues = queues.index_select(0, tokens)
    sequence = (queues if order == "position" else queues.t()).reshape(-1)
    starts = lengths.cumsum(0) - lengths
    size = sequence.shape[0]
    ahead = torch.arange(size, device=sequence.device)
    ahead = ahead - torch.repeat_interleave(starts, lengths, output_size=size)
    positions = torch.empty_like(sequence).scatter_(0, _stable_order(sequence, last), ahead)
    if order == "position":
        return positions.view(num_tokens, places)
    positions = positions.view(places, num_tokens).t()
    if tokens is None:
        return positions
    return torch.empty_like(assignment.experts).index_copy_(0, tokens, positions)


def make_plan(
    assignment: Assignment,
    capacity: int | Int64[Tensor, "G"] | None = None,
    *,
    group_size: int | None = None,
    order: Order = "position",
    static: bool = False,
    kept: Bool[Tensor, "T K"] | None = None,
    most: int | None = None,
) -> DispatchPlan:
    """Return both views of who is computed where; stable sorts, so rows stay in position order inside an
    expert.

    Position order counts token by token and, inside a token, by rank. With `capacity` C, or C per group [G],
    an expert's assignments beyond its first C of a group in `order` are dropped: their slot is -1. None is
    dropless. `static` keeps a row for every place, the dropped and empty ones behind the last expert's, so
    that no shape depends on the numbers (for compile, export and recomputation).

    Args: `kept` [T, K] says who has a place where that is decided already (`reroute`); then nobody queues.
    `most` is the largest C of any group, where it is known although `capacity` is a tensor.
    """
    num_tokens, places = assignment.experts.shape
    in_line = not static and kept is None and assignment.withdrawn is None
    if in_line and capacity is None:
        sorted_by_expert = plan_rows(assignment.experts, assignment.num_experts)
        if sorted_by_expert is not None:
            token_ids, counts, slots = sorted_by_expert
            all_kept = token_ids.shape[0] == num_tokens * places
            return DispatchPlan(token_ids, counts, slots, all_kept, assignment.weight_side)
    found = _first_in_line(assignment, capacity, group_size, order) if in_line else None
    if found is None:
        made = made_choices(assignment)
        if kept is not None:
            made = made & kept
        elif capacity is not None:
            room = _room(capacity, num_tokens, group_size)
            made = made & (queue_positions(assignment, group_size, order) < room)
        # Empty and dropped places sort behind the last expert.
        keys = torch.where(made, assignment.experts, assignment.num_experts).reshape(-1)
        counts = count_into(keys, assignment.num_experts + 1)[: assignment.num_experts]
        rows = _stable_order(keys, assignment.num_experts)
        found = (rows if static else rows[: int(counts.sum())]), counts
    rows, counts = found
    slots = torch.full(assignment.experts.shape, -1, device=rows.device).view(-1)
    row = torch.arange(rows.shape[0], device=rows.device)
    slots.scatter_(0, rows, torch.where(row < counts.sum(), row, -1) if static else row)
    bound = capacity if isinstance(capacity, int) else most
    return DispatchPlan(
        token_ids=_token_of(rows, places),
        counts=counts,
        slots=slots.view(num_tokens, places),
        all_kept=not static and rows.shape[0] == num_tokens * places,
        weight_side=assignment.weight_side,
        capacity=None if bound is None else bound * num_groups(num_tokens, group_size),
    )


def _room(capacity: int | Tensor, num_tokens: int, group_size: int | None) -> int | Tensor:
    """Return C as it compares with [T, K]."""
    if not isinstance(capacity, Tensor):
        return capacity
    return capacity.index_select(0, group_ids(num_tokens, group_size, capacity.device)).unsqueeze(-1)


def _first_in_line(
    assignment: Assignment, capacity: int | Tensor | None, group_size: int | None, order: Order
) -> tuple[Tensor, Tensor] | None:
    """Return the places [M] that are kept, by expert, and their counts [E], from one sort alone; None where
    something is dropped and it is not position order that says what.
    """
    num_experts = assignment.num_experts
    queues, last = choice_queues(assignment.experts, num_experts, None if capacity is None else group_size)
    lengths = held = count_into(queues.reshape(-1), last + 1)[:last]
    if capacity is not None:
        held = lengths.clamp(max=capacity if isinstance(capacity, int) else capacity.repeat(num_experts))
    num_held = int(held.sum())
    drops = capacity is not None and num_held < int(lengths.sum())
    if drops and order != "position" and (order != "rank" or assignment.num_selected > 1):
        return None
    # Position order goes through the groups one by one, so an expert's queues stand one behind another.
    rows = _stable_order(queues.reshape(-1), last)
    counts = held if last == num_experts else held.view(num_experts, -1).sum(dim=1)
    if not drops:
        return (rows if num_held == rows.shape[0] else rows[:num_held]), counts
    lost = lengths - held
    skipped = torch.repeat_interleave(lost.cumsum(0) - lost, held, output_size=num_held)
    return rows.index_select(0, torch.arange(num_held, device=rows.device) + skipped), counts


def _token_of(places: Tensor, per_token: int) -> Tensor:
    """Return the token that each flat place [M] belongs to, [M]."""
    if per_token == 1:
        return places
    if per_token.bit_count() == 1:  # shifting takes a fifth of the time of dividing
        return places >> (per_token.bit_length() - 1)
    return places // max(per_token, 1)


def count_assignments(assignment: Assignment) -> Int64[Tensor, "E"]:
    """Return assignments per expert before capacity, [E] int64; empty and withdrawn places are not
    counted.
    """
    queues = torch.where(made_choices(assignment), assignment.experts, assignment.num_experts)
    return count_into(queues.reshape(-1), assignment.num_experts + 1)[: assignment.num_experts]
