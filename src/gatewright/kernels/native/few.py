"""A few tokens, as in decoding: experts and linear maps whose weights are read once, at the memory's pace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels import native
from gatewright.kernels.plan import DispatchPlan, ExpertWeights

# With more tokens, matmuls that pack their weights cost less than dot products do.
MOST_TOKENS = 8


def takes_few(num_tokens: int, *tensors: Tensor | None) -> bool:
    """Return whether a call is one of these: 1 to MOST_TOKENS tokens, and nobody asks for a gradient."""
    if torch.compiler.is_compiling() or not 0 < num_tokens <= MOST_TOKENS:
        return False
    return not torch.is_grad_enabled() or not any(one is not None and one.requires_grad for one in tensors)


def experts_few(
    x: Float[Tensor, "T D"],
    plan: DispatchPlan,
    combine_weights: Float[Tensor, "T K"],
    weights: ExpertWeights,
) -> Float[Tensor, "T D"]:
    """Return y [T, D] as `reference.expert_mlp` does, without gradient. Weights of x's dtype, fp32 or int8.

    Each chosen expert is read once, whoever of the tokens share it; a token's numbers are the same bits
    whatever stands beside it. In fp32 y differs from the sorted path by the rounding of sums, up to 1e-5 of
    its largest number; in bf16 by up to 3e-2 of it, since here parts of a token are added up in fp32.
    """
    w = weights
    tensors = (x, combine_weights.float(), w.w_in, w.w_down, w.scale_in, w.scale_down, w.b_in, w.b_down)
    y: Tensor = torch.ops.gatewright.experts_few(
        *(None if one is None else one.contiguous() for one in tensors),
        plan.token_ids.contiguous(),
        plan.counts.contiguous(),
        plan.slots.contiguous(),
        w.activation,
        plan.weight_side == "input",
    )
    return y


def few_rows_maps(
    x: Float[Tensor, "*batch D"], weights: Sequence[Float[Tensor, "_ D"]]
) -> list[Tensor] | None:
    """Return x W^T for each W [N, D], in x's dtype; None where a call is not one of these: more tokens, a
    gradient that is asked for, autocast, weights that are not of x's dtype.
    """
    # First of all: what is compiled or exported may not be held to a number of tokens by a question.
    if not native.runs_for(x) or torch.is_autocast_enabled("cpu"):
        return None
    width = x.shape[-1]
    num_tokens = x.numel() // width if width else 0
    if not 0 < num_tokens <= MOST_TOKENS or not takes_few(num_tokens, x, *weights):
        return None
    laid = []
    for one in weights:
        if one.dtype != x.dtype or not one.is_cpu:
            return None
        laid.append(one.contiguous())
    found = torch.ops.gatewright.few_rows_maps(x.reshape(num_tokens, width).contiguous(), laid)
    return [one.view(*x.shape[:-1], -1) for one in found]


def register() -> None:
    """Return nothing: tell torch the shapes of both operators."""
    torch.library.register_fake("gatewright::experts_few", _shape_of_experts)
    torch.library.register_fake("gatewright::few_rows_maps", _shapes_of_maps)


def _shape_of_experts(x: Tensor, *given: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shapes_of_maps(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
