"""Reduce one call of a MoE layer to its sufficient statistics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from gatewright.kernels import DispatchPlan, FusedRoute
from gatewright.parts.dispatch import made_choices
from gatewright.parts.groups import count_into, group_ids, num_groups, to_groups, tokens_of_groups
from gatewright.parts.router import Routed
from gatewright.parts.routing import Assignment
from gatewright.parts.stats import RouterStats


def _counts(
    assignment: Assignment, made: Tensor, group_size: int | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return assignments per group and expert, and those of first choices alone, [G, E] int64 each.

    `known`: the first of the two, [E], if the plan has counted it already; of use where all is one group.
    """
    num_experts = assignment.num_experts
    count = num_groups(assignment.num_tokens, group_size)
    known = None if known is None or count > 1 else known.unsqueeze(0)
    if known is not None and assignment.num_selected == 1:
        return known, known
    bins = assignment.experts
    if count > 1:
        bins = group_ids(assignment.num_tokens, group_size, bins.device).unsqueeze(-1) * num_experts + bins
    last = count * num_experts
    if known is None:
        bins = torch.where(made, bins, last)
    first = count_into(bins[:, :1].reshape(-1), last + 1)[:last].view(count, num_experts)
    if known is None:
        known = count_into(bins.reshape(-1), last + 1)[:last].view(count, num_experts)
    return known, first


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
    group_tokens = tokens_of_groups(mask, assignment.num_tokens, group_size, logits.device)
    made = made_choices(assignment)
    totals = routed.totals(mask, group_size)
    if totals is None:
        known = plan.counts if plan.all_kept and sent is assignment else None
        totals = _totals(routed, made, mask, group_size, known)
    dropped = unrouted = torch.zeros((), dtype=torch.int64, device=logits.device)
    if not plan.all_kept:
        held = plan.slots >= 0
        dropped = (made & ~held).sum(dim=0)
        unrouted = _unrouted(held, mask)
    return RouterStats(
        num_selected=assignment.num_selected,
        tokens=_total(group_tokens),
        counts=_total(totals.counts),
        kept=plan.counts,
        dropped_by_rank=dropped.expand(assignment.num_selected),
        unrouted=unrouted,
        score_sums=_total(totals.score_sums),
        logsumexp_sum=totals.logsumexp_sum,
        logsumexp_square_sum=totals.logsumexp_square_sum,
        nonfinite=totals.nonfinite,
        first_counts=_total(totals.first_counts),
        group_tokens=group_tokens,
        group_counts=totals.counts,
        group_first_counts=totals.first_counts,
        group_score_sums=totals.score_sums,
        sums=dict(assignment.sums),
        logits=logits.detach() if capture else None,
        scores=routed.scores.detach() if capture else None,
        experts=torch.where(plan.slots >= 0, sent.experts, -1) if capture else None,
        combine_weights=sent.weights.detach() if capture else None,
    )


def _totals(
    routed: Routed, made: Tensor, mask: Tensor | None, group_size: int | None, known: Tensor | None
) -> FusedRoute:
    """Return the sums over tokens, by groups, of a router that has not taken them itself."""
    logits, assignment = routed.logits, routed.assignment
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(wide), dim=-1)
    # Not from lse: a lone -inf among the logits vanishes there. And isfinite().all() takes 20 times as long.
    finite = logits.detach().abs().amax(dim=-1) < torch.inf
    shares = routed.probabilities.to(wide)
    if mask is not None:
        shares = torch.where(mask.unsqueeze(-1), shares, 0)
        lse = torch.where(mask, lse, 0)
    counts, first_counts = _counts(assignment, made, group_size, known)
    return FusedRoute(
        assignment.weights,
        assignment.experts,
        score_sums=_score_sums(shares, group_size),
        logsumexp_sum=lse.sum(),
        logsumexp_square_sum=(lse * lse).sum(),
        nonfinite=(~finite).sum(),
        counts=counts,
        first_counts=first_counts,
    )


def _score_sums(shares: Tensor, group_size: int | None) -> Tensor:
    """Return the sums over each group's tokens [G, E]."""
    if num_groups(shares.shape[0], group_size) == 1:
        return shares.sum(dim=0, keepdim=True)
    return to_groups(shares, group_size).sum(dim=1)


def _total(of_groups: Tensor) -> Tensor:
    """Return the sum over groups."""
    return of_groups[0] if of_groups.shape[0] == 1 else of_groups.sum(dim=0)


def _unrouted(held: Bool[Tensor, "T K"], mask: Bool[Tensor, "T"] | None) -> Int64[Tensor, ""]:
    """Return how many real tokens no expert computes: dropped, or chosen by none."""
    alone = ~held.any(dim=1)
    return (alone if mask is None else alone & mask).sum()
