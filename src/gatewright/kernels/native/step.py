"""What stands around attention and experts in a step, in C++: norms, linear maps, the plain feed-forward
layer, cross-entropy. Functions of autograd hand on to operators: a registered formula costs several times as
much per call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatewright.kernels import native


class Norm(torch.autograd.Function):
    """Rows x [T, D], y or None, weight, eps -> x + y (x itself without y) and its norm times weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return the sum and its norm; the norm alone without y."""
        sums, normed, roots = torch.ops.gatewright.norm_forward(x, y, weight, eps)
        ctx.kind = None if y is None else y.dtype
        ctx.save_for_backward(x if y is None else sums, roots, weight)
        ctx.set_materialize_grads(False)
        return normed if y is None else (sums, normed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, y and weight."""
        native.only_once("a norm")
        sums, roots, weight = ctx.saved_tensors
        beside, grad = (None, *grads)[-2:]
        of_sum, of_weight = beside, None
        if grad is not None:
            laid = None if beside is None else beside.contiguous()
            of_sum, of_weight = torch.ops.gatewright.norm_backward(
                grad.contiguous(), laid, sums, roots, weight
            )
        of_y = None if ctx.kind is None or of_sum is None else of_sum.to(ctx.kind)
        return of_sum, of_y, of_weight, None


class Maps(torch.autograd.Function):
    """x [T, D] and weights [N, D] of one dtype -> x W^T for each: multiplied and returned in bf16 where
    `narrowed`, else in fp32. A panel of tokens is read once for all maps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrowed: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return one output for each weight."""
        ctx.save_for_backward(x, *weights)
        ctx.narrowed = narrowed
        return tuple(torch.ops.gatewright.maps_forward(x, list(weights), narrowed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the weights."""
        native.only_once("a linear map")
        x, *weights = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        laid = [grad.contiguous() for grad in grads]
        of_x, of_weights = torch.ops.gatewright.maps_backward(
            laid, x, weights, ctx.narrowed, need_x, any(needs)
        )
        return of_x if need_x else None, None, *(of_weights or [None] * len(weights))


class Mlp(torch.autograd.Function):
    """x [T, D], w_in, w_down, biases or None, the activation's name -> y [T, D] in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        w_down: Tensor,
        b_in: Tensor | None,
        b_down: Tensor | None,
        activation: str,
    ) -> Tensor:
        """Return y; keeps x and the pre-activations where a gradient will be wanted."""
        keep = any(ctx.needs_input_grad)
        y, pre = torch.ops.gatewright.mlp_forward(x, w_in, w_down, b_in, b_down, activation, keep)
        ctx.save_for_backward(pre, x, w_in, w_down, b_in, b_down)
        ctx.activation = activation
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, both weights and both biases."""
        native.only_once("a feed-forward layer")
        pre, *given = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        found = torch.ops.gatewright.mlp_backward(
            grad.contiguous(), pre, needs[0], any(needs[1:]), *given, ctx.activation
        )
        return *(one if needed else None for one, needed in zip(found, needs, strict=True)), None


class CrossEntropy(torch.autograd.Function):
    """Logits [T, V] and targets [T] -> the mean loss, 0-d fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; keeps the logits and each row's log-sum-exp."""
        loss, sums = torch.ops.gatewright.cross_entropy_forward(logits, targets)
        ctx.save_for_backward(logits, targets, sums)
        out: Tensor = loss
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits, in their dtype."""
        native.only_once("the cross-entropy")
        return torch.ops.gatewright.cross_entropy_backward(grad, *ctx.saved_tensors), None


def register() -> None:
    """Return nothing: tell torch the shapes of what these operators return."""
    for name, shape in (
        ("norm_forward", _shape_of_norm),
        ("norm_backward", _shape_of_norm_backward),
        ("maps_forward", _shape_of_maps),
        ("maps_backward", _shape_of_maps_backward),
        ("mlp_forward", _shape_of_mlp),
        ("mlp_backward", _shape_of_mlp_backward),
        ("cross_entropy_forward", _shape_of_loss),
        ("cross_entropy_backward", _shape_of_loss_backward),
    ):
        torch.library.register_fake(f"gatewright::{name}", shape)


def _shape_of_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty((0 if y is None else x.shape[0], x.shape[1]))
    return sums, torch.empty_like(x), weight.new_empty(x.shape[0])


def _shape_of_norm_backward(*given: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(given[2]), torch.empty_like(given[4])


def _shape_of_maps(x: Tensor, weights: list[Tensor], narrowed: bool) -> list[Tensor]:
    kind = torch.bfloat16 if narrowed else torch.float32
    return [x.new_empty((x.shape[0], weight.shape[0]), dtype=kind) for weight in weights]


def _shape_of_maps_backward(*given: Any) -> tuple[Tensor, list[Tensor]]:
    _, x, weights, _, need_x, need_weights = given
    of_weights = [torch.empty_like(weight) for weight in weights] if need_weights else []
    return x.new_empty((x.shape[0] if need_x else 0, x.shape[1])), of_weights


def _shape_of_mlp(*given: Any) -> tuple[Tensor, Tensor]:
    x, w_in, keep = given[0], given[1], given[6]
    return torch.empty_like(x), x.new_empty((x.shape[0] if keep else 0, w_in.shape[0]))


def _shape_of_mlp_backward(
    grad_y: Tensor, pre: Tensor, need_x: bool, need_weights: bool, *given: Any
) -> tuple[Tensor, ...]:
    x, *weights = given[:5]
    of_weights = (
        torch.empty_like(one) if need_weights and one is not None else x.new_empty(0) for one in weights
    )
    return torch.empty_like(x) if need_x else x.new_empty(0), *of_weights


def _shape_of_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[0], dtype=torch.float32)


def _shape_of_loss_backward(grad: Tensor, logits: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(logits)
