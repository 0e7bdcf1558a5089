"""SelectionBias: steps worked by hand, what a cast, a stop and a checkpoint leave of it, and its purpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router, count_assignments
from gatewright.parts.selection_bias import SelectionBias
from tests.oracle import group_limited as oracle
from tests.parts.harness import repeatable

# Mean 4: e_i = mean - c_i = -6, 2, 0, 4.
COUNTS = torch.tensor([10, 2, 4, 0])


def test_signs_move_every_expert_by_the_rate():
    bias = SelectionBias(4, rate=0.5)
    bias.update(COUNTS, 16)
    assert bias.bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    bias.update(torch.tensor([1, 5, 5, 5]), torch.tensor(16))
    assert bias.bias.tolist() == [0.0, 0.0, -0.5, 0.0]
    assert int(bias.updates) == 2


def test_the_proportional_rule_moves_by_what_is_missing():
    bias = SelectionBias(4, rate=0.25, rule="proportional")
    bias.update(COUNTS, 16)
    assert bias.bias.tolist() == [-1.5, 0.5, 0.0, 1.0]
    normalised = SelectionBias(4, rate=0.25, rule="proportional", normalised=True)
    normalised.update(COUNTS, 16)
    assert normalised.bias.tolist() == [-1.5 / 4, 0.5 / 4, 0.0, 1.0 / 4]


def test_ten_times_the_batch_moves_the_normalised_rule_alike_and_the_printed_one_ten_times_as_far():
    for normalised, factor in ((True, 1), (False, 10)):
        small = SelectionBias(4, rule="proportional", normalised=normalised)
        large = SelectionBias(4, rule="proportional", normalised=normalised)
        small.update(COUNTS, 16)
        large.update(10 * COUNTS, 160)
        torch.testing.assert_close(large.bias, factor * small.bias)


def test_a_balanced_load_has_no_sign_however_many_tokens():
    # 2**24 + 1 is not an fp32 number: a mean in fp32 would be off by one token.
    bias = SelectionBias(3)
    bias.update(torch.full((3,), 2**24 + 1), 3 * 2**24 + 3)
    assert bias.bias.tolist() == [0.0, 0.0, 0.0]


def test_no_tokens_move_nothing():
    for rule in ("sign", "proportional"):
        for normalised in (False, True):
            bias = SelectionBias(2, rule=rule, normalised=normalised)
            bias.update(torch.zeros(2, dtype=torch.int64), 0)
            assert bias.bias.tolist() == [0.0, 0.0]


def test_it_stops_after_so_many_updates_and_goes_on_counting():
    bias = SelectionBias(4, rate=1.0, stop_after=2)
    stopped = []
    for _ in range(4):
        stopped.append(bias.stopped)
        bias.update(COUNTS, 16)
    assert bias.bias.tolist() == [-2.0, 2.0, 0.0, 2.0]
    assert int(bias.updates) == 4
    assert stopped == [False, False, True, True]
    bias = SelectionBias(4, rate=1.0)
    bias.rate = 0.0
    bias.update(COUNTS, 16)
    assert bias.stopped
    assert not bias.bias.any()


def test_it_selects_without_gradient_and_nothing_of_it_is_a_parameter():
    bias = SelectionBias(2, rate=1.0)
    bias.update(torch.tensor([0, 2]), 2)
    scores = torch.tensor([[0.25, 0.5]], requires_grad=True)
    biased = bias(scores)
    assert biased.tolist() == [[1.25, -0.5]]
    assert not biased.requires_grad
    assert list(bias.parameters()) == []
    assert set(bias.state_dict()) == {"bias", "updates"}


def test_a_cast_of_the_model_leaves_its_numbers_alone():
    model = nn.Sequential(nn.Linear(2, 2), SelectionBias(2, rate=1 / 3))
    bias = model[1]
    bias.update(torch.tensor([0, 2]), 2)
    before = bias.bias.clone()
    for cast in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(cast)
        assert model[0].weight.dtype == cast
        assert bias.bias.dtype == torch.float32
        assert bias.updates.dtype == torch.int64
        assert torch.equal(bias.bias, before)
    assert bias(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_checkpoint_carries_it():
    saved = SelectionBias(4, rate=1.0, stop_after=2)
    for _ in range(2):
        saved.update(COUNTS, 16)
    loaded = SelectionBias(4, rate=1.0, stop_after=2)
    loaded.load_state_dict(saved.state_dict())
    loaded.update(COUNTS, 16)
    assert torch.equal(loaded.bias, saved.bias)


@repeatable(200)
@given(
    loads=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), max_size=5),
    rule=st.sampled_from(("sign", "proportional")),
    normalised=st.booleans(),
)
def test_it_moves_as_the_slow_one_does(loads: list[list[int]], rule: str, normalised: bool):
    bias = SelectionBias(3, rate=0.01, rule=rule, normalised=normalised)
    expected = [0.0, 0.0, 0.0]
    for counts in loads:
        bias.update(torch.tensor(counts), sum(counts))
        expected = oracle.learn(expected, counts, 0.01, rule, normalised)
    assert bias.bias.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("scores", "options"), [("sigmoid", {"rate": 0.01}), ("softmax", {"rate": 0.01})], ids=["sign", "softmax"]
)
def test_it_balances_a_router_that_prefers_few_experts(scores: str, options: dict[str, float]):
    torch.manual_seed(0)
    router = build_router("loss_free", 8, 8, 2, scores=scores, **options)
    x = torch.randn(512, 8) + 1

    def violation() -> tuple[float, torch.Tensor]:
        with torch.no_grad():
            counts = count_assignments(router.route(x, RoutingCall(training=True)).assignment)
        # MaxVio (Loss-Free Balancing eq 4): (max load - mean load) / mean load.
        return (counts.max() / counts.double().mean() - 1).item(), counts

    before = violation()[0]
    for _ in range(300):
        router.rule.update(violation()[1], 512)
    assert before > 0.8
    assert violation()[0] < 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_experts": 0}, "num_experts 0"),
        ({"rate": -0.1}, "rate -0.1"),
        ({"rate": float("nan")}, "rate nan"),
        ({"rule": "sgn"}, "did you mean 'sign'"),
        ({"stop_after": -1}, "stop_after -1"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], said: str):
    with pytest.raises(UserError, match=said):
        SelectionBias(**{"num_experts": 2, **options})


def test_loads_of_other_experts_are_refused():
    with pytest.raises(UserError, match=r"counts of \(3,\) for a bias of \(2,\)"):
        SelectionBias(2).update(torch.zeros(3, dtype=torch.int64), 0)
