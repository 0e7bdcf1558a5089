"""Loss-Free Balancing's router: which bias goes with which scores, its choice by hand, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router, router_info
from tests.oracle import group_limited as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens

LN3 = math.log(3)


def seeing(num_experts: int, num_selected: int, **options: object):
    """Return an fp64 router whose logits are its input."""
    router = build_router("loss_free", num_experts, num_experts, num_selected, **options).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def test_a_step_of_load_changes_the_choice_and_not_the_weights():
    # sigmoid of 0, ln 3, -ln 3: 1/2, 3/4, 1/4.
    router = seeing(3, 1, rate=0.3)
    x = torch.tensor([[0.0, LN3, -LN3]], dtype=torch.float64)
    chosen = router.route(x, RoutingCall()).assignment
    assert chosen.experts.tolist() == [[1]]
    assert chosen.weights.item() == pytest.approx(3 / 4)
    # Loads 0, 1, 0 about a mean of 1/3: b = .3, -.3, .3, and .8, .45, .55 are compared; 1/2 is the weight.
    router.rule.update(torch.tensor([0, 1, 0]), 1)
    chosen = router.route(x, RoutingCall()).assignment
    assert chosen.experts.tolist() == [[0]]
    assert chosen.weights.item() == pytest.approx(1 / 2)
    two = seeing(3, 2, rate=0.3, weights="renormalised").route(x, RoutingCall()).assignment
    assert two.weights[0].tolist() == pytest.approx([0.6, 0.4])


def test_nothing_learns_in_a_forward_pass():
    # The load of a batch must not steer that batch (it would look ahead): only `update` moves the bias.
    layer = MoELayer(4, 4, 2, 3, router="loss_free")
    state = {name: value.clone() for name, value in layer.router.state_dict().items()}
    y, _ = layer(torch.randn(5, 4))
    y.sum().backward()
    assert all(torch.equal(value, layer.router.state_dict()[name]) for name, value in state.items())
    assert router_info("loss_free").losses == ()


def test_softmax_scores_come_with_the_proportional_rule():
    assert build_router("loss_free", 4, 4, 2).rule.bias.rule == "sign"
    bias = build_router("loss_free", 4, 4, 2, scores="softmax").rule.bias
    assert (bias.rule, bias.normalised, bias.rate) == ("proportional", True, 0.001)
    signed = build_router("loss_free", 4, 4, 2, scores="softmax", bias_rule="sign", stop_after=3).rule.bias
    assert (signed.rule, signed.stop_after) == ("sign", 3)


@repeatable(200)
@given(
    given_tokens=routed_tokens(least_experts=2),
    kind=st.sampled_from(("sigmoid", "softmax")),
    form=st.sampled_from(("raw", "renormalised")),
    seed=st.integers(0, 1000),
)
def test_it_is_the_slow_rule(given_tokens: tuple, kind: str, form: str, seed: int):
    logits, mask = given_tokens
    num_experts = logits.shape[1]
    router = seeing(num_experts, 2, scores=kind, weights=form, rate=0.125, bias_rule="sign")
    source = torch.Generator().manual_seed(seed)
    bias = [0.0] * num_experts
    for _ in range(3):
        counts = torch.randint(0, 9, (num_experts,), generator=source)
        router.rule.update(counts, int(counts.sum()))
        bias = oracle.learn(bias, counts.tolist(), 0.125, "sign", False)
    ours, theirs = leaves(logits)
    found = router.route(ours, call_of(mask)).assignment
    expected = []
    for t in range(logits.shape[0]):
        if mask is not None and not mask[t]:
            expected.append(([], []))
            continue
        scores = oracle.scores_of(kind, list(theirs[t]))
        experts = oracle.choose(scores, bias, 2, 1, 1, "max")
        expected.append((experts, oracle.weigh(scores, experts, form, 1.0)))
    assert_same(found, expected, [(ours, theirs)])


def test_other_scores_are_refused():
    with pytest.raises(
        UserError, match="scores 'relu' for a router without losses; allowed: sigmoid, softmax"
    ):
        build_router("loss_free", 4, 4, 2, scores="relu")
