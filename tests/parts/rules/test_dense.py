"""Dense mixture: all experts, the whole softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from gatewright.errors import UserError
from gatewright.parts import MoELayer, build_router
from gatewright.parts.rules.dense import Dense
from tests.oracle import moe as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens


def test_every_expert_weighs_its_share():
    # exp of (ln 2, ln 5, 0) is 2, 5, 1 with sum 8: experts 1, 0, 2 at 5/8, 2/8, 1/8.
    logits = torch.tensor([[math.log(2), math.log(5), 0.0]], dtype=torch.float64)
    chosen = Dense(3)(logits, torch.softmax(logits, -1), call_of())
    assert chosen.experts.tolist() == [[1, 0, 2]]
    assert chosen.weights[0].tolist() == pytest.approx([5 / 8, 2 / 8, 1 / 8])


def test_a_layer_is_the_sum_over_all_experts():
    # Logits are x = (ln 3, 0): gates 3/4, 1/4. relu experts: FFN_0 doubles the first entry, FFN_1 triples it.
    layer = MoELayer(2, 2, 2, 1, activation="relu", router="dense").double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
        layer.experts.w_in.copy_(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
        layer.experts.w_down.copy_(torch.tensor([[[2.0], [0.0]], [[3.0], [0.0]]]))
    y, stats = layer(torch.tensor([[math.log(3), 0.0]], dtype=torch.float64))
    assert y[0].tolist() == pytest.approx([(3 / 4 * 2 + 1 / 4 * 3) * math.log(3), 0.0])
    assert stats["router"].counts.tolist() == [1, 1]


@repeatable(200)
@given(case=routed_tokens())
def test_equals_the_oracle(case):
    logits, mask = case
    ours, theirs = leaves(logits)
    num_experts = logits.shape[1]
    expected = []
    for t, row in enumerate(theirs):
        ids = oracle.best(list(row), num_experts) if mask is None or mask[t] else []
        expected.append((ids, oracle.gates(list(row), ids, "raw")))
    found = Dense(num_experts)(ours, torch.softmax(ours, -1), call_of(mask))
    assert_same(found, expected, [(ours, theirs)])


def test_fewer_experts_are_refused():
    with pytest.raises(UserError, match="num_selected 2; allowed: 4, all experts"):
        build_router("dense", 8, 4, 2)
    assert build_router("dense", 8, 4, 4).rule.num_selected == 4
    assert build_router("dense", 8, 1, 1).rule.num_selected == 1
