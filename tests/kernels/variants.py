"""One case of biases, weights on the input, dropout and static plans: a backend against the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gatewright.kernels import DispatchPlan, ExpertWeights, expert_mlp
from tests.kernels.plans import draw_inputs, draw_weights, plan_of, static_plan
from tests.oracle.experts import mixture

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def leaves_of(weights: ExpertWeights) -> dict[str, Tensor]:
    """Return the tensors that are there, by name."""
    named = {name: getattr(weights, name) for name in ("w_in", "w_down", "b_in", "b_down")}
    return {name: value for name, value in named.items() if value is not None}


def scale_of(plan: DispatchPlan, places: list[list[int]], hidden: int) -> tuple[Tensor, dict]:
    """Return hidden scales [M, F] with a third of them 0, and the same by (token, expert)."""
    draw = torch.Generator().manual_seed(8)
    scales: dict[tuple[int, int], Tensor] = {}
    rows = torch.full((plan.token_ids.shape[0], hidden), math.nan, dtype=torch.float64)
    for t, experts in enumerate(places):
        for k, e in enumerate(experts):
            if e >= 0:
                if (t, e) not in scales:
                    scales[t, e] = (torch.rand(hidden, generator=draw) > 1 / 3).double() * 1.5
                rows[plan.slots[t, k]] = scales[t, e]
    return rows, scales


def near(found: Tensor, wanted: Tensor, bound: float, name: str = "", least: float = 1e-2) -> None:
    """Fail unless the two agree, relative to the largest number, or to `least`: where sums cancel, what they
    are made of is larger than they are.
    """
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all(), name
    if wanted.numel():
        error = (found.double() - wanted.double()).abs().max()
        assert error <= bound * max(wanted.abs().max().item(), least), f"{name}: {error}"


def compare(
    places: list[list[int]],
    num_experts: int,
    backend: str,
    activation: str,
    *,
    width: int = 4,
    hidden: int = 3,
    side: str = "output",
    biased: bool = True,
    dropped: bool = False,
    static: bool = False,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float64,
    wide: bool = False,
    least: float = 1e-2,
) -> None:
    """Hold one case against the oracle: y, and the gradients of everything; `wide` keeps weights in fp32."""
    plan = plan_of(places, num_experts)
    plan = static_plan(plan, capacity) if static else replace(plan, capacity=capacity)
    plan = replace(plan, weight_side=side)
    kept = torch.float32 if wide else dtype
    weights = draw_weights(activation, num_experts, width, hidden, kept, biased)
    x, combine = draw_inputs(plan, width, dtype)
    scale, scales = scale_of(plan, places, hidden) if dropped else (None, None)
    y = expert_mlp(x, plan, combine, weights, backend, None if scale is None else scale.to(dtype))
    assert y.dtype == dtype
    named = {"x": x, "combine": combine, **leaves_of(weights)}
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in named.items()}
    biases = {name: exact[name] for name in ("b_in", "b_down") if name in exact}
    expected = mixture(
        exact["x"], places, exact["combine"], exact["w_in"], exact["w_down"], activation,
        side=side, scales=scales, **biases,
    )  # fmt: skip
    near(y, expected, BOUND[dtype], "y", least)
    direction = torch.linspace(-1, 1, y.numel(), dtype=dtype).reshape(y.shape)
    found = torch.autograd.grad(y, list(named.values()), direction)
    total = (expected * direction.double()).sum() + sum(0 * leaf.sum() for leaf in exact.values())
    wanted = torch.autograd.grad(total, list(exact.values()))
    for name, one, other in zip(named, found, wanted, strict=True):
        near(one, other, BOUND[dtype], name, least)
