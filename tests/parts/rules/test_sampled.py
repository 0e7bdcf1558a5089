"""Sampled choices: drawn from the softmax without replacement, weighted by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router
from gatewright.parts.draws import fold, gumbel
from gatewright.parts.noise import CHOICE_NOISE
from gatewright.parts.rules.sampled import Sampled
from tests.oracle import noise as oracle
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of, leaves, routed_tokens
from tests.parts.rules.noisy_cases import CPU

P = (0.5, 0.3, 0.2)
MANY = 40_000


def test_the_draw_is_from_the_scores_without_replacement():
    scores = torch.tensor([P], dtype=torch.float64).expand(MANY, 3)
    found = Sampled(2)(scores.log(), scores, call_of())
    pairs = torch.bincount(found.experts[:, 0] * 3 + found.experts[:, 1], minlength=9).view(3, 3)
    assert not pairs.diagonal().any()
    # First i with p_i, then j with p_j / (1 - p_i): after 0, 1 with .3 / .5 = .6 and 2 with .4;
    # after 1, 0 with .5 / .7; after 2, 0 with .5 / .8.
    for i in range(3):
        for j in range(3):
            if i != j:
                chance = P[i] * P[j] / (1 - P[i])
                spread = (chance * (1 - chance) / MANY) ** 0.5
                assert abs(pairs[i, j].item() / MANY - chance) < 4 * spread, (i, j)
    assert pairs[0, 1].item() / pairs[0].sum().item() == pytest.approx(0.6, abs=0.015)


def test_weights_by_hand():
    scores = torch.tensor([P], dtype=torch.float64).expand(100, 3)
    raw = Sampled(2)(scores.log(), scores, call_of())
    even = Sampled(2, "renormalised")(scores.log(), scores, call_of())
    # Experts 0 and 1: .3 / .8 = .375 is the second's; 0 and 2: .2 / .7 = .286; 1 and 2: .2 / .5 = .4.
    second = {(0, 1): 0.375, (0, 2): 0.2 / 0.7, (1, 2): 0.4, (1, 0): 0.625, (2, 0): 0.5 / 0.7, (2, 1): 0.6}
    assert {tuple(pair) for pair in raw.experts.tolist()} == set(second)
    for pair, plain, normal in zip(raw.experts.tolist(), raw.weights, even.weights, strict=True):
        assert plain.tolist() == [P[pair[0]], P[pair[1]]]
        assert normal.tolist() == pytest.approx([1 - second[tuple(pair)], second[tuple(pair)]])


def test_evaluation_takes_the_best():
    scores = torch.tensor([P], dtype=torch.float64).expand(50, 3)
    found = Sampled(2)(scores.log(), scores, RoutingCall(training=False, key=torch.tensor(1)))
    assert found.experts.tolist() == [[0, 1]] * 50
    assert found.weights.tolist() == [[0.5, 0.3]] * 50


def test_an_impossible_expert_is_drawn_last():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(200, 3)
    found = Sampled(3)(logits, torch.softmax(logits, -1), call_of())
    assert (found.experts[:, 2] == 1).all()


@repeatable(200)
@given(
    case=routed_tokens(),
    form=st.sampled_from(("raw", "renormalised")),
    training=st.booleans(),
    data=st.data(),
)
def test_equals_the_oracle(case, form, training, data):
    logits, mask = case
    num_tokens, num_experts = logits.shape
    least = 1 if form == "raw" or num_experts == 1 else 2
    num_selected = data.draw(st.integers(least, num_experts))
    ours, theirs = leaves(logits)
    key = data.draw(st.integers(0, 10_000))
    lots = gumbel(fold(torch.tensor(key), CHOICE_NOISE), (num_tokens, num_experts), CPU, torch.float64)
    lots = lots if training else torch.zeros_like(lots)
    expected = []
    for t, row in enumerate(theirs):
        chosen, weights = oracle.drawn(list(row), lots[t], num_selected)
        if form == "renormalised":
            total = sum(weights[1:], weights[0])
            weights = [weight / total for weight in weights]
        real = mask is None or bool(mask[t])
        expected.append((chosen, weights) if real else ([], []))
    found = Sampled(num_selected, form)(ours, torch.softmax(ours, -1), call_of(mask, training, key))
    assert_same(found, expected, [(ours, theirs)])


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="weights 'softmax_selected'; allowed: raw, renormalised"):
        build_router("sampled", 8, 4, 2, weights="softmax_selected")
    with pytest.raises(UserError, match="makes every gate exactly 1"):
        build_router("sampled", 8, 4, 1, weights="renormalised")
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4"):
        build_router("sampled", 8, 4, 5)
