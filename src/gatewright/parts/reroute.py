"""No-token-left-behind: choices that found no room go to the next best expert that has some."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.parts.capacity import Order
from gatewright.parts.dispatch import choice_queues, highest_weights, made_choices, queue_positions
from gatewright.parts.groups import count_into, group_ids
from gatewright.parts.router import Routed
from gatewright.parts.routing import Assignment


def reroute(
    routed: Routed, limit: int | Int64[Tensor, "G"], group_size: int | None, order: Order
) -> tuple[Assignment, Bool[Tensor, "T K"]]:
    """Return the assignment in which every choice beyond capacity went on to the best expert, by score, that
    its token had not tried, round by round, until it found room or no expert was left; and who has a place.

    Equation: Switch Transformer appendix B. Who has a place keeps it. In a round a token's waiting choices
    take its best untried experts by rank, and all of them queue in `order` behind those who came before. A
    moved choice weighs w s' / s, with s the score of the expert it chose and s' that of the one it went to:
    the score itself for raw weights, and under the same divisor for renormalised ones. A choice that never
    finds room stays as it was, without a place. Withdrawn choices take theirs and never move.
    """
    assignment = routed.assignment
    made, experts = made_choices(assignment), assignment.experts
    limits: int | Tensor = limit
    if isinstance(limit, Tensor):
        group = group_ids(assignment.num_tokens, group_size, limit.device)
        limits = limit.index_select(0, group).unsqueeze(-1)
    kept = made & (queue_positions(assignment, group_size, order) < limits)
    untried = _untried(routed.scores.detach(), experts, made)
    queues, last = choice_queues(experts, assignment.num_experts, group_size)
    came = count_into(queues.reshape(-1), last + 1)
    priority = highest_weights(assignment).unsqueeze(-1).expand_as(experts)
    for _ in range(assignment.num_experts - 1):
        target, untried = _next_best(untried, made & ~kept)
        if not torch.compiler.is_compiling() and not bool((target >= 0).any()):
            break
        round_ = Assignment(target, priority, assignment.num_experts)
        queues, _ = choice_queues(target, assignment.num_experts, group_size)
        ahead = came[queues] + queue_positions(round_, group_size, order)
        found = (target >= 0) & (ahead < limits)
        experts = torch.where(found, target, experts)
        kept = kept | found
        came = came + count_into(queues.reshape(-1), last + 1)
    weights = torch.where(experts != assignment.experts, _moved_weights(routed, experts), assignment.weights)
    return dataclasses.replace(assignment, experts=experts, weights=weights), kept


def _untried(scores: Tensor, experts: Tensor, made: Tensor) -> Tensor:
    """Return the scores [T, E], -inf for the experts that a token chose itself."""
    num_tokens, num_experts = scores.shape
    tried = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=scores.device)
    tried = tried.scatter_(1, torch.where(made, experts, num_experts), True)[:, :num_experts]
    return torch.where(tried, -torch.inf, scores)


def _next_best(untried: Tensor, waiting: Tensor) -> tuple[Tensor, Tensor]:
    """Return the expert that each waiting choice [T, K] goes to, -1 where none is left; and the scores [T, E]
    with -inf for those experts too.
    """
    rows, left, asking = None, untried, waiting
    if not torch.compiler.is_compiling():
        rows = waiting.any(dim=1).nonzero().squeeze(-1)
        left, asking = untried.index_select(0, rows), waiting.index_select(0, rows)
    targets = []
    for asks in asking.unbind(dim=1):
        best = left.argmax(dim=1, keepdim=True)
        score = left.gather(1, best)
        goes = asks.unsqueeze(-1) & (score > -torch.inf)
        targets.append(torch.where(goes, best, -1))
        left = left.scatter(1, best, torch.where(goes, -torch.inf, score))
    target = torch.cat(targets, dim=1)
    if rows is None:
        return target, left
    everywhere = torch.full(waiting.shape, -1, dtype=torch.int64, device=waiting.device)
    return everywhere.index_copy_(0, rows, target), untried.index_copy(0, rows, left)


def _moved_weights(routed: Routed, experts: Tensor) -> Tensor:
    """Return w s' / s [T, K]; s' itself where s is 0."""
    chosen = routed.scores.gather(1, routed.assignment.experts.clamp(min=0))
    found = routed.scores.gather(1, experts.clamp(min=0))
    nothing = chosen == 0
    # The quotient comes first: it is exactly 1 for raw weights.
    divisor = routed.assignment.weights / torch.where(nothing, 1, chosen)
    return torch.where(nothing, 1, divisor) * found
