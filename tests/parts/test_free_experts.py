"""Free experts: MoE++'s worked numbers, the oracle, and that no row is gathered for them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, runnable_backends
from gatewright.parts import Assignment, Experts, MoELayer, Stats, make_plan
from gatewright.parts.free_experts import FreeExperts
from gatewright.parts.nested_experts import ModuleExperts
from tests.kernels.plans import gradients
from tests.kernels.test_variants import near
from tests.oracle.experts import free_experts, mixture
from tests.parts.harness import repeatable
from tests.parts.test_experts import filled


class Recorder(nn.Module):
    """Experts that return twice the input, and note the plans that they are given."""

    num_experts = 2

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[DispatchPlan] = []

    def forward(self, x: Tensor, plan: DispatchPlan, weights: Tensor, backend: str | None = None) -> Tensor:
        """Return sum_k w_k 2 x over the kept choices."""
        self.plans.append(plan)
        return 2 * x * torch.where(plan.slots >= 0, weights, 0).sum(dim=1, keepdim=True)


def test_moe_plus_plus_by_hand():
    # P = (.4 FFN 1, .2 FFN 2, .1 copy, .3 zero), top 2 without renormalising: FFN 1 and zero, so .4 f(x);
    # the authors' code would give 1.0 f(x). Here f(x) = 2 x.
    experts = FreeExperts(Recorder(), ("copy", "zero"), width=2)
    x = torch.tensor([[2.0, -1.0], [2.0, -1.0]])
    assignment = Assignment(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0.4, 0.3], [0.2, 0.1]]), 4)
    y = experts(x, make_plan(assignment), assignment.weights)
    # Token 1 takes FFN 2 and copy: .2 * 2 x + .1 x = .5 x.
    torch.testing.assert_close(y, torch.tensor([[0.8 * 2, 0.8 * -1], [0.5 * 2, 0.5 * -1]]))


def test_a_constant_expert_by_hand():
    # x = (2, -1), v = (1, 1), W_c x = (ln 3, 0): a = (3/4, 1/4), out = 3/4 x + 1/4 v = (1.75, -.5).
    experts = FreeExperts(Recorder(), ("constant",), width=2)
    assert experts.w_constant is not None
    assert experts.v_constant is not None
    with torch.no_grad():
        experts.w_constant.copy_(torch.tensor([[[math.log(3) / 2, 0.0], [0.0, 0.0]]]))
        experts.v_constant.fill_(1.0)
    x = torch.tensor([[2.0, -1.0]])
    assignment = Assignment(torch.tensor([[2]]), torch.ones(1, 1), 3)
    y = experts(x, make_plan(assignment), assignment.weights)
    torch.testing.assert_close(y, torch.tensor([[1.75, -0.5]]))
    # A weight of 2 on the input: it is given (4, -2), W_c of it (2 ln 3, 0), a = (9/10, 1/10).
    plan = replace(make_plan(assignment), weight_side="input")
    y = experts(x, plan, 2 * assignment.weights)
    torch.testing.assert_close(y, torch.tensor([[0.9 * 4 + 0.1, 0.9 * -2 + 0.1]]))


def test_no_row_is_gathered_for_a_free_expert():
    ffn = Recorder()
    experts = FreeExperts(ffn, ("zero", "copy"), width=3)
    places = torch.tensor([[0, 2], [3, 1], [2, 3], [1, -1]])
    weights = torch.rand(4, 2)
    experts(torch.randn(4, 3), make_plan(Assignment(places, weights, 4)), weights)
    (plan,) = ffn.plans
    # Rows: token 0 to expert 0, tokens 1 and 3 to expert 1; five places are free or empty.
    assert plan.token_ids.tolist() == [0, 1, 3]
    assert plan.counts.tolist() == [1, 2]
    assert plan.slots.tolist() == [[0, -1], [-1, 1], [-1, -1], [2, -1]]
    assert not plan.all_kept
    ffn.plans.clear()
    only = torch.tensor([[0, 1], [1, 0]])
    experts(torch.randn(2, 3), make_plan(Assignment(only, weights[:2], 4)), weights[:2])
    assert ffn.plans[0].all_kept


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """Draw a small case."""
    num_ffn = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(("zero", "copy", "constant")), min_size=1, max_size=4))
    total = num_ffn + len(kinds)
    num_places = draw(st.integers(1, total))
    ids = st.lists(st.integers(-1, total - 1), min_size=num_places, max_size=num_places)
    once = ids.filter(lambda row: len({e for e in row if e >= 0}) == sum(e >= 0 for e in row))
    num_tokens = draw(st.integers(0, 5))
    return {
        "places": draw(st.lists(once, min_size=num_tokens, max_size=num_tokens)),
        "num_ffn": num_ffn,
        "kinds": kinds,
        "width": draw(st.integers(1, 5)),
        "side": draw(st.sampled_from(("output", "input"))),
        "static": draw(st.booleans()),
        "seed": draw(st.integers(0, 10_000)),
    }


@given(case=drawn(), backend=st.sampled_from(list(runnable_backends())))
@repeatable(250)
def test_output_and_gradients_equal_the_oracle(case: dict, backend: str):
    check(case, backend)


def check(case: dict, backend: str) -> None:
    """Hold one case against the oracle."""
    places, width, side = case["places"], case["width"], case["side"]
    ffn = Experts(width, case["num_ffn"], 3, "gelu", bias=True)
    experts = filled(FreeExperts(ffn, case["kinds"]), case["seed"])
    draw = torch.Generator().manual_seed(case["seed"])
    ids = torch.tensor(places, dtype=torch.int64).reshape(len(places), len(places[0]) if places else 1)
    x = torch.randn(len(places), width, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=draw).requires_grad_()
    plan = make_plan(Assignment(ids, weights, experts.num_experts, side), static=case["static"])
    y = experts(x, plan, weights, backend)
    of_ffn = [[e if e < case["num_ffn"] else -1 for e in row] for row in places]
    expected = mixture(
        x, of_ffn, weights, ffn.w_in, ffn.w_down, "gelu", b_in=ffn.b_in, b_down=ffn.b_down, side=side
    )
    none = torch.zeros(0, 2, width, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64)
    w, v = none if experts.w_constant is None else (experts.w_constant, experts.v_constant)  # type: ignore[misc]
    expected = expected + free_experts(x, places, weights, case["kinds"], case["num_ffn"], w, v, side)
    near(y, expected, 1e-12)
    leaves = [x, weights, *experts.parameters()]
    found, wanted = gradients(y.square().sum(), leaves), gradients(expected.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-12)


@pytest.mark.parametrize("backend", runnable_backends())
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_case_of_every_kind(backend: str, side: str):
    for static in (False, True):
        check(
            {
                "places": [[0, 2, 5], [4, 3, 1], [5, 4, -1], [-1, -1, -1], [2, 1, 0], [3, 2, 4]],
                "num_ffn": 2,
                "kinds": ["zero", "constant", "copy", "constant"],
                "width": 4,
                "side": side,
                "static": static,
                "seed": 3,
            },
            backend,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision(dtype: torch.dtype):
    experts = FreeExperts(Experts(16, 4, 8), ("zero", "copy", "constant", "constant"))
    exact = FreeExperts(Experts(16, 4, 8), ("zero", "copy", "constant", "constant")).double()
    experts.load_state_dict({n: p.to(dtype).float() for n, p in experts.state_dict().items()})
    exact.load_state_dict(experts.state_dict())
    draw = torch.Generator().manual_seed(0)
    ids = torch.rand(30, 8, generator=draw).argsort(dim=1)[:, :3]
    weights, x = torch.rand(30, 3, generator=draw), torch.randn(30, 16, generator=draw).to(dtype)
    plan = make_plan(Assignment(ids, weights, 8))
    y = experts(x, plan, weights)
    assert y.dtype == dtype
    near(y, exact(x.double(), plan, weights.double()), 1e-5 if dtype == torch.float32 else 3e-2)


def test_in_a_layer_the_record_counts_all_experts():
    layer = MoELayer(4, 5, 2, 6, experts=FreeExperts(Experts(4, 3, 6), ("zero", "copy")))
    y, stats = layer(torch.randn(7, 4))
    assert stats["router"].counts.shape == (5,)
    assert stats["router"].counts.sum() == 14
    y.sum().backward()
    assert layer.router.weight.grad is not None


def test_experts_inside_hand_their_stats_on():
    inner = ModuleExperts([MoELayer(4, 3, 2, 6) for _ in range(2)])
    layer = MoELayer(4, 3, 2, 6, experts=FreeExperts(inner, ("copy",), width=4))
    _, stats = layer(torch.randn(7, 4))
    assert isinstance(stats, Stats)
    assert set(stats) == set(layer.routers()) == {"router", "experts.0.router", "experts.1.router"}


def test_bad_input_is_refused():
    with pytest.raises(
        UserError, match=r"free expert 'zeros' is unknown; did you mean 'zero'\?; allowed: zero"
    ):
        FreeExperts(Experts(4, 2, 3), ("zeros",))
    with pytest.raises(UserError, match=r"free experts \[\], width 4; allowed: one kind or more"):
        FreeExperts(Experts(4, 2, 3), ())
    with pytest.raises(UserError, match=r"width None; allowed"):
        FreeExperts(Recorder(), ("zero",))
    with pytest.raises(UserError, match=r"a plan for 2 experts, 2 feed-forward and 1 free; allowed: 3; the"):
        MoELayer(4, 2, 1, 3, weights="raw", experts=FreeExperts(Experts(4, 2, 3), ("zero",)))(
            torch.ones(2, 4)
        )
