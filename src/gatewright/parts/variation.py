"""Losses of 2017 and V-MoE: the squared coefficient of variation over experts of importance and of load."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.parts.balancing import mean_over_routers
from gatewright.parts.stats import Stats


def squared_variation(values: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Return CV^2 = variance / mean^2 of values [E] of 0 or more, with the population variance (ddof 0).

    Value when all are equal: 0; when one has all: E - 1. 1 + CV^2 = E * sum_e v_e^2 / (sum_e v_e)^2, the form
    of a balance loss with f = P. The gradient is finite everywhere (no square root is taken), and 0 when all
    are equal; values that sum to 0 give 0.
    """
    mean = values.mean()
    variance = (values - mean).square().mean()
    return variance / torch.where(mean > 0, mean, 1).square()


def importance_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the importance loss, a 0-d tensor: mean over routers of CV^2 over experts of summed gates.

    Equation: Shazeer et al. 2017 eq 6-7 without w_importance; V-MoE's L_imp. The importance [E] is what the
    router calls so in Stats ("importance" among `sums`: sparse gates in 2017, noise-free scores in V-MoE),
    else the summed scores.
    Value when balanced: 0, not 1, since CV^2 is the papers' own form; 1 + CV^2 is 1. Scope: the micro-batch;
    over a wider one the constraint is weaker, and recomputation, padding and the order of experts change
    nothing. The papers sum over layers (theirs times the number of MoE layers); V-MoE's lambda 0.01 is 0.005
    for this and 0.005 for load. Ports that take the unbiased variance (Tutel) are E / (E - 1) times larger.
    """
    return mean_over_routers(
        [squared_variation(record.sums.get("importance", record.score_sums)) for record in stats.values()]
    )


def load_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the load loss, a 0-d tensor: mean over routers of CV^2 over experts of expected token counts.

    Equation: Shazeer et al. 2017 eq 8-11 without w_load; V-MoE's L_load. The load [E] is the smooth estimate
    of noisy routers ("load" among `sums`); without noise it is the true count, which has no gradient: the
    value then only tells.
    Value when balanced: 0, not 1 (see `importance_loss`, whose scope, invariances and factors hold here).
    """
    return mean_over_routers(
        [
            squared_variation(record.sums.get("load", record.counts.to(record.score_sums.dtype)))
            for record in stats.values()
        ]
    )
