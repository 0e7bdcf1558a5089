"""What the estimators share: cases as tensors of one scale, seeds, and what scikit-learn asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from gatewright.errors import UserError

Array = NDArray[np.float64]


class Scale(NamedTuple):
    """Columns are moved by `mean` and divided by `spread`; constant ones are only moved."""

    mean: Tensor
    spread: Tensor

    def into(self, values: Tensor) -> Tensor:
        """Return the values in units of the spread."""
        return (values - self.mean) / self.spread

    def out_of(self, values: Tensor) -> Tensor:
        """Return such values in the units of the table."""
        return values * self.spread + self.mean


def scale_of(values: Tensor, weights: Tensor) -> Scale:
    """Return mean and standard deviation of each column of [T, D], rows weighed."""
    share = (weights / weights.sum()).unsqueeze(-1)
    mean = (share * values).sum(0)
    spread = (share * (values - mean).square()).sum(0).sqrt()
    # Rounding leaves a constant column with a spread of its own size times 1e-16.
    still = spread <= 1e-12 * values.abs().amax(0)
    return Scale(mean, torch.where(still, 1.0, spread))


def tensor(values: Any) -> Tensor:
    """Return a copy in fp64: the table itself may be read-only and is never written to."""
    return torch.from_numpy(np.array(values, dtype=np.float64, copy=True, order="C"))


class Cases(BaseEstimator):
    """The common way of `fit`: check the table, bring it to one scale, hand it to `_learn`."""

    random_state: Any
    max_iter: int

    def _learn(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[nn.Module, int]:
        """Return a fitted model and the rounds that it took."""
        raise TypeError("an estimator says how it learns")

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _check_rounds(self) -> None:
        if not (isinstance(self.max_iter, int | np.integer) and self.max_iter >= 1):
            raise UserError(f"max_iter {self.max_iter!r}; allowed: a whole number, 1 or more")

    def _weights(self, sample_weight: Any, table: Array) -> Tensor:
        """Return the rows' weights [T], 1 where none were given."""
        if sample_weight is not None and not np.any(np.asarray(sample_weight)):
            raise UserError("every sample_weight is zero; allowed: some weight above 0")
        return tensor(_check_sample_weight(sample_weight, table, ensure_non_negative=True))

    def _fit_cases(self, table: Array, y: Tensor, weights: Tensor) -> None:
        """Fit to targets y [T, C] that are in their final units."""
        self._check_rounds()
        rows = tensor(table)
        self._inputs = scale_of(rows[weights > 0], weights[weights > 0])
        model, self.n_iter_ = self._learn(self._inputs.into(rows), y, weights)
        self.model_: Any = model.requires_grad_(False)

    def scaled(self, X: Any) -> Tensor:
        """Return a table [T, D] as `model_` takes it."""
        check_is_fitted(self)
        return self._inputs.into(tensor(validate_data(self, X, reset=False, dtype=np.float64)))

    def _blend(self, X: Any) -> Tensor:
        """Return the blended answer [T, C] for a table, in the units of the targets as they were learnt."""
        rows = self.scaled(X)
        blend: Tensor = self.model_(rows).blend
        return blend


class CaseRegressor(Cases):
    """`fit` and `predict` for one column of numbers, or several."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CaseRegressor:
        """Fit to a table X [T, D] and numbers y [T] or [T, C]; return the estimator."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        weights = self._weights(sample_weight, X)
        columns, used = tensor(y).reshape(len(y), -1), weights > 0
        self._flat = np.ndim(y) == 1
        self._outputs = scale_of(columns[used], weights[used])
        self._fit_cases(X, self._outputs.into(columns), weights)
        return self

    def predict(self, X: Any) -> Array:
        """Return the blend of the experts' answers, [T] or [T, C] as the targets were."""
        blend = self._blend(X)
        found = self._outputs.out_of(blend).numpy()
        return found[:, 0] if self._flat else found

    def slopes(self) -> Array:
        """Return each expert's slopes [E, C, D], in the units of the targets and of the table."""
        check_is_fitted(self)
        own = self.model_.experts.weight * self._outputs.spread.unsqueeze(-1) / self._inputs.spread
        return np.asarray(own.numpy())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class CaseClassifier(Cases):
    """`fit`, `predict` and `predict_proba` for one column of classes."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CaseClassifier:
        """Fit to a table X [T, D] and classes y [T]; return the estimator. One class alone is learnt as it
        is.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        targets = torch.nn.functional.one_hot(torch.from_numpy(places.reshape(-1)), len(self.classes_))
        self._fit_cases(X, targets.double(), self._weights(sample_weight, X))
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return the blend of the experts' distributions, [T, classes] in the order of `classes_`."""
        found = self._blend(X).numpy()
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def predict(self, X: Any) -> Any:
        """Return the likeliest class of each row."""
        found = self.predict_proba(X)
        return self.classes_[found.argmax(axis=1)]
