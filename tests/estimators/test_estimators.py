"""Mixtures as scikit-learn's estimators: its own checks, tables with a bend, and one-line refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from gatewright.errors import UserError
from gatewright.estimators import (
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    MixtureOfExpertsClassifier,
    MixtureOfExpertsRegressor,
    cart_predictions,
)

REGRESSORS = (MixtureOfExpertsRegressor, HierarchicalMixtureRegressor)
CLASSIFIERS = (MixtureOfExpertsClassifier, HierarchicalMixtureClassifier)


def bend(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A V: no line fits it, two do."""
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (count, 2))
    return x, np.where(x[:, 0] < 0, -3 * x[:, 0], 2 * x[:, 0]) + 0.02 * draw.normal(size=count)


@pytest.mark.parametrize("kind", [*REGRESSORS, *CLASSIFIERS], ids=lambda kind: kind.__name__)
def test_scikit_learn_s_own_checks_pass(kind: type):
    with warnings.catch_warnings():
        # Its checks warn of what they leave out; what fails raises.
        warnings.simplefilter("ignore")
        found = check_estimator(kind(max_iter=10, random_state=0), on_fail="raise", on_skip=None)
    assert sum(check["status"] == "passed" for check in found) > 40
    assert [check["check_name"] for check in found if check["status"] not in ("passed", "skipped")] == []


@pytest.mark.parametrize("kind", REGRESSORS)
def test_regressors_bend_where_a_line_cannot(kind: type):
    x, y = bend()
    model = kind(random_state=0).fit(x, y)
    assert model.score(x, y) > 0.98
    assert LinearRegression().fit(x, y).score(x, y) < 0.5


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers_bend_where_a_line_cannot(kind: type):
    x = np.random.default_rng(0).uniform(-1, 1, (400, 2))
    y = np.array(["odd", "even"])[(x[:, 0] * x[:, 1] > 0).astype(int)]
    model = kind(random_state=1).fit(x, y)
    assert model.score(x, y) > 0.9
    assert LogisticRegression().fit(x, y).score(x, y) < 0.7
    probabilities = model.predict_proba(x)
    assert list(model.classes_) == ["even", "odd"]
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(x))


@pytest.mark.parametrize("kind", REGRESSORS)
def test_several_targets_of_other_scales_are_learnt_together(kind: type):
    x, y = bend()
    both = np.stack([1000 * y + 5, -y], 1)
    found = kind(2 if kind is MixtureOfExpertsRegressor else (2,), random_state=1).fit(x, both).predict(x)
    assert found.shape == (300, 2)
    np.testing.assert_allclose((found[:, 0] - 5) / 1000, -found[:, 1], atol=0.15)
    assert kind(random_state=1).fit(x, y).predict(x).shape == (300,)


def test_real_tables_in_a_pipeline():
    x, y = load_iris(return_X_y=True)
    for kind in CLASSIFIERS:
        pipeline = make_pipeline(StandardScaler(), kind(max_iter=30, random_state=0))
        assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.9, kind
    x, y = load_diabetes(return_X_y=True)
    for kind in REGRESSORS:
        model = clone(kind(max_iter=20, random_state=0))
        assert cross_val_score(model, x, y, cv=3).mean() > 0.2, kind


def test_the_tree_is_the_same_for_a_seed_and_another_for_another():
    x, y = bend(100)
    one, two, other = (HierarchicalMixtureRegressor(random_state=s, max_iter=3).fit(x, y) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.predict(x), two.predict(x))
    assert not np.array_equal(one.predict(x), other.predict(x))
    assert one.log_likelihood_ == two.log_likelihood_
    assert one.n_iter_ == 3


def test_a_row_of_no_weight_is_not_there():
    x, y = bend(100)
    weights = np.ones(100)
    weights[50:] = 0
    y_odd = np.where(weights > 0, y, 1e6)
    one = HierarchicalMixtureRegressor(random_state=0, max_iter=5).fit(x, y_odd, sample_weight=weights)
    two = HierarchicalMixtureRegressor(random_state=0, max_iter=5).fit(x[:50], y[:50])
    np.testing.assert_allclose(one.predict(x), two.predict(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (HierarchicalMixtureRegressor(branching=()), r"branching \(\); allowed"),
        (HierarchicalMixtureRegressor(form="exat"), "did you mean 'exact'"),
        (HierarchicalMixtureRegressor(covariance="fll"), "did you mean 'full'"),
        (HierarchicalMixtureClassifier(max_iter=0), "max_iter 0; allowed: a whole number"),
        (MixtureOfExpertsRegressor(spread=0.0), "spread 0.0; allowed: above 0"),
        (HierarchicalMixtureClassifier(decay=-1.0), "decay -1.0; allowed: 0 or more"),
        (MixtureOfExpertsRegressor(decay=-1.0), "decay -1.0; allowed: 0 or more"),
        (MixtureOfExpertsClassifier(num_experts=0), "num_experts 0"),
        (MixtureOfExpertsClassifier(init=0.0), "init 0.0; allowed: above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_fitted(model: Any, message: str):
    x, y = bend(20)
    with pytest.raises(UserError, match=message) as caught:
        model.fit(x, (y > 0).astype(int))
    assert "\n" not in str(caught.value)


def test_nan_and_weights_of_nothing_are_refused():
    x, y = bend(20)
    holes = x.copy()
    holes[3, 1] = np.nan
    for kind in (*REGRESSORS, *CLASSIFIERS):
        with pytest.raises(ValueError, match="NaN"):
            kind().fit(holes, (y > 0).astype(int))
        with pytest.raises(UserError, match="every sample_weight is zero"):
            kind().fit(x, (y > 0).astype(int), sample_weight=np.zeros(20))


def test_cart_chooses_its_leaves_on_held_out_cases():
    draw = np.random.default_rng(0)
    x = draw.uniform(-1, 1, (400, 2))
    sure = np.sign(x[:, 0])
    noisy = sure + 3 * draw.normal(size=400)
    found = cart_predictions(x, np.stack([sure, noisy], 1), x, sizes=(1, 100))
    np.testing.assert_array_equal(found.predictions[:, 0], sure)
    assert found.leaf_sizes == [1, 100]
    assert found.leaves[0] == 2


def test_without_scikit_learn_one_line_says_so():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'sklearn' else real(name, *a)\n"
        "import gatewright.estimators as e\n"
        "from gatewright.errors import UserError\n"
        "try:\n    e.MixtureOfExpertsRegressor\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "scikit-learn is not installed; allowed: scikit-learn>=1.7; pip install 'gatewright[sklearn]'\n"
    )
