"""CART by scikit-learn: one regression tree per output, its leaf size chosen on held-out training cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.tree import DecisionTreeRegressor

Array = NDArray[np.float64]


class Cart(NamedTuple):
    """Predictions [T, C] for the test cases; the least cases of a leaf and the leaves, by output."""

    predictions: Array
    leaf_sizes: list[int]
    leaves: list[int]


def cart_predictions(
    x: Array, y: Array, x_test: Array, sizes: Sequence[int] = (1, 2, 5, 10, 20, 50), seed: int = 0
) -> Cart:
    """Return what trees fitted to x [T, D], y [T, C] say of x_test. The last fifth of the cases chooses the
    size of each output's leaves; the tree that answers is then fitted to all of them.
    """
    kept = len(x) - len(x) // 5
    columns, chosen, leaves = [], [], []
    for own in y.T:
        errors = {}
        for size in sizes:
            tree = DecisionTreeRegressor(min_samples_leaf=size, random_state=seed).fit(x[:kept], own[:kept])
            errors[size] = float(np.square(tree.predict(x[kept:]) - own[kept:]).mean())
        best = min(errors, key=lambda size: errors[size])
        tree = DecisionTreeRegressor(min_samples_leaf=best, random_state=seed).fit(x, own)
        columns.append(tree.predict(x_test))
        chosen.append(best)
        leaves.append(int(tree.get_n_leaves()))
    return Cart(np.stack(columns, axis=1), chosen, leaves)
