"""Reduce one call of a MoE layer to its sufficient statistics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.kernels import DispatchPlan
from gatewright.parts.dispatch import made_choices
from gatewright.parts.groups import group_ids, num_groups, to_groups, tokens_of_groups
from gatewright.parts.router import Routed
from gatewright.parts.routing import Assignment
from gatewright.parts.stats import RouterStats


def _counts(assignment: Assignment, group_size: int | None, places: int) -> Int64[Tensor, "G E"]:
    """Return assignments per group and expert, [G, E] int64, of each token's first `places` choices."""
    num_experts = assignment.num_experts
    groups = group_ids(assignment.num_tokens, group_size, assignment.experts.device).unsqueeze(-1)
    count = num_groups(assignment.num_tokens, group_size)
    made, experts = made_choices(assignment)[:, :places], assignment.experts[:, :places]
    keys = torch.where(made, groups * num_experts + experts, -1)
    held = torch.bincount(keys.reshape(-1) + 1, minlength=count * num_experts + 1)[1:]
    return held.view(count, num_experts) if places else held.new_zeros(count, num_experts)


def record_call(
    routed: Routed,
    plan: DispatchPlan,
    mask: Bool[Tensor, "T"] | None,
    group_size: int | None,
    capture: bool,
) -> RouterStats:
    """Return the RouterStats of one call; `group_size` is that of the groups that Stats tell apart."""
    logits, assignment = routed.logits, routed.assignment
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(wide), dim=-1)
    # Not from lse: a lone -inf among the logits vanishes there.
    finite = torch.isfinite(logits).all(dim=-1)
    shares = routed.probabilities.to(wide)
    if mask is not None:
        shares = torch.where(mask.unsqueeze(-1), shares, 0)
        lse = torch.where(mask, lse, 0)
    num_tokens, device = assignment.num_tokens, logits.device
    group_tokens = tokens_of_groups(mask, num_tokens, group_size, device)
    group_counts = _counts(assignment, group_size, assignment.num_selected)
    group_first_counts = _counts(assignment, group_size, min(1, assignment.num_selected))
    group_score_sums = to_groups(shares, group_size).sum(dim=1)
    places, held = made_choices(assignment), plan.slots >= 0
    none = torch.zeros((), dtype=torch.int64, device=device)
    return RouterStats(
        num_selected=assignment.num_selected,
        tokens=group_tokens.sum(),
        counts=group_counts.sum(dim=0),
        kept=plan.counts,
        dropped_by_rank=none.expand(places.shape[1]) if plan.all_kept else (places & ~held).sum(dim=0),
        unrouted=none if plan.all_kept else _unrouted(held, mask),
        score_sums=group_score_sums.sum(dim=0),
        logsumexp_sum=lse.sum(),
        logsumexp_square_sum=(lse * lse).sum(),
        nonfinite=(~finite).sum(),
        first_counts=group_first_counts.sum(dim=0),
        group_tokens=group_tokens,
        group_counts=group_counts,
        group_first_counts=group_first_counts,
        group_score_sums=group_score_sums,
        sums=dict(assignment.sums),
        logits=logits.detach() if capture else None,
        scores=routed.scores.detach() if capture else None,
        experts=torch.where(held, assignment.experts, -1) if capture else None,
        combine_weights=assignment.weights.detach() if capture else None,
    )


def _unrouted(held: Bool[Tensor, "T K"], mask: Bool[Tensor, "T"] | None) -> Int64[Tensor, ""]:
    """Return how many real tokens no expert computes: dropped, or chosen by none."""
    alone = ~held.any(dim=1)
    return (alone if mask is None else alone & mask).sum()
