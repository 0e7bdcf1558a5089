"""AdamW in one pass: torch's own numbers in fp32, the same bits for every number of threads, resting experts
untouched, and refusals instead of reads beyond a tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.adamw import Lists, Rates, adamw_step, clip_scale, gradient_norm

RATES = Rates(rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, toward=0.3)
# Odd sizes, one number, nothing at all, and more than one piece of 2^14.
SHAPES = ((3, 7), (), (0, 5), (2, 130, 77), (16,), (40_001,))
needs_native = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)


def lists_of(
    shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32, slices: int = 0
) -> Lists:
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return Lists(
        weights,
        [torch.zeros_like(w) for w in weights],
        [torch.zeros_like(w) for w in weights],
        [torch.zeros((), dtype=torch.float32) for _ in weights],
        [slices] * len(weights),
        [w.clone() for w in weights],
        [w.bfloat16() for w in weights],
    )


def drawn_gradients(lists: Lists, step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 4 - 2)
    return [
        (scale * torch.randn(w.shape, generator=draw, dtype=torch.float64)).to(w.dtype) for w in lists.weights
    ]


def steps(lists: Lists, number: int = 20, rates: Rates = RATES, touch: Callable | None = None) -> Lists:
    """Take steps clipped to a norm of 1; `touch` changes each step's gradients first."""
    for step in range(number):
        gradients = drawn_gradients(lists, step)
        if touch is not None:
            touch(gradients)
        adamw_step(lists, gradients, rates, clip_scale(float(gradient_norm(gradients)), 1.0))
    return lists


def tensors(lists: Lists) -> list[Tensor]:
    return [
        *lists.weights, *lists.first, *lists.second, *lists.steps, *lists.averages, *lists.narrowed
    ]  # fmt: skip


def by_torch(lists: Lists, number: int = 20) -> list[torch.nn.Parameter]:
    """Take the same steps with torch's own optimizer and clipping."""
    own = [torch.nn.Parameter(w.clone()) for w in lists.weights]
    r = RATES
    optimizer = torch.optim.AdamW(
        own, lr=r.rate, betas=(r.beta1, r.beta2), eps=r.eps, weight_decay=r.decay, foreach=True
    )
    for step in range(number):
        for parameter, gradient in zip(own, drawn_gradients(lists, step), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
    return own


@pytest.mark.parametrize("left_out", [False, True])
def test_twenty_steps_are_those_of_torch_s_adamw(left_out: bool):
    with native.left_out() if left_out else nullcontext():
        wide, lists = by_torch(lists_of(dtype=torch.float64)), steps(lists_of())
    for mine, true in zip(lists.weights, wide, strict=True):
        torch.testing.assert_close(mine.double(), true.detach(), rtol=1e-6, atol=1e-6)
    assert [float(one) for one in lists.steps] == [20.0] * len(SHAPES)


@needs_native
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.0), (0.3, 0.999)])
@pytest.mark.parametrize("toward", [0.01, 0.9])
def test_the_native_pass_gives_the_definition_s_numbers(betas: tuple[float, float], toward: float):
    rates = replace(RATES, beta1=betas[0], beta2=betas[1], toward=toward)
    mine = steps(lists_of(), rates=rates)
    with native.left_out():
        true = steps(lists_of(), rates=rates)
    names = ("weights", "first", "second", "averages")
    for name in names:
        for a, b in zip(getattr(mine, name), getattr(true, name), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6, msg=name)
    for copy_, weight in zip(mine.narrowed, mine.weights, strict=True):
        assert torch.equal(copy_, weight.bfloat16())


@needs_native
def test_the_norm_is_that_of_fp64():
    gradients = [torch.randn(n) * 10.0**e for n, e in ((1, 2), (100_003, -1), (0, 0), (17, 3))]
    true = torch.cat(gradients).double().norm()
    assert float(gradient_norm(gradients)) == float(true.float())
    # In fp32, 1e8 + 1 is 1e8: each of the small ones would be lost.
    uneven = torch.cat([torch.full((64,), 1e4), torch.ones(16_000)])
    assert float(gradient_norm([uneven])) == float(uneven.double().norm().float())
    gradients[1][70_000] = torch.inf
    assert float(gradient_norm(gradients)) == torch.inf
    gradients[1][5] = torch.nan
    assert not float(gradient_norm(gradients)) <= torch.inf


@needs_native
def test_the_same_bits_for_every_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tensors(steps(lists_of(((4, 50, 333), (70_001,)), slices=0), 3)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def idle_experts(gradients: list[Tensor]) -> None:
    """Give experts 1 and 3 of the stack no gradient; the second tensor, a dense one, none either."""
    gradients[0][1] = 0.0
    gradients[0][3] = -0.0
    gradients[1].zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left_out", [False, True])
def test_resting_experts_keep_weights_and_moments_and_all_else_moves(dtype: torch.dtype, left_out: bool):
    shapes = ((4, 5, 3), (6,))
    with native.left_out() if left_out else nullcontext():
        lists = replace(lists_of(shapes, dtype), slices=(4, 0))
        steps(lists, 2)
        before = copy.deepcopy(lists)
        plain = replace(copy.deepcopy(lists), slices=(0, 0))
        steps(lists, 1, touch=idle_experts)
        steps(plain, 1, touch=idle_experts)
    for name in ("weights", "first", "second"):
        mine, old, all_moved = (getattr(one, name) for one in (lists, before, plain))
        assert torch.equal(mine[0][[1, 3]], old[0][[1, 3]])
        assert not torch.equal(all_moved[0][1], old[0][1])
        assert torch.equal(mine[0][[0, 2]], all_moved[0][[0, 2]])
        assert torch.equal(mine[1], all_moved[1])
    # Averages move towards weights that stay; the count of steps is everyone's.
    assert not torch.equal(lists.averages[0][1], before.averages[0][1])
    assert [float(one) for one in lists.steps] == [3.0, 3.0]


def test_an_expert_whose_last_number_alone_is_not_zero_moves():
    lists = lists_of(((2, 4),), slices=2)
    before = lists.weights[0].clone()
    gradient = torch.zeros(2, 4)
    gradient[1, 3] = 1e-30
    adamw_step(lists, [gradient], RATES)
    assert (lists.weights[0] != before).any(dim=1).tolist() == [False, True]


def test_what_the_native_pass_does_not_take_is_computed_all_the_same():
    wide = lists_of(dtype=torch.float64)
    mine = steps(lists_of(dtype=torch.float64))
    true = by_torch(wide)
    for a, b in zip(mine.weights, true, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    # A gradient that lies otherwise in memory.
    lists, other = lists_of(((5, 6),)), lists_of(((5, 6),))
    gradient = torch.randn(6, 5).t()
    adamw_step(lists, [gradient.clone(memory_format=torch.preserve_format)], RATES)
    adamw_step(other, [gradient.contiguous()], RATES)
    torch.testing.assert_close(lists.weights[0], other.weights[0], rtol=1e-6, atol=1e-6)


def test_a_scale_that_is_not_finite_touches_nothing():
    lists = lists_of()
    before = copy.deepcopy(lists)
    with pytest.raises(ValueError, match="nan"):
        adamw_step(lists, drawn_gradients(lists, 0), RATES, torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(tensors(lists), tensors(before), strict=True))


@needs_native
@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"first": 3}, "shapes do not fit"),
        ({"slices": [2]}, "slices"),
        ({"narrowed": [torch.zeros(3, 5)]}, "bf16"),
        ({"steps": []}, "lengths"),
        ({"steps": [torch.zeros(2)]}, "one number"),
        ({"averages": [torch.zeros(3, 5), torch.zeros(1)]}, "2 tensors for 1"),
    ],
)
def test_what_does_not_fit_is_refused(broken: dict, what: str):
    lists = lists_of(((3, 5),))
    if "first" in broken:
        broken = {"first": [torch.zeros(broken["first"])]}
    with pytest.raises(ValueError, match=what):
        adamw_step(replace(lists, **broken), [torch.ones(3, 5)], RATES)


@needs_native
def test_the_operators_say_what_they_are():
    lists = lists_of(((3, 5), (4,)))
    gradients = drawn_gradients(lists, 0)
    own = (
        [*lists.weights], gradients, [*lists.first], [*lists.second], [*lists.steps], [*lists.averages],
        [*lists.narrowed], [3, 0], 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 0.5,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gatewright.adamw_, own, test_utils=tests)
    torch.library.opcheck(torch.ops.gatewright.gradient_norm, (gradients,), test_utils=tests)


@needs_native
def test_a_graph_from_before_the_step_is_refused_after_it():
    weight = torch.ones(3, requires_grad=True)
    y = (weight * weight).sum()
    lists = replace(lists_of(((3,),)), weights=[weight])
    adamw_step(lists, [torch.ones(3)], RATES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
