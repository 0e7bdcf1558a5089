"""Weighted fits of linear maps: least squares in one step, a multinomial logit by reweighted least squares.

They are the M-step of a tree of experts (Jordan and Jacobs 1994). Both begin at weights that are given and go
to better ones only, so that the likelihood never falls. `x` [T, D] has a column of ones where a bias is
meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatewright.errors import Diverged

# The ridge that keeps singular sums solvable, as a share of their mean diagonal: it moves no figure that is
# shown.
RIDGE = 1e-10
# A step that does not improve is halved so often at most; then the fit is where it can get.
_HALVINGS = 30


def least_squares(
    x: Tensor, targets: Tensor, case_weights: Tensor, start: Tensor, decay: float = 0.0
) -> Tensor:
    """Return weights [C, D] that minimise sum_t w_t |y_t - W x_t|^2 + decay |W|^2, from `start` [C, D].

    Equation: W = start + ((X^T w X + ridge)^-1 X^T w (Y - X start^T))^T. With no ridge that is the minimum
    (decay left out); with one it is still no worse than the start, also where few or no cases weigh anything.
    """
    weighed = x * case_weights.unsqueeze(-1)
    square = weighed.t() @ x + decay * torch.eye(x.shape[1], dtype=x.dtype)
    step = _solve(square, weighed.t() @ (targets - x @ start.t()) - decay * start.t())
    return start + step.t()


def fit_logits(
    x: Tensor,
    masses: Tensor,
    start: Tensor,
    *,
    decay: float = 0.0,
    most: int = 25,
    tolerance: float = 1e-9,
) -> Tensor:
    """Return weights [B, D] that maximise sum_tb m_tb ln softmax(V x_t)_b - decay |V|^2 / 2: IRLS.

    Equations: 2.23 and 2.24, m_tb = the case's weight times its target; a step is that of A.1,
    v <- v + (sum_t w_t g_b (delta_bc - g_c) x x^T)^-1 sum_t (m_tb - w_t g_tb) x_t with w_t = sum_b m_tb. Only
    differences of logits count, so the last row is taken off all others and stays 0.
    Stops once a step would gain less than `tolerance` per unit of weight, or after `most` steps.
    """
    weight = masses.sum(-1)
    if len(start) < 2:
        return start  # one branch is taken for sure
    free = (start[:-1] - start[-1:]).clone()
    total = float(weight.sum())
    if total <= 0.0:
        return start
    value = _log_fit(x, masses, free, decay)
    for _ in range(most):
        g = torch.softmax(_logits(x, free), -1)
        slope = (masses - weight.unsqueeze(-1) * g)[:, :-1].t() @ x - decay * free
        curved = _curvature(x, weight, g)
        curved.diagonal().add_(decay)
        step = _solve(curved, slope.reshape(-1, 1)).view_as(free)
        if float((slope * step).sum()) <= tolerance * total:
            break
        for _ in range(_HALVINGS):
            new = _log_fit(x, masses, free + step, decay)
            if new >= value:
                break
            step = step / 2
        else:
            break
        free, value = free + step, new
    return torch.cat([free, torch.zeros_like(free[:1])])


def _logits(x: Tensor, free: Tensor) -> Tensor:
    rows = x @ free.t()
    return torch.cat([rows, x.new_zeros(len(x), 1)], dim=-1)


def _log_fit(x: Tensor, masses: Tensor, free: Tensor, decay: float) -> float:
    fit = (masses * torch.log_softmax(_logits(x, free), -1)).sum()
    return float(fit - decay / 2 * free.square().sum())


def _curvature(x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
    """Return minus the second derivative, [(B - 1) D, (B - 1) D]."""
    free, width = g.shape[1] - 1, x.shape[1]
    found = x.new_zeros(free, width, free, width)
    for b in range(free):
        for c in range(b, free):
            own = weight * g[:, b] * ((1.0 if b == c else 0.0) - g[:, c])
            block = (x * own.unsqueeze(-1)).t() @ x
            found[b, :, c], found[c, :, b] = block, block
    return found.reshape(free * width, free * width)


def _solve(square: Tensor, right: Tensor) -> Tensor:
    """Return the solution of a sum of squares that may be singular, held up by a small ridge."""
    diagonal = square.diagonal()
    ridge = RIDGE * float(diagonal.mean()) + torch.finfo(square.dtype).tiny
    for _ in range(10):
        root, failed = torch.linalg.cholesky_ex(square + ridge * torch.eye(len(square), dtype=square.dtype))
        if int(failed) == 0:
            return torch.cholesky_solve(right, root)
        ridge *= 100.0
    raise Diverged("a weighted fit met numbers that are not finite; look at the scale of the cases")
