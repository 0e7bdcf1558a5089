"""The mixture of 1991 as estimators: a gate and experts, trained down the gradient of error 1.3."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from torch import Tensor

from gatewright.backbones import Mixture
from gatewright.errors import UserError
from gatewright.estimators.base import CaseClassifier, CaseRegressor
from gatewright.objectives.mixture import mixture_error
from gatewright.training.seeded import drawn


def _mixture(
    estimator: Any, x: Tensor, y: Tensor, weights: Tensor, squash: str, unit: float
) -> tuple[Mixture, int]:
    """Return a mixture at a low point of the weighed mean of error 1.3, outputs in units of `unit`."""
    s = estimator
    if not s.decay >= 0:
        raise UserError(f"decay {s.decay}; allowed: 0 or more; 0 leaves the weights free")
    mixture = drawn(
        lambda: Mixture(x.shape[1], s.num_experts, y.shape[1], squash, init=s.init, gate_init=s.init),
        s._seed(),
    )
    parameters = list(mixture.parameters())
    share = weights / weights.sum()
    # Whole gradients with curvature from the last steps: no step size to be chosen.
    descent = torch.optim.LBFGS(
        parameters,
        max_iter=s.max_iter,
        tolerance_grad=s.tol,
        tolerance_change=s.tol / 1000,
        line_search_fn="strong_wolfe",
    )

    def error() -> Tensor:
        descent.zero_grad()
        output = mixture(x)
        found = (share * mixture_error(output.outputs / unit, output.logits, y / unit)).sum()
        found = found + s.decay / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
        found.backward()
        return found

    descent.step(error)
    return mixture, max(1, descent.state[parameters[0]]["n_iter"])


class MixtureOfExpertsRegressor(RegressorMixin, CaseRegressor):
    """A softmax gate over linear regressions by error 1.3 (Jacobs, Jordan, Nowlan and Hinton 1991).

    Args: `spread` is the standard deviation of an expert's errors that 1.3 assumes, as a share of the
    targets': the smaller, the harder experts compete. `init`: first weights are drawn evenly from -init to
    init. `decay` pulls all weights to 0. Ends after `max_iter` rounds of L-BFGS on the whole table, or when
    the steepest slope is below `tol`; the paper's plain descent is `gatewright reproduce
    local_experts/table1`.
    Attributes: `model_`, the mixture; `n_iter_`.
    """

    def __init__(
        self,
        num_experts: int = 4,
        *,
        spread: float = 0.3,
        init: float = 0.5,
        decay: float = 1e-5,
        max_iter: int = 300,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.num_experts = num_experts
        self.spread = spread
        self.init = init
        self.decay = decay
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _learn(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Mixture, int]:
        if not self.spread > 0:
            raise UserError(f"spread {self.spread}; allowed: above 0, as a share of the targets' own")
        return _mixture(self, x, y, weights, "linear", self.spread)


class MixtureOfExpertsClassifier(ClassifierMixin, CaseClassifier):
    """A softmax gate over softmax experts by error 1.3 on classes as 0 and 1 (Jacobs, Jordan, Nowlan, Hinton
    1991).

    Args: `num_experts`, `init`, `decay`, `max_iter` and `tol` as for MixtureOfExpertsRegressor.
    Attributes: `model_`, the mixture; `n_iter_`; `classes_`.
    """

    def __init__(
        self,
        num_experts: int = 4,
        *,
        init: float = 0.5,
        decay: float = 1e-5,
        max_iter: int = 300,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.num_experts = num_experts
        self.init = init
        self.decay = decay
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _learn(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Mixture, int]:
        return _mixture(self, x, y, weights, "softmax", 1.0)
