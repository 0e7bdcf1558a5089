"""The experts of a transformers model, computed by this toolkit: one function with their signature."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gatewright.conversion.layouts import (
    TheirExperts,
    Weights,
    activation_of,
    copies_weights,
    stacked_weights,
    their_weights,
)
from gatewright.errors import UserError
from gatewright.kernels import DispatchPlan, choose_backend, expert_mlp
from gatewright.kernels.linear import linear_by_group
from gatewright.kernels.rows import owners
from gatewright.parts.dispatch import make_plan
from gatewright.parts.routing import Assignment


def experts_forward(
    experts: TheirExperts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Return y [T, D] for hidden_states [T, D], each token through its experts top_k_index [T, K], weighed.

    An index that is the number of experts, or above it under expert parallelism, names an expert that is not
    here and adds nothing. Computes in the weights' dtype, or autocast's; sums over experts in at least fp32.
    Args: `backend` as `choose_backend` takes it.
    Returns: the dtype of `hidden_states`; differentiable in it, in the weights of the sum and all parameters.
    """
    activation = own_or_ours(experts, backend)
    theirs = their_weights(experts)
    plan = _plan(experts, top_k_index, top_k_weights, theirs.w_in.shape[0], backend)
    dtype = _compute_dtype(theirs.w_in, hidden_states)
    x, wide = hidden_states.to(dtype), torch.promote_types(dtype, torch.float32)
    combine_weights = top_k_weights.to(wide)
    if activation is None:
        y = _with_their_gate(experts, theirs, x, plan, combine_weights)
    else:
        weights = stacked_weights(experts, theirs, activation).in_dtype(dtype)
        y = expert_mlp(x, plan, combine_weights, weights, backend)
    return y.to(hidden_states.dtype)


def own_or_ours(experts: TheirExperts, backend: str | None) -> str | None:
    """Return this toolkit's activation that takes the place of the experts' own; None where they compute
    their own, between two grouped matmuls: where there is none of ours, or where using it would copy weights.

    Raises: UserError for a backend that is named and cannot do so.
    """
    activation = activation_of(experts)
    if backend is None or choose_backend(backend)[0] == "grouped":
        return None if copies_weights(experts) else activation
    if activation is None:
        raise UserError(
            f"backend {backend!r} cannot compute {type(experts).__name__}: their activation "
            f"({_middle(experts)}) is none of this toolkit's; allowed: None or 'grouped', which let the "
            "experts compute it themselves between two grouped matmuls"
        )
    return activation


def _middle(experts: TheirExperts) -> str:
    """Return in words what the experts compute between their two matrices."""
    own = type(experts)._apply_gate.__qualname__
    gate = "" if own == "_default_apply_gate" or not experts.has_gate else own
    act = getattr(experts, "act_fn", None)
    act = "" if act is None else getattr(act, "__name__", type(act).__name__)
    norm = "a norm after each expert" if experts.has_post_expert_norm else ""
    return ", ".join(word for word in (gate, act, norm) if word)


def _compute_dtype(weight: Tensor, x: Tensor) -> torch.dtype:
    """Return the dtype of the matmuls: autocast's, or else that of the weights."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (weight.dtype, x.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def _plan(
    experts: TheirExperts, index: Tensor, weights: Tensor, num_experts: int, backend: str | None
) -> DispatchPlan:
    """Return where the rows go. Shapes depend on no number where code is compiled, nor on an accelerator,
    which would have to be waited for.
    """
    index, looks = index.long().contiguous(), index.is_cpu and not torch.compiler.is_compiling()
    if not looks or (index.numel() and _absent(experts, index, num_experts)):
        index = torch.where(index < num_experts, index, -1)
    plan = make_plan(Assignment(index, weights.detach(), num_experts), static=not looks)
    if backend == "padded" and looks:
        # A token may name an expert twice, so an expert may have more rows than there are tokens.
        return dataclasses.replace(plan, capacity=int(plan.counts.max()))
    return plan


def _absent(experts: TheirExperts, index: Tensor, num_experts: int) -> bool:
    """Return whether an index names an expert that is not here. Raises: UserError for one that is nowhere."""
    lowest, highest = (int(number) for number in torch.aminmax(index))
    if lowest < 0 or (highest > num_experts and not experts._is_expert_parallel):
        raise UserError(
            f"expert ids from {lowest} to {highest} for {num_experts} experts; allowed: 0 to "
            f"{num_experts - 1}, and {num_experts} for none"
        )
    return highest >= num_experts


def _with_their_gate(
    experts: TheirExperts, theirs: Weights, x: Tensor, plan: DispatchPlan, combine_weights: Tensor
) -> Tensor:
    """Return y [T, D]: two linear maps by expert, and between them what the experts themselves compute."""
    held = None
    if not plan.all_kept:
        held = (torch.arange(plan.token_ids.shape[0], device=x.device) < plan.counts.sum()).unsqueeze(-1)
    pre = _linear(x.index_select(0, plan.token_ids), theirs.w_in, theirs.b_in, plan, held)
    hidden = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    out = _linear(hidden.to(x.dtype), theirs.w_down, theirs.b_down, plan, held)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    return _combine(out, plan, combine_weights).to(x.dtype)


def _cleared(rows: Tensor, held: Tensor | None) -> Tensor:
    """Return rows with 0 where nothing is held, in their gradient too: what stands there may be NaN."""
    return rows if held is None else torch.where(held, rows, 0)


def _linear(
    rows: Tensor, weights: Tensor, bias: Tensor | None, plan: DispatchPlan, held: Tensor | None
) -> Tensor:
    """Return rows through their experts' matrices and biases."""
    out = _cleared(linear_by_group(_cleared(rows, held), weights.to(rows.dtype), plan.counts), held)
    return out if bias is None else out + bias.to(rows.dtype).index_select(0, owners(plan))


def _combine(out: Tensor, plan: DispatchPlan, combine_weights: Tensor) -> Tensor:
    """Return sum_k combine_weights[t, k] * out[slots[t, k]], in the dtype of the weights."""
    slots = plan.slots.reshape(-1)
    if not plan.all_kept:
        # One row of zeros for what was never made.
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])
        slots = torch.where(slots < 0, out.shape[0] - 1, slots)
    picked = out.index_select(0, slots).view(*plan.slots.shape, out.shape[1])
    return (picked.to(combine_weights.dtype) * combine_weights.unsqueeze(-1)).sum(dim=1)
