"""Reduce one call of a MoE layer to its sufficient statistics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.kernels import DispatchPlan
from gatewright.parts.dispatch import made_choices
from gatewright.parts.groups import count_into, group_ids, num_groups, to_groups, tokens_of_groups
from gatewright.parts.router import Routed
from gatewright.parts.routing import Assignment
from gatewright.parts.stats import RouterStats


def _counts(assignment: Assignment, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return assignments per group and expert, and those of first choices alone, [G, E] int64 each."""
    num_experts = assignment.num_experts
    count = num_groups(assignment.num_tokens, group_size)
    bins = assignment.experts
    if count > 1:
        bins = group_ids(assignment.num_tokens, group_size, bins.device).unsqueeze(-1) * num_experts + bins
    last = count * num_experts
    bins = torch.where(made_choices(assignment), bins, last)
    first = count_into(bins[:, :1].reshape(-1), last + 1)
    # The first choices are counted once: they are half of all, or all.
    later = bins[:, 1:]
    made = first if not later.shape[1] else first + count_into(later.reshape(-1), last + 1)
    return made[:last].view(count, num_experts), first[:last].view(count, num_experts)


def record_call(
    routed: Routed,
    plan: DispatchPlan,
    mask: Bool[Tensor, "T"] | None,
    group_size: int | None,
    capture: bool,
    sent: Assignment | None = None,
) -> RouterStats:
    """Return the RouterStats of one call; `group_size` is that of the groups that Stats tell apart, `sent`
    the assignment that the plan was made of, if it is not the router's own (`reroute`): the counts are what
    the router chose, what is kept is what was sent.
    """
    logits, assignment = routed.logits, routed.assignment
    sent = assignment if sent is None else sent
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(wide), dim=-1)
    # Not from lse: a lone -inf among the logits vanishes there. And isfinite().all() takes 20 times as long.
    finite = torch.isfinite(logits.detach().abs().amax(dim=-1))
    shares = routed.probabilities.to(wide)
    if mask is not None:
        shares = torch.where(mask.unsqueeze(-1), shares, 0)
        lse = torch.where(mask, lse, 0)
    group_tokens = tokens_of_groups(mask, assignment.num_tokens, group_size, logits.device)
    group_counts, group_first_counts = _counts(assignment, group_size)
    group_score_sums = to_groups(shares, group_size).sum(dim=1)
    held = plan.slots >= 0
    dropped = unrouted = torch.zeros((), dtype=torch.int64, device=logits.device)
    if not plan.all_kept:
        dropped = (made_choices(assignment) & ~held).sum(dim=0)
        unrouted = _unrouted(held, mask)
    return RouterStats(
        num_selected=assignment.num_selected,
        tokens=_total(group_tokens),
        counts=_total(group_counts),
        kept=plan.counts,
        dropped_by_rank=dropped.expand(assignment.num_selected),
        unrouted=unrouted,
        score_sums=_total(group_score_sums),
        logsumexp_sum=lse.sum(),
        logsumexp_square_sum=(lse * lse).sum(),
        nonfinite=(~finite).sum(),
        first_counts=_total(group_first_counts),
        group_tokens=group_tokens,
        group_counts=group_counts,
        group_first_counts=group_first_counts,
        group_score_sums=group_score_sums,
        sums=dict(assignment.sums),
        logits=logits.detach() if capture else None,
        scores=routed.scores.detach() if capture else None,
        experts=torch.where(held, sent.experts, -1) if capture else None,
        combine_weights=sent.weights.detach() if capture else None,
    )


def _total(of_groups: Tensor) -> Tensor:
    """Return the sum over groups."""
    return of_groups[0] if of_groups.shape[0] == 1 else of_groups.sum(dim=0)


def _unrouted(held: Bool[Tensor, "T K"], mask: Bool[Tensor, "T"] | None) -> Int64[Tensor, ""]:
    """Return how many real tokens no expert computes: dropped, or chosen by none."""
    alone = ~held.any(dim=1)
    return (alone if mask is None else alone & mask).sum()
