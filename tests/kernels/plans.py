"""Plans and weights of a fixed seed for the backends' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewright.kernels import DispatchPlan, ExpertWeights, is_gated


def plan_of(rows_of: list[list[int]], num_experts: int) -> DispatchPlan:
    """Build a plan by hand: `rows_of[t]` are token t's experts in order, -1 where dropped."""
    num_selected = len(rows_of[0]) if rows_of else 1
    token_ids, counts, slots = [], [0] * num_experts, [[-1] * num_selected for _ in rows_of]
    for e in range(num_experts):
        for t, experts in enumerate(rows_of):
            for rank, chosen in enumerate(experts):
                if chosen == e:
                    slots[t][rank] = len(token_ids)
                    token_ids.append(t)
                    counts[e] += 1
    flat = torch.tensor(slots, dtype=torch.int64).reshape(len(rows_of), num_selected)
    return DispatchPlan(
        torch.tensor(token_ids, dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int64),
        flat,
        bool((flat >= 0).all()),
    )


def static_plan(plan: DispatchPlan, capacity: int | None = None) -> DispatchPlan:
    """Return the same plan with a row for every place; those behind the last expert's hold token 0."""
    spare = plan.slots.numel() - plan.token_ids.shape[0]
    token_ids = torch.cat([plan.token_ids, plan.token_ids.new_zeros(spare)])
    return DispatchPlan(token_ids, plan.counts, plan.slots, False, plan.weight_side, capacity)


def draw_weights(
    activation: str,
    num_experts: int,
    width: int,
    hidden: int,
    dtype: torch.dtype = torch.float64,
    biased: bool = False,
) -> ExpertWeights:
    """Draw stacked weights of a fixed seed."""
    draw = torch.Generator().manual_seed(5)
    rows = hidden * (2 if is_gated(activation) else 1)
    shapes = [(rows, width), (width, hidden)] + ([(rows,), (width,)] if biased else [])
    drawn = [torch.randn(num_experts, *shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    return ExpertWeights(drawn[0], drawn[1], activation, *drawn[2:])


def draw_inputs(plan: DispatchPlan, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draw x [T, D] and combine weights [T, K]."""
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(plan.num_tokens, width, generator=draw).to(dtype)
    combine = torch.rand(plan.slots.shape, generator=draw).to(torch.promote_types(dtype, torch.float32))
    return x.requires_grad_(), combine.requires_grad_()


def gradients(total: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a sum; a leaf that nothing reaches has the gradient 0."""
    return torch.autograd.grad(total + sum(0 * leaf.sum() for leaf in leaves), leaves)
