"""The experts in C++: rows gathered, both matmuls with the activation between them, and combined, in one
operator; sums in fp32, equal to the bit from run to run and for every number of threads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import everyone, grouped, native
from gatewright.kernels.everyone import is_everyone
from gatewright.kernels.native.few import experts_few, takes_few
from gatewright.kernels.plan import DispatchPlan, ExpertWeights

# Weights may stay in fp32 beside bf16 rows: they are narrowed on the way into the caches.
takes_wide_weights = True
DTYPES = (torch.float32, torch.bfloat16)


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does. Once differentiable.

    Up to 8 tokens without gradient, as in decoding, go through dot products (`few`).
    Args: weights of x's dtype, fp32 or int8. Other dtypes than fp32 and bf16, and other devices than the CPU,
    go the way of `grouped`.
    Raises: UserError where the kernels cannot be built.
    """
    if x.dtype not in DTYPES or x.device.type != "cpu":
        return grouped.expert_mlp(x, plan, combine_weights, weights.in_dtype(x.dtype), hidden_scale)
    if not native.is_ready():
        raise UserError(f"backend 'native' does not run here: {native.status().reason}")
    w = weights
    if hidden_scale is None and takes_few(x.shape[0], x, combine_weights, w.w_in, w.w_down, w.b_in, w.b_down):
        return experts_few(x, plan, combine_weights, w)
    if w.scale_in is not None:
        w = w.in_dtype(x.dtype)
    if hidden_scale is None and is_everyone(plan):
        return everyone.expert_mlp(x, plan, combine_weights, w.in_dtype(x.dtype))
    tensors = (x, combine_weights.float(), w.w_in, w.w_down, w.b_in, w.b_down, hidden_scale)
    laid = [None if one is None else one.contiguous() for one in tensors]
    keep = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
    y, _ = torch.ops.gatewright.experts_forward(
        *laid,
        plan.token_ids.contiguous(),
        plan.counts.contiguous(),
        plan.slots.contiguous(),
        w.activation,
        plan.weight_side == "input",
        keep,
    )
    out: Tensor = y
    return out


def expert_mlp_sorted(
    rows: Float[Tensor, "M D"],
    counts: Int64[Tensor, "E"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "M D"]:
    """Return each sorted row's expert output [M, D]; `counts` [E] rows per expert, summing to M or less:
    rows behind the last expert's give 0.
    """
    num_rows = rows.shape[0]
    order = torch.arange(num_rows, device=rows.device)
    slots = torch.where(order < counts.sum(), order, -1).unsqueeze(-1)
    plan = DispatchPlan(token_ids=order, counts=counts, slots=slots, all_kept=False)
    ones = torch.ones(num_rows, 1, dtype=torch.float32, device=rows.device)
    return expert_mlp(rows, plan, ones, weights, hidden_scale)
