"""The tree of experts of 1994 as estimators, fitted by expectation-maximisation."""

from __future__ import annotations

from typing import Any

from sklearn.base import ClassifierMixin, RegressorMixin
from torch import Tensor

from gatewright.backbones import ExpertTree
from gatewright.estimators.base import CaseClassifier, CaseRegressor
from gatewright.training.em import EM, fit_em
from gatewright.training.seeded import drawn


def _tree(
    estimator: Any, x: Tensor, y: Tensor, weights: Tensor, squash: str, em: EM
) -> tuple[ExpertTree, int]:
    """Return a tree fitted to the cases, and the epochs that it took."""
    s = estimator

    def build() -> ExpertTree:
        bounds = {"init": s.init, "gate_init": s.init}
        return ExpertTree(x.shape[1], tuple(s.branching), y.shape[1], squash, **bounds)

    tree = drawn(build, s._seed())
    history = fit_em(tree, x, y, epochs=s.max_iter, em=em, tolerance=s.tol, case_weights=weights)
    s.log_likelihood_ = history[-1]
    return tree, len(history) - 1


class HierarchicalMixtureRegressor(RegressorMixin, CaseRegressor):
    """A tree of softmax gates over linear regressions, fitted by EM (Jordan and Jacobs 1994).

    Args: `branching` is the branches of a gate by level: (2, 2) has four experts. `form`: "exact" gates by
    IRLS, or "least_squares". `decay` pulls all weights to 0: it keeps small and wide tables solvable.
    `covariance`: of an expert's errors, "full",
    "diagonal", "spherical", or "shared" by all. `floor`: the least variance, as a share of the targets'.
    `init`: first weights are drawn evenly from -init to init. Ends after `max_iter` epochs, or when one
    changes the log likelihood by less than `tol` per row. Columns and targets are brought to one scale
    inside.
    Attributes: `model_`, the tree; `n_iter_`; `log_likelihood_`, of the scaled targets.
    """

    def __init__(
        self,
        branching: tuple[int, ...] = (2, 2),
        *,
        form: str = "exact",
        covariance: str = "diagonal",
        floor: float = 1e-3,
        init: float = 0.5,
        decay: float = 0.01,
        max_iter: int = 100,
        tol: float = 1e-5,
        random_state: Any = None,
    ) -> None:
        self.branching = branching
        self.form = form
        self.covariance = covariance
        self.floor = floor
        self.init = init
        self.decay = decay
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _learn(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[ExpertTree, int]:
        return _tree(
            self, x, y, weights, "linear", EM(self.form, self.covariance, self.floor, decay=self.decay)
        )


class HierarchicalMixtureClassifier(ClassifierMixin, CaseClassifier):
    """A tree of softmax gates over multinomial logits, fitted by EM (Jordan and Jacobs 1994).

    Args: `branching`, `form`, `init`, `decay`, `max_iter` and `tol` as for HierarchicalMixtureRegressor.
    Attributes: `model_`, the tree; `n_iter_`; `log_likelihood_`; `classes_`.
    """

    def __init__(
        self,
        branching: tuple[int, ...] = (2, 2),
        *,
        form: str = "exact",
        init: float = 0.5,
        decay: float = 0.01,
        max_iter: int = 100,
        tol: float = 1e-5,
        random_state: Any = None,
    ) -> None:
        self.branching = branching
        self.form = form
        self.init = init
        self.decay = decay
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _learn(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[ExpertTree, int]:
        return _tree(self, x, y, weights, "softmax", EM(self.form, decay=self.decay))
