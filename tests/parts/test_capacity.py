"""How many places an expert has: every convention by hand, exact ceilings, and what is refused."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import Capacity
from tests.oracle import dispatch as oracle
from tests.parts.harness import repeatable

FACTORS = (0.01, 0.3, 0.5, 1.0, 1.1, 1.25, 2.0, 1 / 3, 2 / 3, math.pi, 1e-30)


@pytest.mark.parametrize(
    ("capacity", "num_selected", "num_tokens", "num_experts", "places"),
    [
        (Capacity(1.0), 2, 16, 8, 4),  # GShard: 2 S / E = 2 * 16 / 8 is f = 1 here
        (Capacity(1.25), 2, 64, 8, 20),  # 1.25 * 2 * 64 / 8
        (Capacity(1.25, per_token=True), 2, 64, 8, 10),  # Switch, ST-MoE: 1.25 * 64 / 8
        (Capacity(1.25, per_token=True), 1, 64, 8, 10),  # for K = 1 the two agree
        (Capacity(1.25), 1, 64, 8, 10),
        (Capacity(1.05, multiple=4), 1, 50, 8, 8),  # V-MoE: 1.05 * 50 / 8 = 6.56 -> 7 -> 8, above the nominal
        (Capacity(0.5, multiple=4), 1, 8, 8, 4),  # 0.5 -> 1 -> 4: small groups get eight times what f says
        (Capacity(1.0, multiple=4), 1, 64, 8, 8),  # a multiple stays what it is
        (Capacity(1.0, minimum=4), 1, 8, 8, 4),  # Mesh-TensorFlow's least number
        (Capacity(1.0, minimum=4), 1, 64, 8, 8),  # which binds small groups alone
        (Capacity(1.0, minimum=5, multiple=4), 1, 8, 8, 8),  # 1 -> 5 -> 8
        (Capacity(1.1), 1, 50, 1, 55),  # in floats 55.00000000000001
        (Capacity(1.0), 1, 0, 8, 0),
    ],
)
def test_places_by_hand(
    capacity: Capacity, num_selected: int, num_tokens: int, num_experts: int, places: int
):
    assert capacity.places(num_selected, num_tokens, num_experts, True) == places
    groups = capacity.places_of_groups(num_selected, torch.tensor([num_tokens]), num_experts, True)
    assert groups.tolist() == [places]


def test_training_and_evaluation_have_their_own_factors():
    switch = Capacity(1.25, eval_factor=2.0)
    assert switch.places(1, 64, 8, True) == 10
    assert switch.places(1, 64, 8, False) == 16
    assert switch.places_of_groups(1, torch.tensor([64]), 8, False).tolist() == [16]
    assert Capacity(1.25).places(1, 64, 8, False) == 10, "without its own, evaluation has the same"
    assert Capacity(1.25).factor_in(False) == 1.25
    dropless = Capacity(1.25, eval_factor=math.inf)
    assert dropless.factor_in(True) == 1.25
    assert dropless.factor_in(False) is None
    assert switch.with_factor(3.0).places(1, 64, 8, False) == 24


def test_a_share_of_real_tokens_is_each_group_s_own():
    # 1.25 * 2 * n / 4 = 0.625 n for n = 8, 5, 1, 0 real tokens: 5, 3.125, 0.625, 0.
    tokens = torch.tensor([8, 5, 1, 0])
    assert Capacity(1.25).places_of_groups(2, tokens, 4, True).tolist() == [5, 4, 1, 0]
    assert Capacity(1.25, minimum=2).places_of_groups(2, tokens, 4, True).tolist() == [5, 4, 2, 2]
    assert Capacity(1.25, multiple=4).places_of_groups(2, tokens, 4, True).tolist() == [8, 4, 4, 0]


@repeatable(300)
@given(
    factor=st.sampled_from(FACTORS),
    num_selected=st.integers(1, 8),
    tokens=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    num_experts=st.integers(1, 9),
    minimum=st.integers(0, 5),
    multiple=st.integers(1, 5),
    per_token=st.booleans(),
)
def test_places_are_the_exact_ceiling(
    factor: float,
    num_selected: int,
    tokens: list[int],
    num_experts: int,
    minimum: int,
    multiple: int,
    per_token: bool,
):
    capacity = Capacity(factor, None, minimum, multiple, per_token)
    counted = 1 if per_token else num_selected
    exact = [oracle.places(str(factor), n, num_experts, counted, minimum, multiple) for n in tokens]
    assert [capacity.places(num_selected, n, num_experts, True) for n in tokens] == exact
    groups = capacity.places_of_groups(num_selected, torch.tensor(tokens), num_experts, True)
    assert groups.dtype == torch.int64
    assert groups.tolist() == exact


@pytest.mark.parametrize("factor", [1 / 3, 2 / 3, 0.1 + 0.2, 1e-17, 123456.78901234567, 1e300])
def test_long_decimals_stay_exact_in_big_groups(factor: float):
    # 0.3333333333333333 * K * T has a numerator of 10^20, beyond int64.
    tokens = [1, 3, 8191, 8192, 999_999, 2**20, 3 * 2**20, 2**30 - 1]
    groups = Capacity(factor).places_of_groups(8, torch.tensor(tokens), 7, True).tolist()
    if factor < 1e300:
        assert groups == [Capacity(factor).places(8, n, 7, True) for n in tokens]
    else:
        assert all(found >= 8 * n for found, n in zip(groups, tokens, strict=True)), "nothing can drop"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"factor": 0.0}, "capacity_factor 0.0; allowed: above 0, or none for dropless"),
        ({"factor": -1.0}, "capacity_factor -1.0; allowed: above 0"),
        ({"factor": math.nan}, "capacity_factor nan; allowed: above 0"),
        ({"factor": math.inf}, "capacity_factor inf; allowed: above 0, or none for dropless"),
        ({"eval_factor": 0.0}, "eval_factor 0.0; allowed: above 0, or inf for dropless"),
        ({"eval_factor": math.nan}, "eval_factor nan; allowed: above 0"),
        ({"minimum": -1}, "minimum -1, multiple 1; allowed: a minimum of 0 or more, a multiple of 1"),
        ({"multiple": 0}, "minimum 0, multiple 0; allowed"),
    ],
)
def test_what_no_layer_can_have_is_refused(options: dict[str, object], reason: str):
    with pytest.raises(UserError, match=reason) as caught:
        Capacity(**{"factor": 1.0, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_order_is_refused():
    one = Capacity(1.0)
    # Past the types, which tests check and programs do not.
    object.__setattr__(one, "order", "ranks")
    reason = r"order 'ranks' is unknown; did you mean 'rank'\?; allowed: position, rank, batch_priority"
    with pytest.raises(UserError, match=reason):
        one.__post_init__()


def test_a_capacity_is_a_value():
    one = Capacity(1.25, eval_factor=2.0, order="rank")
    assert one == Capacity(1.25, 2.0, order="rank")
    assert hash(one) == hash(Capacity(1.25, 2.0, order="rank"))
    assert replace(one, factor=2.0).places(1, 8, 4, True) == 4
    assert pickle.loads(pickle.dumps(one)).places(1, 64, 8, False) == 16
    assert "_exact" not in repr(one)
