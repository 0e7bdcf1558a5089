"""A router behind its logits in one pass: scores, the K best, their weights and the sums that losses take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from gatewright.kernels import native

# Choosing takes one pass over a row for each choice; beyond this, sorting rows costs less.
_MOST_SELECTED = 64


@dataclass(frozen=True)
class TopK:
    """A rule that takes the K best of all experts: `bias` [E] is added where it chooses, never where it
    weighs; the sum of chosen scores is taken for `least_sum` at least, where it divides.
    """

    num_selected: int
    weights: str
    scale: float = 1.0
    bias: Tensor | None = None
    least_sum: float = -torch.inf


@dataclass(frozen=True)
class FusedRoute:
    """What one pass over logits [T, E] found; `weights` and the sums carry gradient.

    `experts` [T, K] are -1 for padding, which enters no sum and no count. The sums and counts are those of
    RouterStats, by groups of tokens.
    """

    weights: Float[Tensor, "T K"]
    experts: Int64[Tensor, "T K"]
    score_sums: Float[Tensor, "G E"]
    logsumexp_sum: Float[Tensor, ""]
    logsumexp_square_sum: Float[Tensor, ""]
    nonfinite: Int64[Tensor, ""]
    counts: Int64[Tensor, "G E"]
    first_counts: Int64[Tensor, "G E"]


def takes(values: Float[Tensor, "T E"], num_selected: int) -> bool:
    """Return whether the native router's operators take these: fp32, eager, on the CPU, not too many."""
    plain = values.dtype == torch.float32 and values.device.type == "cpu"
    few = 1 <= num_selected <= min(_MOST_SELECTED, values.shape[1])
    return plain and few and not torch.compiler.is_compiling() and native.is_ready()


def fused_route(
    logits: Float[Tensor, "T E"],
    scores: str | None,
    top: TopK | None,
    mask: Bool[Tensor, "T"] | None = None,
    group_size: int | None = None,
) -> FusedRoute | None:
    """Return the whole route of T tokens; None where the rule, the scores or the logits are not such that
    the native operator takes them.

    Args: `scores` "softmax", "sigmoid" or "identity"; `group_size` tokens per group of the sums. Once
    differentiable; the same bits for every number of threads, and for a token whatever stands beside it.
    """
    if top is None or scores is None or not takes(logits, top.num_selected):
        return None
    found = torch.ops.gatewright.route(
        logits.contiguous(),
        None if mask is None else mask.contiguous(),
        top.bias,
        top.num_selected,
        scores,
        top.weights,
        top.scale,
        top.least_sum,
        False,
        group_size or 0,
    )
    return FusedRoute(*found[:8])


def select_top(scores: Float[Tensor, "T E"], num_selected: int) -> Int64[Tensor, "T K"] | None:
    """Return the ids of each row's K highest scores as `rank_rows` orders them; None where not taken."""
    if not takes(scores, num_selected):
        return None
    return torch.ops.gatewright.select_top(scores.detach().contiguous(), num_selected)


def register() -> None:
    """Return nothing: tell torch the shapes and gradients of the router's operators."""
    torch.library.register_fake("gatewright::route", _shape_of_route)
    torch.library.register_fake("gatewright::route_backward", _shape_of_backward)
    torch.library.register_fake("gatewright::select_top", _shape_of_choice)
    torch.library.register_autograd("gatewright::route", _differentiate, setup_context=_keep)


def _shape_of_route(*given: Any) -> tuple[Tensor, ...]:
    logits, num_selected, group_size = given[0], given[3], given[9]
    num_tokens, num_experts = logits.shape
    groups = 1
    if group_size > 0:
        groups = max((num_tokens + group_size - 1) // group_size, 1)
    chosen, table = (num_tokens, num_selected), (groups, num_experts)
    long, few = torch.int64, torch.int32
    return (
        logits.new_empty(chosen),
        logits.new_empty(chosen, dtype=long),
        logits.new_empty(table),
        logits.new_empty(()),
        logits.new_empty(()),
        logits.new_empty((), dtype=long),
        logits.new_empty(table, dtype=long),
        logits.new_empty(table, dtype=long),
        logits.new_empty(chosen, dtype=few),
        logits.new_empty((4, num_tokens)),
    )


def _shape_of_backward(*given: Any) -> Tensor:
    return given[4].new_empty(given[4].shape)


def _shape_of_choice(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, mask, _, *words, _, group_size = inputs
    ctx.save_for_backward(logits, output[8], output[9], mask)
    ctx.set_materialize_grads(False)
    ctx.words = (*words, group_size)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    came = [grads[i] for i in (0, 2, 3, 4)]
    if all(one is None for one in came):
        return (None,) * 10
    native.only_once("the router's backward pass")
    found = torch.ops.gatewright.route_backward(
        *(None if one is None else one.contiguous() for one in came), *ctx.saved_tensors, *ctx.words
    )
    return found, *[None] * 9
