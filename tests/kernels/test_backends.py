"""Every backend has one meaning: against the oracle, against finite differences, and in odd corners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import (
    ACTIVATIONS,
    BACKENDS,
    ExpertWeights,
    choose_backend,
    expert_mlp,
    expert_mlp_sorted,
    runnable_backends,
)
from gatewright.kernels.rows import aligned
from tests.kernels.plans import draw_inputs, draw_weights, plan_of
from tests.oracle import moe as oracle

each_backend = pytest.mark.parametrize("backend", runnable_backends())
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def by_hand(x: Tensor, rows_of: list[list[int]], combine: Tensor, weights: ExpertWeights) -> Tensor:
    """Return the oracle's y: token by token, choice by choice."""
    out = []
    for t, experts in enumerate(rows_of):
        y = torch.zeros_like(x[t])
        for rank, e in enumerate(experts):
            if e >= 0:
                ffn = oracle.feed_forward(x[t], weights.w_in[e], weights.w_down[e], weights.activation)
                y = y + combine[t, rank] * ffn
        out.append(y)
    return torch.stack(out)


# Experts 0 and 3 stay empty; token 2 loses one choice, token 4 both.
SOME_DROPPED = [[1, 2], [2, 4], [4, -1], [2, 1], [-1, -1]]
ALL_KEPT = [[1, 2], [2, 4], [4, 1]]
ONE_EACH = [[2], [0], [2], [-1]]


@each_backend
@each_activation
@pytest.mark.parametrize("rows_of", [SOME_DROPPED, ALL_KEPT, ONE_EACH])
@pytest.mark.parametrize(("width", "hidden"), [(3, 5), (8, 4)])
def test_output_and_gradients_equal_the_oracle(
    backend: str, activation: str, rows_of: list[list[int]], width: int, hidden: int
):
    plan = plan_of(rows_of, 5)
    weights = draw_weights(activation, 5, width, hidden)
    x, combine = draw_inputs(plan, width)
    leaves = (x, combine, weights.w_in, weights.w_down)
    y = expert_mlp(x, plan, combine, weights, backend)
    expected = by_hand(x, rows_of, combine, weights)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    found = torch.autograd.grad(y, leaves, direction)
    wanted = torch.autograd.grad(expected, leaves, direction)
    for name, one, other in zip(("x", "combine weights", "w_in", "w_down"), found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert (found[2][3] == 0).all(), "an empty expert has the gradient 0"
    assert (found[1][plan.slots < 0] == 0).all(), "a dropped choice's weight has the gradient 0"


@each_backend
@each_activation
def test_gradients_equal_finite_differences(backend: str, activation: str):
    plan = plan_of(SOME_DROPPED, 5)
    weights = draw_weights(activation, 5, 3, 2)
    x, combine = draw_inputs(plan, 3)

    def run(x: Tensor, combine: Tensor, w_in: Tensor, w_down: Tensor) -> Tensor:
        return expert_mlp(x, plan, combine, ExpertWeights(w_in, w_down, activation), backend)

    assert torch.autograd.gradcheck(run, (x, combine, weights.w_in, weights.w_down))


@each_backend
def test_sorted_rows_equal_the_oracle(backend: str):
    # What an all-to-all leaves on a rank: rows already grouped, counts [E]; expert 1 has none.
    weights = draw_weights("geglu", 4, 3, 5)
    rows = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    counts = torch.tensor([2, 0, 3, 1])
    out = expert_mlp_sorted(rows, counts, weights, backend)
    owner = [0, 0, 2, 2, 2, 3]
    expected = torch.stack(
        [
            oracle.feed_forward(rows[i], weights.w_in[e], weights.w_down[e], "geglu")
            for i, e in enumerate(owner)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = (rows, weights.w_in, weights.w_down)
    for one, other in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "hidden"), [(32, 48), (30, 17)])
def test_backends_agree_at_a_size_where_grouped_matmuls_run(dtype: torch.dtype, width: int, hidden: int):
    draw = torch.Generator().manual_seed(9)
    experts = torch.rand(300, 16, generator=draw)[:, :13].argsort(dim=1)[:, :4] + 1  # 0, 14 and 15 stay empty
    plan = plan_of(experts.tolist(), 16)
    results = {}
    for backend in runnable_backends():
        weights = draw_weights("swiglu", 16, width, hidden, dtype)
        x, combine = draw_inputs(plan, width, dtype)
        y = expert_mlp(x, plan, combine, weights, backend)
        assert y.dtype == dtype
        results[backend] = (y, *torch.autograd.grad(y.float().square().mean(), (x, combine, weights.w_in)))
    # Relative to each tensor's largest number. bf16 rounds at other places in the two, each time by 0.4 %.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for backend in runnable_backends():
        for one, other in zip(results["reference"], results[backend], strict=True):
            assert (one.float() - other.float()).abs().max() <= bound * one.float().abs().max()


def test_alignment_follows_the_row_stride_in_bytes():
    assert aligned(torch.zeros(3, 4))
    assert not aligned(torch.zeros(3, 6))
    assert not aligned(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert aligned(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert not aligned(torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "calls"),
    [
        # Two products forward; back: two gradients of rows, two of weights.
        (torch.float32, 8, 4, 6),
        (torch.float32, 6, 5, 0),
        (torch.float64, 8, 4, 0),
        (torch.bfloat16, 8, 16, 6),
    ],
)
def test_grouped_matmuls_run_where_rows_arealigned(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, hidden: int, calls: int
):
    seen = []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda *a, **k: (seen.append(1), grouped_mm(*a, **k))[1]
    )
    plan = plan_of(ALL_KEPT, 5)
    weights = draw_weights("swiglu", 5, width, hidden, dtype)
    x, combine = draw_inputs(plan, width, dtype)
    expert_mlp(x, plan, combine, weights, "grouped").sum().backward()
    assert len(seen) == calls


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_combine_sums_in_fp32(backend: str, dtype: torch.dtype):
    # Every expert gives exactly 1. Weights 1 and 47 times w: each w is below half a step of the dtype at 1:
    # a sum in the dtype stays at 1, while 1 + 47 w is far from it.
    num_experts = 48
    small = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    plan = plan_of([list(range(num_experts))], num_experts)
    ones = torch.ones(num_experts, 1, 1, dtype=dtype)
    combine = torch.full((1, num_experts), small)
    combine[0, 0] = 1.0
    y = expert_mlp(torch.ones(1, 1, dtype=dtype), plan, combine, ExpertWeights(ones, ones, "relu"), backend)
    assert y.item() == torch.tensor(1 + 47 * small).to(dtype).item() != 1.0


@each_backend
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 3), (0, 3)])
def test_gradients_of_any_subset_of_inputs(backend: str, wanted: tuple[int, ...]):
    plan = plan_of(SOME_DROPPED, 5)
    weights = draw_weights("swiglu", 5, 3, 2)
    x, combine = draw_inputs(plan, 3)
    leaves = [x, combine, weights.w_in, weights.w_down]
    full = torch.autograd.grad(expert_mlp(x, plan, combine, weights, backend).sum(), leaves)
    some = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
    y = expert_mlp(some[0], plan, some[1], ExpertWeights(some[2], some[3], "swiglu"), backend)
    found = torch.autograd.grad(y.sum(), [some[i] for i in wanted])
    for i, grad in zip(wanted, found, strict=True):
        assert torch.equal(grad, full[i])


@each_backend
@pytest.mark.parametrize("rows_of", [[], [[-1, -1], [-1, -1]]])
def test_nothing_to_compute(backend: str, rows_of: list[list[int]]):
    plan = plan_of(rows_of, 3)
    weights = draw_weights("gelu", 3, 4, 5)
    x, combine = draw_inputs(plan, 4)
    y = expert_mlp(x, plan, combine, weights, backend)
    assert y.shape == (len(rows_of), 4)
    assert (y == 0).all()
    for grad in torch.autograd.grad(y.sum(), (x, combine, weights.w_in, weights.w_down)):
        assert (grad == 0).all()


@each_backend
def test_strides_do_not_matter(backend: str):
    plan = plan_of(ALL_KEPT, 5)
    weights = draw_weights("geglu", 5, 4, 8, torch.float32)
    x, combine = draw_inputs(plan, 4, torch.float32)
    expected = expert_mlp(x, plan, combine, weights, backend)
    columns = x.detach().t().contiguous().t()
    assert not columns.is_contiguous()
    w_in = weights.w_in.detach().mT.contiguous().mT
    w_down = weights.w_down.detach().mT.contiguous().mT.requires_grad_()
    found = expert_mlp(columns, plan, combine, ExpertWeights(w_in, w_down, "geglu"), backend)
    torch.testing.assert_close(found, expected)
    # .sum() hands back an expanded gradient of stride 0.
    (strided,) = torch.autograd.grad(found.sum(), w_down)
    (plain,) = torch.autograd.grad(expected.sum(), weights.w_down)
    torch.testing.assert_close(strided, plain)


@each_backend
def test_a_plan_that_drops_nothing_may_say_either(backend: str):
    plan = plan_of(ALL_KEPT, 5)
    weights = draw_weights("relu", 5, 3, 4)
    x, combine = draw_inputs(plan, 3)
    results = []
    for all_kept in (True, False):
        y = expert_mlp(x, replace(plan, all_kept=all_kept), combine, weights, backend)
        results.append((y, *torch.autograd.grad(y.sum(), (x, combine, weights.w_in))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_grouped_says_that_it_is_once_differentiable():
    plan = plan_of(ALL_KEPT, 5)
    weights = draw_weights("swiglu", 5, 3, 4)
    x, combine = draw_inputs(plan, 3)
    y = expert_mlp(x, plan, combine, weights, "grouped")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_backend_is_chosen_with_its_reason():
    name, reason = choose_backend()
    assert name in BACKENDS
    assert reason
    assert choose_backend("reference") == ("reference", "asked for by name")


def test_an_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"backend 'gruoped' is unknown; did you mean 'grouped'\?; allowed: reference"
    ):
        choose_backend("gruoped")
