"""gpt-oss: a learned bias, the best logits, a softmax over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router
from gatewright.parts.rules.gpt_oss import LogitChoice
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens

LN2, LN3, LN5 = math.log(2), math.log(3), math.log(5)


def test_softmax_over_the_chosen_logits_alone():
    # The two best logits, ln 5 and ln 3, share 5 / 8 and 3 / 8, whatever the others are.
    logits = torch.tensor([[LN3, 0.0, LN5, LN2]], dtype=torch.float64)
    chosen = LogitChoice(2)(logits, logits, call_of())
    assert chosen.experts.tolist() == [[2, 0]]
    assert chosen.weights[0].tolist() == pytest.approx([5 / 8, 3 / 8])


def test_the_bias_takes_part_in_the_choice_and_in_the_weights():
    # W x = (ln 3, ln 2, 0) with b = (0, 0, ln 5): experts 2 and 0 at 5 / 8 and 3 / 8.
    router = build_router("gpt_oss", 3, 3, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.bias.copy_(torch.tensor([0.0, 0.0, LN5]))
    routed = router.route(torch.tensor([[LN3, LN2, 0.0]], dtype=torch.float64), RoutingCall())
    assert routed.assignment.experts.tolist() == [[2, 0]]
    assert routed.assignment.weights[0].tolist() == pytest.approx([5 / 8, 3 / 8])
    # Balance losses see the softmax over all: 3, 2, 5 of 10.
    assert routed.probabilities[0].tolist() == pytest.approx([3 / 10, 2 / 10, 5 / 10])
    routed.assignment.weights[0, 0].backward()
    # d w_2 / d l over the chosen: 5/8 (1 - 5/8), -5/8 3/8; expert 1 gets none.
    assert router.bias.grad.tolist() == pytest.approx([-15 / 64, 0.0, 15 / 64])


def test_logits_that_vanish_in_the_softmax_are_still_told_apart():
    # exp(-200) is 0 in fp32: by probability experts 1 and 2 would tie, and the lower id would win.
    router = build_router("gpt_oss", 3, 3, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routed = router.route(torch.tensor([[0.0, -300.0, -200.0]]), RoutingCall())
    assert routed.probabilities[0].tolist() == [1.0, 0.0, 0.0]
    assert routed.assignment.experts.tolist() == [[0, 2]]


def test_the_bias_starts_at_zero():
    assert build_router("gpt_oss", 4, 8, 2).bias.tolist() == [0.0] * 8


@repeatable(200)
@given(case=routed_tokens(2), data=st.data())
def test_equals_the_oracle(case, data):
    logits, mask = case
    num_selected = data.draw(st.integers(2, logits.shape[1]))
    ours, theirs = leaves(logits)
    expected = []
    for t, row in enumerate(theirs):
        ids = oracle.best(list(row), num_selected) if mask is None or mask[t] else []
        expected.append((ids, oracle.gates(list(row), ids, "softmax_selected") if ids else []))
    assert_same(LogitChoice(num_selected)(ours, ours, call_of(mask)), expected, [(ours, theirs)])


def test_a_constant_gate_is_refused():
    with pytest.raises(UserError, match="num_selected 1 with weights 'softmax_selected'"):
        build_router("gpt_oss", 8, 4, 1)
