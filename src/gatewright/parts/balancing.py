"""Losses over Stats. Pure: a loss that is not in the sum you return does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.parts.stats import RouterStats, Stats

Scope = Literal["micro_batch", "sequence", "global_batch"]
SCOPES: tuple[Scope, ...] = ("micro_batch", "sequence", "global_batch")


def mean_over_routers(values: list[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the mean of one loss's values, one per router; 0 without routers."""
    return torch.stack(values).mean() if values else torch.zeros(())


def per_token(total: Float[Tensor, "*shape"], record: RouterStats) -> Float[Tensor, "*shape"]:
    """Return a sum over tokens divided by T."""
    # A batch without tokens has zero sums: dividing by 1 gives its loss 0.
    return total / record.tokens.clamp(min=1).to(total.dtype)


def balance_loss(
    stats: Stats, scope: str = "micro_batch", counts: Mapping[str, Int64[Tensor, "E"]] | None = None
) -> Float[Tensor, ""]:
    """Return the load-balance loss, a 0-d tensor: value 1 when balanced, for every K, E and scope.

    Equation: Switch Transformer eq 4-6, for any K: mean over routers of E * sum_e f_e P_e, with f_e =
    counts_e / (K T) and P_e = score_sums_e / T. Gradient flows through P only; f counts before capacity.
    Args: `scope` says over which tokens f and P are taken. "micro_batch": those that the Stats came from.
    "sequence" (DeepSeek-V3 eq 17-20): the mean of the loss over the groups that Stats tell apart, each
    sequence of a batch [B, S, D], or each routing group where the layer has a group_size; groups of padding
    are left out. "global_batch" (Qiu et al. 2025): f from `counts`, by router name [E] int64, that the caller
    has summed over all ranks (and micro-batches: see RunningCounts); P stays local.
    Never changes with: recomputation, padding, the order of experts. "sequence": nor with ranks or
    accumulation that split between sequences, mean over equal numbers of them. "global_batch": nor with
    ranks, mean weighted by their tokens. "micro_batch" changes with both by definition: a half may be
    unbalanced where the whole is not.
    Coefficients (`coefficient_for` has them all): Switch, GShard, Megatron and DeepSeek sum over layers
    (theirs times the number of MoE layers); transformers' f sums to K and is pooled over layers (theirs times
    K for one layer); GShard's printed loss lacks E^2 (theirs / E^2, first choices only: `gshard_loss`);
    MegaBlocks and OLMoE's training code agree with ours.
    Raises: UserError for an unknown scope, and counts that are missing, superfluous or of another shape.
    """
    _check_scope(scope, counts)
    losses = []
    for name, record in stats.items():
        if scope == "sequence":
            assigned = record.group_counts.sum(dim=-1, keepdim=True).clamp(min=1)
            losses.append(_mean_over_groups(record, record.group_counts, assigned))
            continue
        counted = record.counts if counts is None else _handed_in(counts, name, record)
        assigned = counted.sum().clamp(min=1)
        f = counted.to(record.score_sums.dtype) / assigned
        losses.append(record.num_experts * (f * per_token(record.score_sums, record)).sum())
    return mean_over_routers(losses)


def gshard_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return GShard's balance loss over first choices, a 0-d tensor: value 1 when balanced.

    Equation: GShard algorithm 1, times E^2: mean over routers and groups of E * sum_e (c_e / S) m_e, with c_e
    the first choices of the group's S tokens before capacity and m_e its mean score. Groups are those of the
    "sequence" scope of `balance_loss`, whose invariances hold here too. Gradient flows through m only.
    Differs: as printed the loss is (1 / E) sum_e (c_e / S) m_e, which is this / E^2, and added per layer. For
    K = 1 it is `balance_loss` in scope "sequence". ST-MoE's text counts first choices too.
    """
    losses = []
    for record in stats.values():
        tokens = record.group_tokens.clamp(min=1).unsqueeze(-1)
        losses.append(_mean_over_groups(record, record.group_first_counts, tokens))
    return mean_over_routers(losses)


def z_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the router z-loss, a 0-d tensor: mean over routers and tokens of logsumexp(logits)^2.

    Equation: ST-MoE eq 5; OLMoE eq 4. Value when all logits are 0: (ln E)^2; it does not measure balance. The
    papers sum over layers where we take the mean. A plain mean over tokens: ranks and accumulation change
    nothing, weighted by their tokens.
    """
    return mean_over_routers([per_token(record.logsumexp_square_sum, record) for record in stats.values()])


def _check_scope(scope: str, counts: Mapping[str, Tensor] | None) -> None:
    if scope not in SCOPES:
        raise UserError(
            f"scope {scope!r} is unknown{did_you_mean(scope, SCOPES)}; allowed: {', '.join(SCOPES)}"
        )
    if (scope == "global_batch") != (counts is not None):
        raise UserError(
            f"scope {scope!r} {'without' if counts is None else 'with'} counts; allowed: counts with "
            "'global_batch' only, and there always; sum each router's counts over the ranks first"
        )


def _handed_in(counts: Mapping[str, Tensor], name: str, record: RouterStats) -> Tensor:
    """Return the counts [E] that the caller has for this router."""
    if name not in counts:
        raise UserError(
            f"counts hold no router {name!r}; allowed: one entry per router of the Stats; given: "
            f"{', '.join(sorted(counts)) or 'none'}"
        )
    if counts[name].shape != record.counts.shape:
        raise UserError(
            f"counts of router {name!r} have shape {tuple(counts[name].shape)}; allowed: "
            f"({record.num_experts},), one count per expert"
        )
    return counts[name]


def _mean_over_groups(record: RouterStats, counts: Tensor, assigned: Tensor) -> Tensor:
    """Return the mean over groups that hold tokens of E sum_e f_ge P_ge, f = counts / assigned [G, E]."""
    score_sums = record.group_score_sums
    tokens = record.group_tokens.clamp(min=1).unsqueeze(-1).to(score_sums.dtype)
    f = counts.to(score_sums.dtype) / assigned
    # A group of padding has zero sums, so it adds nothing here and is not counted below.
    by_group = record.num_experts * (f * (score_sums / tokens)).sum(dim=-1)
    return by_group.sum() / (record.group_tokens > 0).sum().clamp(min=1)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, torch.ones_like(ctx.loss_like)


def attach_loss(y: Float[Tensor, "*shape"], loss: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Return y unchanged, with `loss` (0-d) riding on it: backward through y adds the loss's gradient once.

    Only for places where nothing can be returned (pipeline stages, foreign models). Equal to adding `loss` to
    a returned sum whose gradient is 1; a caller that scales its loss must scale `loss` alike.
    """
    out: Tensor = _Attach.apply(y, loss)
    return out
