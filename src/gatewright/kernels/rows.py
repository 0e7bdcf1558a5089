"""Steps of the grouped backend over rows that are sorted by expert. A static plan's rows behind the last
expert's hold anything, even NaN: no step here reads them into a result.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.kernels.plan import DispatchPlan

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def aligned(*tensors: Float[Tensor, "..."]) -> bool:
    """Return whether F.grouped_mm takes these: a dtype it knows, row strides that are multiples of 16
    bytes; on a GPU, bf16 that starts at such an address, of a GPU that its documentation names.
    """
    return all(t.dtype in _GROUPED_DTYPES and _row_aligned(t) and _device_takes(t) for t in tensors)


def _row_aligned(t: Tensor) -> bool:
    """Return whether rows are dense and start 16 bytes apart, or a multiple of it."""
    step = 16 // t.element_size()
    if t.shape[-1] % step or t.stride(-1) != 1:
        return False
    return t.dim() < 2 or t.stride(-2) % step == 0


def _device_takes(t: Tensor) -> bool:
    """Return whether the device of `t` has grouped matmuls: a CPU has, a GPU from compute capability 8.0 on,
    for bf16; elsewhere torch would loop as well, or fail.
    """
    if t.is_cpu:
        return True
    return t.is_cuda and t.dtype == torch.bfloat16 and t.data_ptr() % 16 == 0 and _capable(t.device)


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def rows_times_weights(
    rows: Float[Tensor, "M A"], weights: Float[Tensor, "E A B"], counts: Int64[Tensor, "E"]
) -> Float[Tensor, "M B"]:
    """Return rows [M, A] times weights [E, A, B] by group -> [M, B]; `weights` may be a transposed view."""
    offsets = counts.cumsum(0, dtype=torch.int32)
    stored = weights if weights.is_contiguous() else weights.mT
    if rows.shape[0] and aligned(rows, stored):
        return F.grouped_mm(rows, weights, offs=offsets)
    out = rows.new_empty(rows.shape[0], weights.shape[-1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weights[e], out=out[start:end])
        start = end
    return out


def outer_by_group(
    left: Float[Tensor, "M A"], right: Float[Tensor, "M B"], counts: Int64[Tensor, "E"]
) -> Float[Tensor, "E A B"]:
    """Return left[group].T @ right[group] -> [E, A, B] for left [M, A], right [M, B]: the weights'
    gradient.
    """
    offsets = counts.cumsum(0, dtype=torch.int32)
    if left.shape[0] and aligned(left, right):
        return F.grouped_mm(left.t(), right, offs=offsets)
    out = left.new_zeros(counts.shape[0], left.shape[1], right.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=out[e])
        start = end
    return out


def sum_by_group(rows: Float[Tensor, "M A"], counts: Int64[Tensor, "E"]) -> Float[Tensor, "E A"]:
    """Return the sum of each group's rows [M, A] -> [E, A]: the biases' gradient, by a product with ones."""
    ones = rows.new_ones(rows.shape[0], 16 // rows.element_size())
    return outer_by_group(rows, ones, counts)[..., 0]


def owners(plan: DispatchPlan) -> Int64[Tensor, "M"]:
    """Return each row's expert id [M]; rows behind the last expert's count as its own."""
    rows = torch.arange(plan.token_ids.shape[0], device=plan.counts.device)
    ends = plan.counts.cumsum(0)
    return torch.bucketize(rows, ends, right=True).clamp(max=plan.num_experts - 1)


def gather_sum(rows: Float[Tensor, "M D"], plan: DispatchPlan) -> Float[Tensor, "T D"]:
    """Return sum_k rows[slots[t, k]] -> [T, D], dropped slots adding nothing; sums in at least fp32."""
    slots = plan.slots
    num_tokens, num_selected = slots.shape
    if num_tokens == 0 or rows.shape[0] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1])
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not plan.all_kept:
        kept = slots >= 0
        if not slots.is_cpu and rows.shape[0] == slots.numel():
            # A static plan: rather read a row of zeros than wait for the numbers.
            wide = torch.cat([wide, wide.new_zeros(1, wide.shape[1])])
            slots = torch.where(kept, slots, rows.shape[0])
        else:
            held = kept.sum(dim=1)
            return F.embedding_bag(slots[kept], wide, held.cumsum(0) - held, mode="sum").to(rows.dtype)
    if num_selected == 1:
        return wide.index_select(0, slots.view(-1)).to(rows.dtype)
    return F.embedding_bag(slots, wide, mode="sum").to(rows.dtype)


def by_row(values: Float[Tensor, "T K"], plan: DispatchPlan) -> Float[Tensor, "M"]:
    """Return values [T, K] in sorted-row order, [M]."""
    flat = plan.slots.reshape(-1)
    num_rows = plan.token_ids.shape[0]
    if plan.all_kept:
        out = values.new_empty(num_rows)
        out[flat] = values.reshape(-1)
        return out
    # One row too many takes what was dropped.
    out = values.new_empty(num_rows + 1)
    out[torch.where(flat < 0, num_rows, flat)] = values.reshape(-1)
    return out[:num_rows]


def by_slot(values: Float[Tensor, "M"], plan: DispatchPlan) -> Float[Tensor, "T K"]:
    """Return values [M] at their [T, K] slots, zero where dropped."""
    if plan.all_kept:
        return values.index_select(0, plan.slots.reshape(-1)).view_as(plan.slots)
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[torch.where(plan.slots < 0, values.shape[0], plan.slots)]
