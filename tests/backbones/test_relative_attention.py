"""T5's relative positions: buckets worked by hand, the bias made of them, and attention that takes it."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.backbones.relative_attention import (
    BiasedAttention,
    RelativeBias,
    padding_bias,
    relative_buckets,
)
from gatewright.errors import UserError
from gatewright.kernels.biased_attention import attend_biased


def buckets(*offsets: int, both_ways: bool, num_buckets: int = 32, max_distance: int = 128) -> list[int]:
    found = relative_buckets(torch.tensor([offsets]), num_buckets, max_distance, both_ways=both_ways)
    return found[0].tolist()


def test_buckets_of_both_ways_by_hand():
    # 32 buckets, 16 for each direction: distances 0..7 have their own, then 8 + 8 log(d / 8) / log(16).
    # d = 8: 8 + 0; d = 11: 8 log2(11/8) / 4 = .92, so 8; d = 12: 1.17, so 9; d = 16: 8 / 4 = 2, so 10;
    # d = 32: 4, so 12; d = 64: 6, so 14; d = 127: 7.98, so 15; d = 128: 8, cut to 15.
    assert buckets(0, -1, -7, -8, -11, -12, both_ways=True) == [0, 1, 7, 8, 8, 9]
    assert buckets(-15, -16, -32, -64, -127, -128, -900, both_ways=True) == [9, 10, 12, 14, 15, 15, 15]
    # A key behind the query has the upper half.
    assert buckets(1, 7, 8, 16, 64, 900, both_ways=True) == [17, 23, 24, 26, 30, 31]


def test_buckets_of_one_way_by_hand():
    # 32 buckets for one direction: 0..15 have their own, then 16 + 16 log(d / 16) / log(8).
    # d = 19: 16 log2(19/16) / 3 = 1.32, so 17; d = 32: 16 / 3 = 5.33, so 21; d = 64: 10.67, so 26;
    # d = 127: 15.94, so 31. A key behind the query is no distance.
    assert buckets(0, -15, -16, -19, -32, -64, -127, -500, both_ways=False) == [0, 15, 16, 17, 21, 26, 31, 31]
    assert buckets(1, 40, both_ways=False) == [0, 0]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (6, 4), (16, 50)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_transformers(num_buckets: int, max_distance: int, both_ways: bool):
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-300, 301)[None]
    theirs = T5Attention._relative_position_bucket(offsets, both_ways, num_buckets, max_distance)
    ours = relative_buckets(offsets, num_buckets, max_distance, both_ways=both_ways)
    assert torch.equal(ours, theirs)


def test_the_bias_is_one_number_per_bucket_and_head():
    bias = RelativeBias(2, 4, 8, both_ways=True)
    with torch.no_grad():
        bias.weight.copy_(torch.arange(8.0).view(4, 2))
    # Two buckets per direction: distance 0 and the others; behind the query 2 more. Bucket b, head h: 2b + h.
    assert bias(3)[0, 0].tolist() == [[0, 6, 6], [2, 0, 6], [2, 2, 0]]
    assert bias(3)[0, 1].tolist() == [[1, 7, 7], [3, 1, 7], [3, 3, 1]]
    # One query behind two keys: the last row of the same.
    assert torch.equal(bias(1, past=2), bias(3)[:, :, 2:])


def test_a_causal_bias_hides_what_follows():
    bias = RelativeBias(1, 4, 8, both_ways=False)(3)[0, 0]
    later = torch.ones(3, 3, dtype=torch.bool).triu(1)
    assert bool((bias[later] == -math.inf).all())
    assert bool(bias[~later].isfinite().all())


def test_attention_by_hand():
    # One query (1), keys 0 and log 3, no scale: weights e^(0 + b), e^(log 3 + 0) with b = log 2: 2/5 and 3/5.
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    v, bias = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1), torch.tensor([math.log(2), 0.0]).view(1, 1, 1, 2)
    assert attend_biased(q, k, v, bias).item() == pytest.approx(0.4 * 10 + 0.6 * 20)
    # Scaled by 2: e^b = 2 and e^(2 log 3) = 9, 2/11 and 9/11.
    assert attend_biased(q, k, v, bias, 2.0).item() == pytest.approx((2 * 10 + 9 * 20) / 11)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_query_that_sees_nothing_gets_nothing(gradient: bool):
    q, k, v = (torch.randn(2, 2, 3, 4).requires_grad_(gradient) for _ in range(3))
    mask = padding_bias(torch.tensor([[True, True, False], [False] * 3]), 2, 3, q)
    weight = torch.zeros(1, 2, 3, 3, requires_grad=gradient)
    y = attend_biased(q, k, v, weight + mask)
    assert not bool(y[1].any())
    weights = (q[0] @ k[0].transpose(-1, -2))[..., :2].softmax(-1)
    torch.testing.assert_close(y[0], weights @ v[0, :, :2])
    if gradient:
        y.square().sum().backward()
        assert all(bool(one.grad.isfinite().all()) for one in (q, k, v, weight))


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="num_buckets 2, max_distance 128; allowed: 2 or more buckets"):
        RelativeBias(1, 2, 128, both_ways=True)
    with pytest.raises(UserError, match="max_distance 8; allowed"):
        RelativeBias(1, 32, 8, both_ways=True)
    with pytest.raises(UserError, match="head_dim 0; allowed: 1 or more"):
        BiasedAttention(4, 1, 0)
    with pytest.raises(UserError, match=r"source_mask torch.bool \[2, 2\]; allowed: torch.bool \[2, 3\]"):
        padding_bias(torch.ones(2, 2, dtype=torch.bool), 2, 3, torch.zeros(1))
