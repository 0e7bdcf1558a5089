"""Losses over Stats. Pure: a loss that is not in the sum you return does not exist."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.parts.stats import RouterStats, Stats


def _mean_over_routers(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros(())


def _per_token(total: Tensor, record: RouterStats) -> Tensor:
    # A batch without tokens has zero sums: dividing by 1 gives its loss 0.
    return total / record.tokens.clamp(min=1).to(total.dtype)


def balance_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the load-balance loss, a 0-d tensor.

    Equation: Switch Transformer eq 4-6, for any K: mean over routers of E * sum_e f_e P_e, with f_e =
    counts_e / (K T) and P_e = score_sums_e / T. Gradient flows through P only; f counts before capacity.
    Value when balanced: 1 for every K and E. Scope: the micro-batch that the Stats came from (its value
    changes with accumulation).
    Coefficients: Switch sums over layers (multiply its 0.01 by the number of MoE layers); transformers'
    load_balancing_loss_func has f summing to K and pools layers (divide its coefficient's effect by K: ours =
    theirs / K for one layer); GShard's eq without E^2 is ours / E^2 (K = 1 counts); MegaBlocks, Megatron and
    OLMoE's training code agree with ours.
    """
    losses = []
    for record in stats.values():
        assigned = record.counts.sum().clamp(min=1)
        f = record.counts.to(record.score_sums.dtype) / assigned
        losses.append(record.num_experts * (f * _per_token(record.score_sums, record)).sum())
    return _mean_over_routers(losses)


def z_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the router z-loss, a 0-d tensor: mean over routers and tokens of logsumexp(logits)^2.

    Equation: ST-MoE eq 5; OLMoE eq 4. Value when all logits are 0: (ln E)^2. The papers sum over layers where
    we take the mean.
    """
    return _mean_over_routers([_per_token(record.logsumexp_square_sum, record) for record in stats.values()])


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
