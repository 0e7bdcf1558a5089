"""Experts that are modules: against a loop over tokens, MoE layers inside a MoE layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gatewright.errors import UserError
from gatewright.parts import MLP, Assignment, Experts, MoELayer, Stats, balance_loss, make_plan
from gatewright.parts.nested_experts import ModuleExperts
from tests.kernels.plans import gradients
from tests.kernels.test_variants import near
from tests.parts.harness import repeatable
from tests.parts.test_experts import filled


def by_token(experts: ModuleExperts, x, ids, weights, side: str):
    """Return y: one row, one module at a time."""
    rows = []
    for t, row in enumerate(ids.tolist()):
        y = x[t] * 0
        for k, e in enumerate(row):
            if e >= 0:
                given_x = x[t] * weights[t, k] if side == "input" else x[t]
                out = experts.members[e](given_x.unsqueeze(0))
                out = (out[0] if isinstance(out, tuple) else out)[0]
                y = y + (out if side == "input" else weights[t, k] * out)
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


@given(
    num_tokens=st.integers(0, 5),
    num_experts=st.integers(1, 4),
    side=st.sampled_from(("output", "input")),
    static=st.booleans(),
    empty=st.booleans(),
    seed=st.integers(0, 10_000),
)
@repeatable(200)
def test_output_and_gradients_equal_a_loop_over_tokens(
    num_tokens: int, num_experts: int, side: str, static: bool, empty: bool, seed: int
):
    # Kinds that differ: a dense layer, a Linear, a MoE layer (dropless, so each token is by itself).
    kinds = (lambda: MLP(3, 4, bias=True), lambda: nn.Linear(3, 3), lambda: MoELayer(3, 3, 2, 4))
    experts = filled(ModuleExperts([kinds[(i + seed) % 3]() for i in range(num_experts)]), seed)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=draw).argsort(dim=1)
    if empty:
        ids = torch.where(torch.rand(ids.shape, generator=draw) < 0.5, -1, ids)
    x = torch.randn(num_tokens, 3, dtype=torch.float64, generator=draw).requires_grad_()
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=draw).requires_grad_()
    plan = make_plan(Assignment(ids, weights, num_experts, side), static=static)  # type: ignore[arg-type]
    y, stats = experts(x, plan, weights)
    assert set(stats) == set(experts.routers())
    expected = by_token(experts, x, ids, weights, side)
    near(y, expected, 1e-12)
    leaves = [x, weights, *experts.parameters()]
    found, wanted = gradients(y.square().sum(), leaves), gradients(expected.square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-12)


def test_modules_equal_stacked_experts():
    stacked = filled(Experts(4, 3, 5, bias=True))
    modules = ModuleExperts([MLP(4, 5, bias=True) for _ in range(3)]).double()
    for e, mlp in enumerate(modules.members):
        names = ("w_in", "w_down", "b_in", "b_down")
        mlp.load_state_dict({name: getattr(stacked, name)[e] for name in names})
    x = torch.randn(6, 4, dtype=torch.float64)
    ids, weights = (
        torch.tensor([[0, 2], [2, 1], [-1, 0], [1, 0], [-1, -1], [2, 0]]),
        torch.rand(6, 2).double(),
    )
    plan = make_plan(Assignment(ids, weights, 3))
    near(modules(x, plan, weights)[0], stacked(x, plan, weights), 1e-13)


def layer_of_layers() -> MoELayer:
    """Return a layer of two layers of three experts."""
    torch.manual_seed(0)
    return MoELayer(4, 2, 2, 6, experts=ModuleExperts([MoELayer(4, 3, 2, 6) for _ in range(2)]))


def test_a_layer_of_layers_returns_all_stats_by_hand():
    layer = layer_of_layers()
    y, stats = layer(torch.randn(2, 5, 4))
    assert set(stats) == set(layer.routers()) == {"router", "experts.0.router", "experts.1.router"}
    # K = E = 2: both inner layers see all 10 tokens, and make 2 choices for each.
    for name in ("experts.0.router", "experts.1.router"):
        assert stats[name].tokens == 10
        assert stats[name].counts.sum() == 20
    (y.sum() + balance_loss(stats)).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_an_expert_without_tokens_has_stats_and_gradients():
    experts = ModuleExperts([MoELayer(4, 3, 2, 6), MLP(4, 6)])
    weights = torch.rand(3, 1)
    plan = make_plan(Assignment(torch.ones(3, 1, dtype=torch.int64), weights, 2))
    y, stats = experts(torch.randn(3, 4), plan, weights)
    assert stats["experts.0.router"].tokens == 0
    assert isinstance(stats, Stats)
    y.sum().backward()
    assert (experts.members[0].experts.w_in.grad == 0).all()


def test_each_inner_layer_draws_from_a_key_of_its_own():
    def run(key: int) -> torch.Tensor:
        one = MoELayer(4, 2, 2, 8, expert_dropout=0.5)
        twin = MoELayer(4, 2, 2, 8, expert_dropout=0.5)
        twin.load_state_dict(one.state_dict())
        layer = MoELayer(4, 2, 2, 8, experts=ModuleExperts([one, twin]))
        ids, weights = torch.tensor([[0, 1]]), torch.tensor([[1.0, -1.0]])
        plan = make_plan(Assignment(ids, weights, 2))
        return layer.experts(torch.ones(1, 4), plan, weights, key=torch.tensor(key))[0]

    # Twins with one key would cancel out; drawn apart they do not.
    assert run(1).abs().max() > 1e-3


def test_bad_input_is_refused():
    with pytest.raises(UserError, match=r"0 modules as experts; allowed: 1 or more"):
        ModuleExperts([])
    with pytest.raises(UserError, match=r"a plan for 3 experts, 2 modules; allowed: as many of each"):
        MoELayer(4, 3, 2, 6, experts=ModuleExperts([MLP(4, 6), MLP(4, 6)]))(torch.ones(2, 4))
