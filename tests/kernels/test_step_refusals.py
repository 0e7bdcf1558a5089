"""Operators of the step refuse, by name, tensors that do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gatewright.kernels import native
from tests.kernels.test_step import drawn

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)

X, ONES, IDS = drawn(4, 3), torch.ones(4), torch.zeros(4, dtype=torch.int64)
LAYER = (drawn(10, 3), drawn(3, 5), None, None, "swiglu")
REFUSED = [
    ("norm_forward", (drawn(3, 4).T, None, ONES[:3], 1e-5), "x .* is not contiguous"),
    ("norm_forward", (X.double(), None, ONES[:3], 1e-5), "allowed: float32, bfloat16"),
    ("norm_forward", (X, drawn(3, 4), ONES[:3], 1e-5), "y .* of x's shape"),
    ("norm_forward", (X.bfloat16(), X, ONES[:3], 1e-5), "y is Float"),
    ("norm_forward", (X, None, ONES, 1e-5), "weight is not"),
    ("norm_forward", (drawn(4), None, ONES, 1e-5), r"allowed: \[T, D\]"),
    ("norm_backward", (drawn(4, 2), None, X, ONES, ONES[:3]), "gradient"),
    ("norm_backward", (X, None, X, ONES[:3], ONES[:3]), "roots"),
    ("norm_backward", (X.bfloat16(), None, X, ONES, ONES[:3]), "x's dtype"),
    ("mlp_forward", (X, drawn(2, 10, 3), *LAYER[1:], True), "2 axes"),
    ("mlp_forward", (X, drawn(9, 3), *LAYER[1:], True), "w_in"),
    ("mlp_backward", (X, drawn(3, 10), True, True, X, *LAYER), "pre is not"),
    ("cross_entropy_forward", (X, IDS[:3]), "targets are not"),
    ("cross_entropy_forward", (drawn(3, 4).T, IDS), "logits are not"),
    ("cross_entropy_backward", (ONES, X, IDS, ONES), "gradient is not"),
    ("cross_entropy_backward", (ONES.sum(), X, IDS, ONES[:3]), "kept sums"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, given: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.gatewright, name)(*given)
