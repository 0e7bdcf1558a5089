"""No-token-left-behind: choices that found no room go to the next best expert that has some."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Int64
from torch import Tensor

from gatewright.parts.capacity import Order
from gatewright.parts.dispatch import made_choices, queue_positions
from gatewright.parts.groups import group_ids, num_groups
from gatewright.parts.router import Routed


def reroute(routed: Routed, limit: int | Int64[Tensor, "G"], group_size: int | None, order: Order) -> Routed:
    """Return the same tokens with every choice beyond capacity sent to the best expert, by score, that the
    token has not tried; again and again, until it finds room or all experts are tried.

    Equation: Switch Transformer appendix B. Who has room keeps it; within a round `order` decides. A moved
    choice weighs the score of its new expert; one that never finds room stays at the last expert it tried,
    beyond its capacity, and is dropped there.
    """
    assignment, scores = routed.assignment, routed.scores.detach()
    num_tokens, num_experts = assignment.num_tokens, assignment.num_experts
    made = made_choices(assignment)
    groups = group_ids(num_tokens, group_size, scores.device).unsqueeze(-1)
    bins = num_groups(num_tokens, group_size) * num_experts
    room = limit[groups] if isinstance(limit, Tensor) else limit
    experts = assignment.experts
    held = made & (queue_positions(assignment, group_size, order) < room)
    start = experts
    tried = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=scores.device)
    tried.scatter_(1, torch.where(made, experts, num_experts), True)
    tried = tried[:, :num_experts]
    for _ in range(num_experts - 1):
        if not torch.compiler.is_compiling() and not bool((made & ~held).any() & ~tried.all()):
            break
        for rank in range(assignment.num_selected):
            waiting = made[:, rank] & ~held[:, rank] & ~tried.all(dim=1)
            best = torch.where(tried, -torch.inf, scores).argmax(dim=1)
            column = torch.where(waiting, best, -1).unsqueeze(-1)
            tried = tried.scatter(1, best.unsqueeze(-1), tried.gather(1, best.unsqueeze(-1)) | (column >= 0))
            keys = torch.where(held, groups * num_experts + experts, bins).reshape(-1)
            used = torch.bincount(keys, minlength=bins + 1)
            trial = dataclasses.replace(
                assignment, experts=column, weights=assignment.weights[:, rank : rank + 1], withdrawn=None
            )
            ahead = used[groups * num_experts + column.clamp(min=0)]
            fits = (column >= 0) & (ahead + queue_positions(trial, group_size, order) < room)
            position = torch.arange(experts.shape[1], device=experts.device) == rank
            experts = torch.where(position & (column >= 0), column, experts)
            held = held | (position & fits)
    moved = made & (experts != start)
    weights = torch.where(moved, routed.scores.gather(1, experts.clamp(min=0)), assignment.weights)
    return dataclasses.replace(
        routed, assignment=dataclasses.replace(assignment, experts=experts, weights=weights)
    )
