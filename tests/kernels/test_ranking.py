"""Rows ranked by packed keys stand as a stable sort puts them: ties by id, NaN first, every sign of zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.kernels import rank_rows, ranks_fast
from tests.parts.harness import repeatable

NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-30, -1e-30, 3.4e38, math.inf, -math.inf, math.nan, -math.nan)
FAST = (torch.float32, torch.bfloat16, torch.float16)


def test_ranks_by_hand():
    scores = torch.tensor([[0.25, 0.5, 0.25, 0.5], [-1.0, -0.0, 0.0, math.nan], [-2.0, -math.inf, 7.0, -1.0]])
    # Equal scores in order of id; -0 equals 0; a NaN is the highest.
    assert rank_rows(scores).tolist() == [[1, 3, 0, 2], [3, 1, 2, 0], [2, 3, 0, 1]]


@given(
    st.lists(st.lists(st.sampled_from(NUMBERS), min_size=6, max_size=6), max_size=5), st.sampled_from(FAST)
)
@repeatable(300)
def test_equals_a_stable_sort(rows: list[list[float]], dtype: torch.dtype):
    scores = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 6).to(dtype)
    assert ranks_fast(scores)
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    assert torch.equal(rank_rows(scores), expected)


@pytest.mark.parametrize("dtype", [*FAST, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3, 0), (257, 64)])
def test_every_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, int]):
    torch.manual_seed(0)
    scores = (torch.randn(shape) * 4).round().to(dtype)
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    assert torch.equal(rank_rows(scores), expected)
    assert torch.equal(rank_rows(scores.t().contiguous().t()), expected)


def test_what_is_ranked_is_left_as_it_is_and_carries_no_gradient():
    scores = torch.tensor([[0.0, -0.0, 3.0]], requires_grad=True)
    ranks = rank_rows(scores)
    assert not ranks.requires_grad
    assert scores.tolist() == [[0.0, 0.0, 3.0]]
    assert math.copysign(1, scores[0, 1].item()) == -1
