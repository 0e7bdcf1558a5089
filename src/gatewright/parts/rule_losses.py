"""Losses of single rules, made of sums that only their routers keep."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts.balancing import mean_over_routers, per_token
from gatewright.parts.stats import RouterStats, Stats


def sums_of(stats: Stats, name: str, loss: str) -> Iterator[tuple[str, RouterStats, Tensor]]:
    """Return (router name, record, its sum `name`) of each router that keeps that sum for the loss `loss`.

    Routers without it are left out, as a model may mix rules. Raises: UserError where all are without it.
    """
    found = [(key, record, record.sums[name]) for key, record in stats.items() if name in record.sums]
    if len(stats) and not found:
        from gatewright.parts.rules.registry import all_routers

        giving = [info.name for info in all_routers() if loss in info.losses]
        raise UserError(
            f"loss {loss!r} needs the sum {name!r}, which no router here keeps; allowed: a router that does"
            + (f": {', '.join(giving)}" if giving else "")
        )
    return iter(found)


def _mean_per_token(stats: Stats, name: str, loss: str) -> Tensor:
    return mean_over_routers([per_token(total, record) for _, record, total in sums_of(stats, name, loss)])


def entropy_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the mean over routers and tokens of the scores' entropy, a 0-d tensor, in nats.

    Equation: top-p routing (Huang et al. 2024): -sum_e P_e ln P_e, which is made small, or training flattens
    the scores to buy experts. Not a balance loss: ln E when a token's scores are equal, 0 when it is sure. A
    plain mean over tokens: ranks and accumulation change nothing, weighted by their tokens.
    Raises: UserError where no router keeps "entropy".
    """
    return _mean_per_token(stats, "entropy", "entropy")


def threshold_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the mean over routers and tokens of the loss that teaches thresholds, a 0-d tensor.

    Equation: Shazeer et al. 2017 eq 20: sum_e (M_threshold - M_batchwise)_te (s_te - T_e), 0 or more; 0 when
    the thresholds choose what the batch chooses.
    Differs: the paper sums over the batch; we divide by T, and the mean over layers stands for their sum.
    Raises: UserError where no router keeps "threshold".
    """
    return _mean_per_token(stats, "threshold", "threshold")


def depth_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return the mean over routers and tokens of the loss that teaches causal choices, a 0-d tensor.

    Equation: Mixture-of-Depths, section 3.5: binary cross-entropy between the router's output and whether the
    token was among the chosen. ln 2 where the router says nothing (all outputs 0).
    Raises: UserError where no router keeps "depth".
    """
    return _mean_per_token(stats, "depth", "depth")


def relu_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return ReMoE's regularisation, a 0-d tensor, times the lambda that its router adapts: its weight is 1.

    Equation: ReMoE eq 10-11: lambda / (L T) * sum_{l,t,e} f_le R(x_t)_e, f_le = E / (K T) * tokens of e. The
    mean over layers is the paper's own. Has no fixed value when balanced: it shrinks with the outputs.
    Raises: UserError where no router keeps "relu_penalty".
    """
    return _mean_per_token(stats, "relu_penalty", "relu")


def cosine_loss(stats: Stats) -> Float[Tensor, ""]:
    """Return X-MoE's balance loss, a 0-d tensor: value 1 when balanced.

    Equation: X-MoE eq 6-8: mean over routers of E / T * sum_e f_e sum_t softmax(s_t / tau0)_e, with f_e the
    share of assignments and a fixed tau0, whatever the gate's own temperature ("cosine_importance" [E] among
    `sums`). Scope, invariances and gradient: as `balance_loss` in scope "micro_batch".
    Raises: UserError where no router keeps "cosine_importance".
    """
    losses = []
    for _, record, importance in sums_of(stats, "cosine_importance", "cosine"):
        f = record.counts.to(importance.dtype) / record.counts.sum().clamp(min=1)
        losses.append(record.num_experts * (f * per_token(importance, record)).sum())
    return mean_over_routers(losses)
