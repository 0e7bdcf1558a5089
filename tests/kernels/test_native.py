"""The C++ kernels: the oracle's numbers in fp32 and bf16 by either way of multiplying, the same bits for
every number of threads and order of experts, and clear refusals instead of reads beyond a tensor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.errors import UserError
from gatewright.kernels import (
    ACTIVATIONS,
    BACKENDS,
    DispatchPlan,
    ExpertWeights,
    choose_backend,
    expert_mlp,
    expert_mlp_sorted,
    native,
)
from gatewright.parts import Assignment, make_plan
from tests.kernels.plans import draw_inputs, draw_weights, plan_of
from tests.kernels.variants import compare, leaves_of, near
from tests.parts.harness import repeatable

pytestmark = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)


def drawn_places(num_tokens: int, num_experts: int, num_selected: int, lost: float = 0.0) -> list[list[int]]:
    """Draw each token's experts, of a fixed seed, all different; a share of them dropped."""
    draw = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=draw).argsort(dim=1)[:, :num_selected]
    return torch.where(torch.rand(ids.shape, generator=draw) < lost, -1, ids).tolist()


@st.composite
def drawn(draw: st.DrawFn) -> dict:
    """Draw a case that crosses the borders of steps of 8 rows, pairs of columns and parts of experts."""
    num_experts = draw(st.integers(1, 5))
    num_tokens, num_selected = draw(st.integers(0, 20)), draw(st.integers(1, num_experts))
    return {
        "places": drawn_places(num_tokens, num_experts, num_selected, draw(st.sampled_from((0.0, 0.3)))),
        "num_experts": num_experts,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "width": draw(st.sampled_from((1, 2, 7, 16, 33))),  # each size is a kernel to generate
        "hidden": draw(st.sampled_from((1, 2, 7, 16, 33))),
        "side": draw(st.sampled_from(("output", "input"))),
        "biased": draw(st.booleans()),
        "dropped": draw(st.booleans()),
        "static": draw(st.booleans()),
    }


@given(case=drawn(), chosen=st.sampled_from(("loops", "generated")))
@repeatable(200)
def test_any_case_equals_the_oracle(case: dict, chosen: str):
    torch.ops.gatewright.engine(chosen)
    compare(backend="native", dtype=torch.float32, least=1.0, **case)
    torch.ops.gatewright.engine("generated")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_bf16_stays_within_its_rounding(engine: str, activation: str, wide: bool):
    # ReLU is left out: where a sum is nearly 0, rounding decides on which side of the step it falls.
    for side in ("output", "input"):
        for width, hidden in ((16, 24), (13, 7)):
            places = drawn_places(60, 4, 2, 0.2)
            case = {"side": side, "width": width, "hidden": hidden, "wide": wide}
            compare(places, 4, "native", activation, dtype=torch.bfloat16, **case)


def test_wide_weights_get_wide_gradients_that_are_not_rounded():
    plan = plan_of(drawn_places(50, 3, 2), 3)
    weights = draw_weights("swiglu", 3, 8, 8, torch.float32, biased=True)
    x, combine = draw_inputs(plan, 8, torch.bfloat16)
    expert_mlp(x, plan, combine, weights, "native").float().square().sum().backward()
    for name, leaf in leaves_of(weights).items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert not torch.equal(leaf.grad, leaf.grad.bfloat16().float()), name


def case_with_a_hot_expert(dtype: torch.dtype) -> tuple[DispatchPlan, Tensor, Tensor, ExpertWeights]:
    """Return a case in which expert 1 has so many rows that they are divided into parts."""
    choices = [[1, 3] if t % 8 else [2, 4] for t in range(1400)]
    plan = make_plan(Assignment(torch.tensor(choices), torch.ones(1400, 2), 5))
    x, combine = draw_inputs(plan, 20, dtype)
    return plan, x, combine, draw_weights("swiglu", 5, 20, 12, dtype, biased=True)


def a_direction(y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a gradient of y, of a fixed seed, rounded to `dtype`."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    return drawn.to(dtype or y.dtype).to(y.dtype)


def everything(plan: DispatchPlan, x: Tensor, combine: Tensor, weights: ExpertWeights) -> list[Tensor]:
    """Return y and all gradients."""
    leaves = [x, combine, *leaves_of(weights).values()]
    y = expert_mlp(x, plan, combine, weights, "native")
    direction = a_direction(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, direction)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divided_experts_equal_the_reference(engine: str, dtype: torch.dtype):
    plan, x, combine, weights = case_with_a_hot_expert(dtype)
    assert plan.counts.max() > 1024, "more rows than one task takes"
    found = everything(plan, x, combine, weights)
    exact = [one.detach().double().requires_grad_() for one in (x, combine, *leaves_of(weights).values())]
    y = expert_mlp(exact[0], plan, exact[1], ExpertWeights(*exact[2:4], "swiglu", *exact[4:]), "reference")
    direction = a_direction(y, dtype)
    wanted = [y.detach(), *torch.autograd.grad(y, exact, direction)]
    for one, other in zip(found, wanted, strict=True):
        near(one, other, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_every_number_of_threads(engine: str, dtype: torch.dtype):
    before = torch.get_num_threads()
    case = case_with_a_hot_expert(dtype)
    try:
        torch.set_num_threads(1)
        expected = everything(*case)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for one, other in zip(everything(*case), expected, strict=True):
                assert torch.equal(one, other), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_experts_changes_no_bit(dtype: torch.dtype):
    # Expert e under the name order[e]: the same y and gradients, the weights' under their new names.
    order = torch.tensor([3, 0, 4, 1, 2])
    plan, x, combine, weights = case_with_a_hot_expert(dtype)
    first = everything(plan, x, combine, weights)
    owners = torch.repeat_interleave(torch.arange(5), plan.counts)
    renamed = order[owners[plan.slots.flatten()]].view_as(plan.slots)
    other_plan = make_plan(Assignment(renamed, torch.ones(1400, 2), 5))
    moved = {
        name: leaf.detach()[order.argsort()].requires_grad_() for name, leaf in leaves_of(weights).items()
    }
    again = everything(other_plan, x, combine, replace(weights, **moved))
    for name, one, other in zip(("y", "x", "combine", *moved), first, again, strict=True):
        assert torch.equal(one, other[order] if name in moved else other), name


def test_recomputation_gives_the_same_bits():
    plan, x, combine, weights = case_with_a_hot_expert(torch.float32)
    leaves = [x, combine, *leaves_of(weights).values()]

    def run(x: Tensor, combine: Tensor) -> Tensor:
        return expert_mlp(x, plan, combine, weights, "native").square()

    kept = torch.autograd.grad(run(x, combine).sum(), leaves)
    again = torch.autograd.grad(checkpoint(run, x, combine, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_only_what_is_asked_for_is_computed_and_kept():
    plan, x, combine, weights = case_with_a_hot_expert(torch.float32)
    _, of_x, *rest = everything(plan, x, combine, weights)
    frozen = replace(weights, **{name: leaf.detach() for name, leaf in leaves_of(weights).items()})
    y = expert_mlp(x, plan, combine, frozen, "native")
    direction = a_direction(y)
    assert torch.equal(torch.autograd.grad(y, x, direction)[0], of_x)
    y = expert_mlp(x.detach(), plan, combine.detach(), weights, "native")
    found = torch.autograd.grad(y, list(leaves_of(weights).values()), direction)
    assert all(torch.equal(one, other) for one, other in zip(found, rest[1:], strict=True))
    words = (plan.token_ids, plan.counts, plan.slots, "swiglu", False)
    kept = torch.ops.gatewright.experts_forward(x, combine, *leaves_of(weights).values(), None, *words, False)
    assert kept[1].shape == (0, 24), "without gradients no pre-activations are kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_promises_to_torch(dtype: torch.dtype):
    plan = plan_of(drawn_places(7, 3, 2, 0.3), 3)
    for biased in (False, True):
        weights = draw_weights("geglu", 3, 6, 4, dtype, biased)
        x, combine = draw_inputs(plan, 6, dtype)
        given = (x, combine, weights.w_in, weights.w_down, weights.b_in, weights.b_down, None)
        call = (*given, plan.token_ids, plan.counts, plan.slots, "geglu", False, True)
        torch.library.opcheck(torch.ops.gatewright.experts_forward.default, call)


def test_other_dtypes_go_another_way_and_say_so():
    for dtype in (torch.float16, torch.float64):
        x = torch.zeros(2, 4, dtype=dtype)
        name, reason = choose_backend(None, x)
        assert name == "grouped"
        assert str(dtype) in reason
        compare([[0, 1], [1, 0]], 2, "native", "swiglu", dtype=torch.float64)
    assert choose_backend(None, torch.zeros(2, 4, dtype=torch.bfloat16))[0] == "native"


def broken(plan: DispatchPlan, **changes: Tensor) -> None:
    plan = replace(plan, **changes)
    x, combine = draw_inputs(plan, 3, torch.float32)
    expert_mlp(x, plan, combine, draw_weights("relu", 3, 3, 3, torch.float32), "native")


def test_what_would_leave_a_tensor_is_refused():
    plan = plan_of([[0, 1], [1, 0]], 3)
    with pytest.raises(ValueError, match=r"token_ids hold 0 to 2; allowed: 0 to 1"):
        broken(plan, token_ids=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"token_ids hold -1 to 1"):
        broken(plan, token_ids=torch.tensor([0, 1, -1, 0]))
    with pytest.raises(ValueError, match=r"slots hold -1 to 4; allowed: -1 to 3"):
        broken(plan, slots=torch.tensor([[0, 4], [3, 1]]))
    with pytest.raises(ValueError, match=r"counts sum to 5 for 4 token_ids"):
        broken(plan, counts=torch.tensor([2, 3, 0]))
    with pytest.raises(ValueError, match=r"counts hold -1 to 3"):
        broken(plan, counts=torch.tensor([-1, 3, 2]))
    x, combine = draw_inputs(plan, 5, torch.float32)
    with pytest.raises(ValueError, match=r"w_in \[3, 3, 3\]; allowed: \[3, 3, 5\]"):
        expert_mlp(x, plan, combine, draw_weights("relu", 3, 3, 3, torch.float32), "native")


def test_rows_behind_the_last_expert_give_0_and_take_no_gradient():
    weights = draw_weights("gelu", 2, 4, 4, torch.float32)
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = expert_mlp_sorted(rows, torch.tensor([1, 2]), weights, "native")
    near(out[:3], expert_mlp_sorted(rows[:3], torch.tensor([1, 2]), weights, "reference").double(), 1e-5)
    assert (out[3:] == 0).all()
    (found,) = torch.autograd.grad(out.sum(), rows)
    assert (found[3:] == 0).all()


def test_strided_tensors_mean_the_same():
    plan = plan_of(drawn_places(9, 3, 2), 3)
    weights = draw_weights("swiglu", 3, 6, 4, torch.float32)
    x, combine = draw_inputs(plan, 6, torch.float32)
    strided = replace(weights, w_down=weights.w_down.detach().mT.contiguous().mT)
    y = expert_mlp(x.detach().t().contiguous().t(), plan, combine, strided, "native")
    assert torch.equal(y, expert_mlp(x, plan, combine, weights, "native"))
    y.sum().backward()  # a gradient of ones that is an expanded view


def test_freed_memory_is_used_again_and_given_back():
    size = (1 << 20, 4)
    x = torch.zeros(*size)
    plan = make_plan(Assignment(torch.zeros(size[0], 1, dtype=torch.int64), torch.ones(size[0], 1), 1))
    weights = draw_weights("linear", 1, 4, 1, torch.float32)
    torch.ops.gatewright.pool_limit(0)
    torch.ops.gatewright.pool_limit(1 << 30)
    with torch.no_grad():
        first = expert_mlp(x, plan, torch.ones(size[0], 1), weights, "native")
        where, kept = first.data_ptr(), first[:1]
        del first
        again = expert_mlp(x, plan, torch.ones(size[0], 1), weights, "native")
        assert again.data_ptr() != where, "a view keeps its memory"
        del kept, again
        assert torch.ops.gatewright.pool_limit(-1) >= x.numel() * 4
        reused = expert_mlp(x, plan, torch.ones(size[0], 1), weights, "native")
    assert reused.numel() == x.numel()
    del reused
    assert torch.ops.gatewright.pool_limit(0) == 0
    torch.ops.gatewright.pool_limit(1 << 30)


def test_where_it_does_not_run_the_name_is_refused_and_another_is_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_known", native.Status(False, "no C++ compiler"))
    name, reason = choose_backend()
    assert name == "grouped"
    assert "no C++ compiler" in reason
    assert "native" in BACKENDS
    plan = plan_of([[0]], 1)
    x, combine = draw_inputs(plan, 3, torch.float32)
    weights = draw_weights("relu", 1, 3, 3, torch.float32)
    with pytest.raises(UserError, match=r"backend 'native' does not run here: no C\+\+ compiler"):
        expert_mlp(x, plan, combine, weights, "native")
    assert expert_mlp(x, plan, combine, weights).shape == (1, 3)
