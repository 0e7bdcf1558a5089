"""The layer against the slow oracle on random shapes: output, statistics, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gatewright.kernels import runnable_backends
from tests.parts.harness import Case, assert_equal, cases, repeatable, through_library, through_oracle

EMPTY_EXPERTS = Case(3, 5, 7, 2, 3, form="renormalised")
ALL_TO_ONE = Case(9, 5, 4, 1, 3, skew="one")
ALL_TO_ONE_TIGHT = Case(9, 5, 4, 2, 3, form="renormalised", capacity_factor=1.0, skew="one", num_shared=1)
K_IS_E = Case(6, 3, 5, 5, 7, "geglu", "softmax_selected")
ONE_EXPERT = Case(5, 4, 1, 1, 4, "gelu", "renormalised")
NO_TOKENS = Case(0, 4, 3, 2, 4, "relu", "raw", 1, 1.0)
NOTHING_FITS = Case(6, 7, 6, 1, 5, "swiglu", "raw", 0, 0.01, (False,) * 6)
ALL_PADDING = Case(4, 4, 3, 2, 4, "swiglu", "raw", 1, None, (False,) * 4)
EQUAL_SCORES = Case(5, 3, 6, 3, 5, "gelu", "renormalised", 0, 0.9, None, "ties")
ALIGNED = Case(9, 8, 5, 2, 8, "swiglu", "softmax_selected", 1, 1.0)


@pytest.mark.timeout(400)  # seconds of work, but a busy machine stretches the longest test first
@repeatable(200)
@given(case=cases())
@example(case=EMPTY_EXPERTS)
@example(case=ALL_TO_ONE)
@example(case=ALL_TO_ONE_TIGHT)
@example(case=K_IS_E)
@example(case=ONE_EXPERT)
@example(case=NO_TOKENS)
@example(case=NOTHING_FITS)
@example(case=ALL_PADDING)
@example(case=EQUAL_SCORES)
@example(case=ALIGNED)
def test_fp64_equals_the_oracle(case: Case):
    expected = through_oracle(case)
    for backend in runnable_backends():
        assert_equal(through_library(case, backend), expected, 1e-12)


@pytest.mark.timeout(400)
@repeatable(100)
@given(case=cases(widths=st.sampled_from((1, 3, 4, 5, 8, 12))))
@example(case=EMPTY_EXPERTS)
@example(case=ALL_TO_ONE_TIGHT)
@example(case=NO_TOKENS)
@example(case=ALIGNED)
def test_fp32_equals_the_oracle(case: Case):
    expected = through_oracle(case, torch.float32)
    for backend in runnable_backends():
        assert_equal(through_library(case, backend, torch.float32), expected, 1e-5)


@pytest.mark.parametrize("backend", runnable_backends())
@pytest.mark.parametrize("form", ["raw", "renormalised"])
def test_bf16_stays_within_three_percent_of_the_oracle(backend: str, form: str):
    # bf16 keeps 8 bits, 0.4 %; an output sums a few dozen such roundings. The router's sums are fp32.
    case = Case(24, 16, 6, 2, 12, form=form, num_shared=1, seed=3)
    found, expected = through_library(case, backend, torch.bfloat16), through_oracle(case, torch.bfloat16)
    exact = {name for name in found if name.startswith("stats.") or name in ("balance", "z")}
    assert_equal({n: found[n] for n in exact}, {n: expected[n] for n in exact}, 1e-5)
    rest = found.keys() - exact
    assert_equal({n: found[n] for n in rest}, {n: expected[n] for n in rest}, 3e-2)
