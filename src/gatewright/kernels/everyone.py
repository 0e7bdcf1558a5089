"""Every token through every expert: then nothing needs sorting, and E experts are one wide layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.kernels.activations import activate
from gatewright.kernels.plan import DispatchPlan, ExpertWeights


def is_everyone(plan: DispatchPlan) -> bool:
    """Return whether each of T tokens goes to each of E experts exactly once, and its output is weighed.
    An accelerator is not asked: one would have to wait for its numbers.
    """
    num_tokens, places = plan.slots.shape
    if places != plan.num_experts or places < 2 or not num_tokens or not plan.all_kept:
        return False
    if plan.weight_side != "output" or torch.compiler.is_compiling() or not plan.slots.is_cpu:
        return False
    return bool((plan.counts == num_tokens).all()) and bool(_hits(plan).all())


def _hits(plan: DispatchPlan) -> Bool[Tensor, "T E"]:
    """Return which experts a token names: with T rows each, row r belongs to expert r // T."""
    none = torch.zeros(plan.slots.shape, dtype=torch.bool, device=plan.slots.device)
    return none.scatter(1, plan.slots // plan.num_tokens, True)


def expert_mlp(
    x: Float[Tensor, "T D"], plan: DispatchPlan, combine_weights: Float[Tensor, "T K"], weights: ExpertWeights
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, for a plan that `is_everyone`.

    Equation: y = [w_down_1 ... w_down_E] concat_e(p_e act(w_in_e x)): three matmuls of E F columns.
    """
    num_tokens, num_experts = plan.slots.shape
    shares = torch.zeros_like(combine_weights).scatter(1, plan.slots // num_tokens, combine_weights)
    shares = shares.to(x.dtype)
    pre = F.linear(x, weights.w_in.flatten(0, 1)).view(num_tokens, num_experts, -1)
    if weights.b_in is not None:
        pre = pre + weights.b_in
    hidden = activate(weights.activation, pre) * shares.unsqueeze(-1)
    y = hidden.flatten(1) @ weights.w_down.transpose(1, 2).flatten(0, 1)
    return y if weights.b_down is None else y + shares @ weights.b_down
