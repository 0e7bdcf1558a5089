"""Estimators of scikit-learn for tables: the mixtures of 1991 and 1994 with fit, predict, predict_proba."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatewright.errors import UserError

if TYPE_CHECKING:
    from gatewright.estimators.cart import cart_predictions
    from gatewright.estimators.hierarchical import HierarchicalMixtureClassifier, HierarchicalMixtureRegressor
    from gatewright.estimators.local import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor

__all__ = [
    "HierarchicalMixtureClassifier",
    "HierarchicalMixtureRegressor",
    "MixtureOfExpertsClassifier",
    "MixtureOfExpertsRegressor",
    "cart_predictions",
]
_HOMES = {"Hierarchical": "hierarchical", "MixtureOfExperts": "local", "cart": "cart"}


def __getattr__(name: str) -> object:
    # Scikit-learn is an extra: the package is imported without it, and says so where a class is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UserError(
            "scikit-learn is not installed; allowed: scikit-learn>=1.7; pip install 'gatewright[sklearn]'"
        )
    home = next(file for start, file in _HOMES.items() if name.startswith(start))
    return getattr(import_module(f"{__name__}.{home}"), name)
