"""V-MoE: little noise, raw weights, capacity in multiples of 4, importance without noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from gatewright.errors import UserError
from gatewright.parts import MoELayer, RoutingCall, build_router
from gatewright.parts.draws import fold, normal
from gatewright.parts.noise import LOGIT_NOISE
from tests.oracle import noise as oracle
from tests.oracle.moe import best, softmax
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same
from tests.parts.rules.noisy_cases import CPU, NoisyCase, add, draw_weights, noisy_cases, twin
from tests.parts.rules.test_noisy_top_k import still

LN2 = math.log(2)


def test_weights_importance_and_load_by_hand(monkeypatch: pytest.MonkeyPatch):
    still(monkeypatch)
    router = build_router("vmoe", 4, 4, 2, std=LN2).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    # e^logits = 4, 2, 1, 1: a softmax of 1/2, 1/4, 1/8, 1/8, of which the first two are the weights.
    x = torch.tensor([[2 * LN2, LN2, 0, 0]], dtype=torch.float64)
    found = router.route(x, RoutingCall(training=True, key=torch.tensor(0))).assignment
    assert found.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(found.weights, torch.tensor([[0.5, 0.25]]).double())
    torch.testing.assert_close(found.sums["importance"], torch.tensor([0.5, 0.25, 0.125, 0.125]).double())
    # The second highest is ln 2 for all, the chosen too: z = 1, 0, -1, -1.
    load = torch.tensor([0.84134, 0.5, 0.15866, 0.15866]).double()
    torch.testing.assert_close(found.sums["load"], load, rtol=0, atol=1e-5)


def test_noise_moves_scores_but_not_importance():
    router = build_router("vmoe", 4, 4, 2, std=5.0).double()
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routed = router.route(x, RoutingCall(training=True, key=torch.tensor(0)))
    clean = torch.softmax(router(x), dim=-1)
    torch.testing.assert_close(routed.assignment.sums["importance"], clean.sum(dim=0))
    assert not torch.allclose(routed.probabilities, clean)
    assert build_router("vmoe", 4, 4, 2).noise.std is None


def test_capacity_is_rounded_up_to_a_multiple_of_4():
    capacity = MoELayer(8, 8, 2, 4, router="vmoe").capacity
    assert capacity is not None
    # 1.05 * 2 * 50 / 8 = 13.125 -> 14 -> 16; eight images of 50 patches: 105 -> 108.
    assert capacity.places(2, 50, 8, training=True) == 16
    assert capacity.places(2, 400, 8, training=False) == 108
    assert capacity.order == "rank"
    imagenet = build_router("vmoe", 8, 8, 2, eval_factor=4.0).capacity
    assert imagenet is not None
    assert imagenet.places(2, 50, 8, training=False) == 52  # 4 * 2 * 50 / 8 = 50 -> 52


@pytest.mark.parametrize(("priority", "kept"), [(False, [0, 1, 2, 3]), (True, [2, 4, 5, 7])])
def test_batch_priority_keeps_the_tokens_that_are_sure(priority: bool, kept: list[int]):
    router = build_router("vmoe", 2, 2, 1, batch_priority=priority, factor=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    # All eight tokens want expert 0, which has ceil(.5 * 8 / 2) = 2 places, rounded up to 4.
    x = torch.tensor([[1.0, 0], [2, 0], [7, 0], [3, 0], [9, 0], [6, 0], [4, 0], [8, 0]])
    y, stats = MoELayer(2, 2, 1, 3, router=router).eval()(x)
    assert stats["router"].kept.tolist() == [4, 0]
    assert y.any(dim=1).nonzero().flatten().tolist() == kept


def test_without_noise_there_are_no_sums_of_its_own():
    router = build_router("vmoe", 3, 4, 2, noise=False)
    assert router.route(torch.randn(5, 3), RoutingCall(training=True)).assignment.sums == {}


def expected(case: NoisyCase, leaves: list[Tensor]) -> tuple[list, list[Tensor], list[Tensor]]:
    """Return the oracle's choices, importance and load."""
    x, gate = leaves
    std = 1 / case.num_experts
    lots = normal(fold(case.call.key, LOGIT_NOISE), (len(x), case.num_experts), CPU, torch.float64)
    choices = []
    importance = load = [x.sum() * 0] * case.num_experts
    for t in range(len(x)):
        if not case.real(t):
            choices.append(([], []))
            continue
        clean = [oracle.dot(row, x[t]) for row in gate]
        noisy = [value + std * lot.item() for value, lot in zip(clean, lots[t], strict=True)]
        scores = softmax(noisy if case.training else clean)
        chosen = best(scores, case.num_selected)
        choices.append((chosen, [scores[e] for e in chosen]))
        importance = add(importance, softmax(clean))
        stds = [torch.tensor(std, dtype=torch.float64)] * case.num_experts
        load = add(load, oracle.load(clean, noisy, stds, case.num_selected, excluding=False))
    return choices, importance, load


@repeatable(200)
@given(case=noisy_cases(constant=True))
def test_equals_the_oracle(case: NoisyCase):
    router = build_router("vmoe", 3, case.num_experts, case.num_selected)
    draw_weights(router, case.seed)
    ours = [twin(case.x), router.weight]
    theirs = [twin(leaf) for leaf in ours]
    choices, importance, load = expected(case, theirs)
    found = router.route(ours[0], case.call).assignment
    wanted = {"importance": importance, "load": load} if case.training else {}
    assert found.sums.keys() == wanted.keys()
    sums = [(found.sums[name], torch.stack(values)) for name, values in wanted.items()]
    assert_same(found, choices, list(zip(ours, theirs, strict=True)), sums)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="num_selected 5 with num_experts 4"):
        build_router("vmoe", 8, 4, 5)
    with pytest.raises(UserError, match=r"std 0.0; allowed: above 0"):
        build_router("vmoe", 8, 4, 2, std=0.0)
    with pytest.raises(UserError, match=r"capacity_factor -1.0; allowed"):
        build_router("vmoe", 8, 4, 2, factor=-1.0)
