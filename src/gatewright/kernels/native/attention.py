"""Causal attention and rotary positions in C++, forward and backward; once differentiable."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.kernels import native

MOST_WIDE = 256
# Query rows (heads of one group x positions) that share one reading of keys and values.
FEW_ROWS = 16


def takes(q: Float[Tensor, "B H S head_dim"], k: Float[Tensor, "B Hkv P head_dim"]) -> bool:
    """Return whether the operators take these; keys and values of another dtype only where no gradient is
    asked for and the queries are few.
    """
    if q.shape[3] % 2 or not 2 <= q.shape[3] <= MOST_WIDE or not native.runs_for(q, k):
        return False
    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= FEW_ROWS
    return q.dtype == k.dtype or (few and not torch.is_grad_enabled())


def attend(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv P head_dim"],
    v: Float[Tensor, "B Hkv P head_dim"],
    past: int,
) -> Float[Tensor, "B H S head_dim"]:
    """Return causal attention [B, H, S, head_dim], which lies as [B, S, H, head_dim]."""
    out: Tensor = torch.ops.gatewright.attention_forward(q, k, v, past)[0]
    return out


def rotate_pair(
    q: Float[Tensor, "B H S head_dim"],
    k: Float[Tensor, "B Hkv S head_dim"],
    cos: Float[Tensor, "S head_dim"],
    sin: Float[Tensor, "S head_dim"],
) -> tuple[Float[Tensor, "B H S head_dim"], Float[Tensor, "B Hkv S head_dim"]]:
    """Return q and k turned by their positions' angles, computed in fp32; both lie as [B, S, H, head_dim]."""
    turned_q, turned_k = torch.ops.gatewright.rotate_pair(q, k, cos.contiguous(), sin.contiguous(), False)
    return turned_q, turned_k


def register() -> None:
    """Return nothing: tell torch the shapes and gradients of the operators."""
    library = torch.library
    library.register_fake("gatewright::attention_forward", _shape_of_forward)
    library.register_fake("gatewright::attention_backward", _shape_of_backward)
    library.register_fake("gatewright::rotate_pair", _shape_of_pair)
    library.register_autograd("gatewright::attention_forward", _differentiate, setup_context=_keep)
    library.register_autograd("gatewright::rotate_pair", _turn_back, setup_context=_keep_angles)


def _heads_like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape that lies as [B, S, H, head_dim]."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _shape_of_forward(q: Tensor, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _shape_of_backward(due: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return _heads_like(q), _heads_like(k), _heads_like(v)


def _shape_of_pair(q: Tensor, k: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return _heads_like(q), _heads_like(k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.past = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, due: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if due is None:
        return (None,) * 4
    native.only_once("attention")
    return *torch.ops.gatewright.attention_backward(due, *ctx.saved_tensors, ctx.past), None


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.back = inputs[4]


def _turn_back(ctx: Any, due_q: Tensor, due_k: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.gatewright.rotate_pair(due_q, due_k, *ctx.saved_tensors, not ctx.back), None, None, None
