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
    rows: Float[Tensor, "M D"],
    counts: Int64[Tensor, "E"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "M D"]:
    """Return each row's expert output, [M, D] -> [M, D]; rows are grouped by expert, `counts` [E] rows each.
    Rows behind the last expert's give 0.

    Equation: FFN_e(x) = w_down[e] (s * act(w_in[e] x + b_in[e])) + b_down[e], s the row of `hidden_scale`;
    biases and scale where given.
    """
    out, start = [], 0
    for e, count in enumerate(counts.tolist()):
        here = slice(start, start + count)
        b_in = None if weights.b_in is None else weights.b_in[e]
        b_down = None if weights.b_down is None else weights.b_down[e]
        hidden = activate(weights.activation, F.linear(rows[here], weights.w_in[e], b_in))
        if hidden_scale is not None:
            hidden = hidden * hidden_scale[here]
        out.append(F.linear(hidden, weights.w_down[e], b_down))
        start += count
    return torch.cat([*out, torch.zeros_like(rows[start:])])


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


def by_row(values: Float[Tensor, "T K"], plan: DispatchPlan) -> Float[Tensor, "M"]:
    """Return values [T, K] in sorted-row order [M], 0 for rows behind the last expert's. Differentiable."""
    num_rows = plan.token_ids.shape[0]
    flat = plan.slots.reshape(-1)
    # What was dropped or never made is written to a row too many.
    places = torch.where(flat < 0, num_rows, flat)
    return values.new_zeros(num_rows + 1).scatter(0, places, values.reshape(-1))[:num_rows]


def expert_mlp(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
    hidden_scale: Float[Tensor, "M F"] | None = None,
) -> Float[Tensor, "T D"]:
    """Return y [T, D]: gather the planned rows of x [T, D], run their experts, combine with weights [T, K].

    With the plan's weight_side "input" a row is weighed before its expert instead (Llama-4), in at least
    fp32, and combining is a plain sum.
    """
    rows = x[plan.token_ids]
    if plan.weight_side == "input":
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = (rows.to(wide) * by_row(combine_weights.to(wide), plan).unsqueeze(-1)).to(x.dtype)
        combine_weights = torch.ones_like(combine_weights)
    out = expert_mlp_sorted(rows, plan.counts, weights, hidden_scale)
    return combine(out, plan, combine_weights)
