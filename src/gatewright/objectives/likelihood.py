"""Likelihood of cases under a mixture whose experts are generalised linear models (Jordan and Jacobs 1994).

Each function takes cases, experts and outputs as the last axes: outputs [T, E, C], logits ln g_ij [T, E] of a
tree or those of a flat gate, targets [T, C].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean
from gatewright.objectives.mixture import CaseOutput
from gatewright.objectives.next_token import Loss

DENSITIES = ("linear", "logistic", "softmax")
"""By what squashes the experts' outputs: Gaussian, Bernoulli for each output, multinomial over outputs."""


def log_densities(
    squash: str,
    outputs: Float[Tensor, "T E C"],
    targets: Float[Tensor, "T C"],
    covariance: Float[Tensor, "E C C"] | None = None,
) -> Float[Tensor, "T E"]:
    """Return ln P_ij(y) of each case under each expert; `covariance` is of Gaussians, None is the identity.

    Equations: Gaussian -(C ln 2 pi + ln|S| + r^T S^-1 r) / 2 with r = y - mu (2.2.1); Bernoulli
    y ln mu + (1 - y) ln(1 - mu) (2.2.2); multinomial sum_c y_c ln mu_c (appendix B).
    """
    if squash not in DENSITIES:
        raise UserError(
            f"squash {squash!r} has no density{did_you_mean(squash, DENSITIES)}; allowed: "
            f"{', '.join(DENSITIES)}"
        )
    y = targets.unsqueeze(-2)
    if squash == "linear":
        return _gaussian(y - outputs, covariance)
    # A probability may round to 0 in the tails; its logarithm has to stay finite.
    tiny = torch.finfo(outputs.dtype).tiny
    told = y * outputs.clamp(min=tiny).log()
    if squash == "logistic":
        told = told + (1 - y) * (1 - outputs).clamp(min=tiny).log()
    return told.sum(-1)


def _gaussian(residual: Tensor, covariance: Tensor | None) -> Tensor:
    constant = residual.shape[-1] * math.log(2 * math.pi)
    if covariance is None:
        return -(residual.square().sum(-1) + constant) / 2
    root = torch.linalg.cholesky(covariance)
    scaled = torch.linalg.solve_triangular(root, residual.permute(1, 2, 0), upper=False)
    half_log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -(scaled.square().sum(1).t() + constant) / 2 - half_log_det


def log_likelihood(logits: Float[Tensor, "T E"], densities: Float[Tensor, "T E"]) -> Float[Tensor, "T"]:
    """Return ln P(y | x) of each case: ln sum_ij g_ij P_ij(y), the terms of 2.13."""
    return torch.logsumexp(torch.log_softmax(logits, -1) + densities, -1)


def joint_posteriors(logits: Float[Tensor, "T E"], densities: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return h_ij (2.10 to 2.12): how far each expert is responsible for a case whose target is known."""
    return torch.softmax(torch.log_softmax(logits, -1) + densities, -1)


@dataclass(frozen=True)
class CaseLikelihood:
    """total = minus the log likelihood summed over the cases (2.13); Gaussians have the identity as
    covariance, so that its gradients are those of 2.14 to 2.16 with the sign turned.
    """

    squash: str = "linear"

    def __call__(self, output: CaseOutput, targets: Tensor) -> Loss:
        """Return the Loss for targets [T, C]; there are no losses over routers in it."""
        total = -log_likelihood(output.logits, log_densities(self.squash, output.outputs, targets)).sum()
        none = torch.zeros_like(total.detach())
        return Loss(total, total, none, none)
