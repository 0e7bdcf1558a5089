"""Llama-4: the best raw logit, sigmoid as weight, on the expert's input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import MoELayer, build_router
from gatewright.parts.rules.llama4 import SigmoidInput
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens


def test_the_best_logit_is_taken_at_its_sigmoid_on_the_input():
    # sigmoid(ln 3) = 3 / (3 + 1), sigmoid(-ln 4) = 1 / (1 + 4).
    logits = torch.tensor([[0.0, math.log(3), -1.0], [-math.log(4), -2.0, -3.0]], dtype=torch.float64)
    chosen = SigmoidInput()(logits, torch.sigmoid(logits), call_of())
    assert chosen.experts.tolist() == [[1], [0]]
    assert chosen.weights.flatten().tolist() == pytest.approx([3 / 4, 1 / 5])
    assert chosen.weight_side == "input"


def test_saturated_sigmoids_do_not_tie():
    # In fp32 sigmoid(20) and sigmoid(30) are both 1; the choice is made on the logits.
    logits = torch.tensor([[20.0, 30.0, 25.0]])
    assert torch.sigmoid(logits).tolist() == [[1.0, 1.0, 1.0]]
    chosen = SigmoidInput(2)(logits, torch.sigmoid(logits), call_of())
    assert chosen.experts.tolist() == [[1, 2]]


def test_one_expert_trains_the_router():
    # d sigmoid(l) / dl at l = ln 3: 3/4 (1 - 3/4).
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    chosen = SigmoidInput()(logits, torch.sigmoid(logits), call_of())
    (gradient,) = torch.autograd.grad(chosen.weights.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.0, 3 / 16])


def test_the_weight_passes_through_the_activation():
    # Logits are x = (ln 3, 0): expert 0 at w = 3/4 is given 3/4 ln 3. swiglu with gate = up = that entry z:
    # silu(z) z, which is not 3/4 silu(ln 3) ln 3.
    layer = MoELayer(2, 2, 1, 1, router="llama4").double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
        layer.experts.w_in.copy_(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]] * 2))
        layer.experts.w_down.copy_(torch.tensor([[[1.0], [0.0]]] * 2))
    y, _ = layer(torch.tensor([[math.log(3), 0.0]], dtype=torch.float64))
    z = 3 / 4 * math.log(3)
    assert y[0].tolist() == pytest.approx([z * z / (1 + math.exp(-z)), 0.0])


@repeatable(200)
@given(case=routed_tokens(), data=st.data())
def test_equals_the_oracle(case, data):
    logits, mask = case
    num_selected = data.draw(st.integers(1, logits.shape[1]))
    ours, theirs = leaves(logits)
    expected = []
    for t, row in enumerate(theirs):
        ids = oracle.best(list(row), num_selected) if mask is None or mask[t] else []
        expected.append((ids, [1 / (1 + (-row[e]).exp()) for e in ids]))
    found = SigmoidInput(num_selected)(ours, torch.sigmoid(ours), call_of(mask))
    assert_same(found, expected, [(ours, theirs)])


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4; allowed: 1 to 4"):
        build_router("llama4", 8, 4, 5)
