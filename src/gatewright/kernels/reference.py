"""The definition: one expert at a time, plain torch, any dtype, autograd as it comes. Every other backend
is tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.kernels.activations import activate
from gatewright.kernels.plan import DispatchPlan, ExpertWeights


def expert_mlp_sorted(
    rows: Float[Tensor, "M D"], counts: Int64[Tensor, "E"], weights: ExpertWeights
) -> Float[Tensor, "M D"]:
    """Return each row's expert output, [M, D] -> [M, D]; rows are grouped by expert, `counts` [E] rows each.

    Equation: FFN_e(x) = w_down[e] act(w_in[e] x), without biases.
    """
    out = []
    for e, block in enumerate(torch.split(rows, counts.tolist())):
        hidden = activate(weights.activation, F.linear(block, weights.w_in[e]))
        out.append(F.linear(hidden, weights.w_down[e]))
    return torch.cat(out) if out else rows


def combine(
    out: Float[Tensor, "M D"], plan: DispatchPlan, combine_weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Return y [T, D], y_t = sum_k combine_weights[t, k] * out[slots[t, k]]; a dropped choice adds zero.

    Sums in at least fp32 and returns the dtype of `out`.
    """
    kept = plan.slots >= 0
    padded = torch.cat([out, out.new_zeros(1, out.shape[-1])])
    picked = padded[torch.where(kept, plan.slots, out.shape[0])]
    accumulate = torch.promote_types(out.dtype, torch.float32)
    weighted = picked.to(accumulate) * combine_weights.to(accumulate).unsqueeze(-1)
    return torch.where(kept.unsqueeze(-1), weighted, 0).sum(dim=1).to(out.dtype)


def expert_mlp(
    x: Float[Tensor, "T D"], plan: DispatchPlan, combine_weights: Float[Tensor, "T K"], weights: ExpertWeights
) -> Float[Tensor, "T D"]:
    """Return y [T, D]: gather the planned rows of x [T, D], run their experts, combine with weights [T,
    K].
    """
    out = expert_mlp_sorted(x[plan.token_ids], plan.counts, weights)
    return combine(out, plan, combine_weights)
