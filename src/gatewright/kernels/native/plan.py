"""The plan of a dropless layer in C++: one counting sort where torch takes a dozen steps."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from gatewright.kernels import native


def plan_rows(
    experts: Int64[Tensor, "T K"], num_experts: int
) -> tuple[Int64[Tensor, "M"], Int64[Tensor, "E"], Int64[Tensor, "T K"]] | None:
    """Return token_ids [M], counts [E] and slots [T, K] of a plan that keeps every choice (-1 is none); None
    in compiled code, off the CPU, and where the native kernels do not run.

    Raises: ValueError for an expert id of `num_experts` or more.
    """
    if experts.device.type != "cpu" or torch.compiler.is_compiling() or not native.is_ready():
        return None
    token_ids, counts, slots = torch.ops.gatewright.plan_rows(experts.contiguous(), num_experts)
    return token_ids, counts, slots


def register() -> None:
    """Return nothing: tell torch the shapes of the operator; how many rows there are is in the numbers."""
    torch.library.register_fake("gatewright::plan_rows", _shape)


def _shape(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return experts.new_empty(rows), experts.new_empty(num_experts), torch.empty_like(experts)
