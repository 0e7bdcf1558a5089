"""Shapes and gradients of the native operators, for compilers and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatewright.kernels import native


def register() -> None:
    """Return nothing: tell torch about operators that a library has just brought."""
    torch.library.register_fake("gatewright::experts_forward", _shape_of_forward)
    torch.library.register_fake("gatewright::experts_backward", _shape_of_backward)
    torch.library.register_autograd("gatewright::experts_forward", _differentiate, setup_context=_keep)


def _shape_of_forward(*given: Any) -> tuple[Tensor, Tensor]:
    x, w_in, token_ids, keep = given[0], given[2], given[7], given[12]
    rows = token_ids.shape[0] if keep else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, w_in.shape[1])


def _shape_of_backward(
    grad_y: Tensor, pre: Tensor, need_x: bool, need_weights: bool, *given: Any
) -> tuple[Tensor, ...]:
    x, combine_weights, w_in, w_down, b_in, b_down = given[:6]
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(combine_weights),
        *(
            torch.empty_like(one) if need_weights and one is not None else x.new_empty(0)
            for one in (w_in, w_down, b_in, b_down)
        ),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:10])
    ctx.set_materialize_grads(False)
    ctx.words = inputs[10:12]


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    pre, *given = ctx.saved_tensors
    if grad_y is None:
        return (None,) * 13
    native.only_once("the experts' backward pass")
    needs = ctx.needs_input_grad
    found = torch.ops.gatewright.experts_backward(
        grad_y.contiguous(), pre, needs[0], any(needs[2:6]), *given, *ctx.words
    )
    there = [given[i] is not None and needs[i] for i in range(6)]
    return *(grad if here else None for grad, here in zip(found, there, strict=True)), *[None] * 7
