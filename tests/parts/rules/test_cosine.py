"""X-MoE: cosines over a learned temperature, in few dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatewright.errors import UserError
from gatewright.parts import RoutingCall, build_router
from gatewright.parts.rules.cosine import CosineRouter
from tests.oracle import cosine as oracle
from tests.oracle.moe import best
from tests.parts.harness import repeatable
from tests.parts.rules.against import assert_same, call_of


def router_of(
    experts: list[list[float]], temperature: float, gate: str = "softmax", num_selected: int = 1
) -> CosineRouter:
    """Return an fp64 router whose projection is the identity."""
    width = len(experts[0])
    router = build_router("cosine", width, len(experts), num_selected, gate=gate, routing_width=width)
    assert isinstance(router, CosineRouter)
    with torch.no_grad():
        router = router.double()
        router.projection.copy_(torch.eye(width))
        router.weight.copy_(torch.tensor(experts))
        router.temperature.fill_(temperature)
    return router


def tokens_of(*rows: list[float]) -> torch.Tensor:
    """Return fp64 tokens [T, D]."""
    return torch.tensor(rows, dtype=torch.float64)


# W h = (3, 4), of length 5. Scalar products with e: 6, 2, -3 pick expert 0; over |e| = 2, .5, 1 and 5 they
# are the cosines .6, .8, -.6 and pick expert 1.
EXPERTS, TOKEN = [[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]], [3.0, 4.0]


def test_the_angle_decides_and_not_the_length():
    router = router_of(EXPERTS, 0.5)
    assert router.cosines(tokens_of(TOKEN))[0].tolist() == pytest.approx([0.6, 0.8, -0.6])
    routed = router.route(tokens_of(TOKEN), RoutingCall())
    # Logits over tau .5: 1.2, 1.6, -1.2.
    total = math.exp(1.2) + math.exp(1.6) + math.exp(-1.2)
    expected = [math.exp(1.2) / total, math.exp(1.6) / total, math.exp(-1.2) / total]
    assert routed.scores[0].tolist() == pytest.approx(expected)
    assert expected == pytest.approx([0.387, 0.578, 0.035], abs=5e-4)
    assert routed.assignment.experts.tolist() == [[1]]
    assert routed.assignment.weights[0].tolist() == pytest.approx([0.578], abs=5e-4)


def test_the_sigmoid_gate_by_hand():
    # sigmoid(.8 / .5) = 1 / (1 + e^-1.6) = .832.
    routed = router_of(EXPERTS, 0.5, "sigmoid").route(tokens_of(TOKEN), RoutingCall())
    assert routed.assignment.experts.tolist() == [[1]]
    assert routed.assignment.weights.item() == pytest.approx(1 / (1 + math.exp(-1.6)))


@pytest.mark.parametrize(("gate", "tau0"), [("softmax", 0.3), ("sigmoid", 0.07)])
def test_the_loss_reads_a_fixed_temperature(gate: str, tau0: float):
    # softmax((.6, .8, -.6) / tau0) whatever tau is; padding adds nothing.
    powers = [math.exp(s / tau0) for s in (0.6, 0.8, -0.6)]
    expected = [power / sum(powers) for power in powers]
    for temperature in (0.5, 0.05, 0.001):
        router = router_of(EXPERTS, temperature, gate)
        call = RoutingCall(mask=torch.tensor([True, False, True]))
        routed = router.route(tokens_of(TOKEN, [1.0, -1.0], TOKEN), call)
        found = routed.assignment.sums["cosine_importance"]
        assert (found / 2).tolist() == pytest.approx(expected)


def test_scaling_tokens_and_experts_changes_nothing():
    router = router_of(EXPERTS, 0.3)
    before = router(tokens_of(TOKEN))
    torch.testing.assert_close(router(10 * tokens_of(TOKEN)), before, rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        router.weight.mul_(torch.tensor([[0.1], [7.0], [3.0]]))
    torch.testing.assert_close(router(tokens_of(TOKEN)), before, rtol=1e-14, atol=1e-14)


def test_without_a_temperature_the_gate_is_blunt():
    # One expert at cosine 1, 31 at -1: e / (e + 31 / e) = .192; at tau .3 it is .962.
    experts = [[1.0, 0.0]] + 31 * [[-1.0, 0.0]]
    for tau, expected in ((1.0, 0.192), (0.3, 0.962)):
        routed = router_of(experts, tau).route(tokens_of([2.0, 0.0]), RoutingCall())
        assert routed.assignment.weights.item() == pytest.approx(expected, abs=5e-4)


def test_a_zero_vector_has_cosine_zero_and_no_gradient():
    router = router_of([[2.0, 0.0], [0.0, 0.0]], 0.5)
    x = tokens_of([0.0, 0.0], TOKEN).requires_grad_()
    logits = router(x)
    assert logits[0].tolist() == [0.0, 0.0]
    assert logits[1].tolist() == pytest.approx([0.6 / 0.5, 0.0])
    logits.sum().backward()
    assert x.grad[0].tolist() == [0.0, 0.0]
    assert router.weight.grad[1].tolist() == [0.0, 0.0]
    # d cos(3, 4; 1, 0) / dh = (e - cos h/|h|) / |h| = ((1, 0) - .6 (.6, .8)) / 5, over tau.
    assert x.grad[1].tolist() == pytest.approx([(1 - 0.36) / 5 / 0.5, -0.48 / 5 / 0.5])


def test_the_temperature_never_falls_below_a_hundredth():
    router = router_of(EXPERTS, -3.0)
    assert router(tokens_of(TOKEN))[0].tolist() == pytest.approx([60.0, 80.0, -60.0])


def test_its_parameters_and_where_they_start():
    for gate, tau in (("softmax", 0.3), ("sigmoid", 0.07)):
        router = build_router("cosine", 10, 8, 1, gate=gate)
        shapes = {name: tuple(value.shape) for name, value in router.named_parameters()}
        assert shapes == {"weight": (8, 4), "projection": (4, 10), "temperature": (1,)}
        assert router.temperature.item() == pytest.approx(tau)
        assert router.projection.abs().max() > 0
    # One expert still has one dimension.
    assert build_router("cosine", 10, 1, 1).weight.shape == (1, 1)


@dataclass(frozen=True)
class Case:
    """A router and its tokens."""

    num_tokens: int
    width: int
    inner: int
    num_experts: int
    gate: str
    temperature: float
    masked: bool
    seed: int


CASES = st.builds(
    Case,
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(2, 3),  # in one dimension all cosines are 1 or -1, up to rounding
    st.integers(1, 5),
    st.sampled_from(("softmax", "sigmoid")),
    st.sampled_from((0.005, 0.07, 0.3, 1.0)),
    st.booleans(),
    st.integers(0, 10_000),
)


@repeatable(200)
@given(case=CASES, data=st.data())
def test_equals_the_oracle(case: Case, data: st.DataObject):
    num_selected = data.draw(st.integers(1, case.num_experts))
    router = CosineRouter(
        case.width, case.num_experts, num_selected, gate=case.gate, routing_width=case.inner
    ).double()
    draw = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter in (router.projection, router.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        router.temperature.fill_(case.temperature)
        if data.draw(st.booleans()):
            router.weight[0].zero_()
    x = torch.randn(case.num_tokens, case.width, generator=draw, dtype=torch.float64)
    mask = torch.rand(case.num_tokens, generator=draw) < 0.6 if case.masked else None
    ours = (x.clone().requires_grad_(), router.projection, router.weight, router.temperature)
    theirs = tuple(value.detach().clone().requires_grad_() for value in ours)
    weights = oracle.CosineWeights(*theirs[1:])
    expected, importance = [], [theirs[1].sum() * 0] * case.num_experts
    for t, token in enumerate(theirs[0]):
        if mask is not None and not mask[t]:
            expected.append(([], []))
            continue
        scores = oracle.scores(token, weights, case.gate)
        ids = best(scores, num_selected)
        expected.append((ids, [scores[e] for e in ids]))
        shares = oracle.fixed_shares(token, weights, case.gate)
        importance = [total + share for total, share in zip(importance, shares, strict=True)]
    found = router.route(ours[0], call_of(mask)).assignment
    sums = [(found.sums["cosine_importance"], torch.stack(importance))]
    assert_same(found, expected, list(zip(ours, theirs, strict=True)), sums)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "sofmax"}, "gate 'sofmax' is unknown; did you mean 'softmax'"),
        ({"routing_width": 0}, "routing_width 0; allowed: 1 or more"),
        ({"weights": "renormalised"}, "num_selected 1 with weights 'renormalised'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        build_router("cosine", 8, 4, 1, **options)
