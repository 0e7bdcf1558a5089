"""AdamW over lists of tensors: the norm of all gradients, then one pass that clips, steps, averages and
narrows.

The definition is torch's own operators; where all tensors are contiguous fp32 on the CPU, a native pass gives
the same numbers and reads each of them once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

from gatewright.kernels import native

List = Sequence[Float[Tensor, "..."]]


@dataclass(frozen=True)
class Rates:
    """What all weights of a step share: `toward` is how far the averages move, from 0 to 1."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    toward: float = 0.0


@dataclass(frozen=True)
class Lists:
    """Lists of one length: weights, AdamW's state, and `averages` and bf16 copies (`narrowed`), which may be
    empty.

    `slices` says of each weight whether its experts may rest: 0 never, or E for [E, ...], whose slices stay
    as they are, moments too, where the gradient of the whole slice is 0.
    """

    weights: List
    first: List
    second: List
    steps: List
    slices: Sequence[int]
    averages: List = ()
    narrowed: List = ()


def _native(*lists: List) -> bool:
    """Return whether the native operators take all of these."""
    everything = [one for each in lists for one in each]
    return (
        all(one.dtype == torch.float32 and one.is_contiguous() for one in everything)
        and all(one.device.type == "cpu" and type(one) in _PLAIN for one in everything)
        and not torch.compiler.is_compiling()
        and native.is_ready()
    )


# A subclass (a distributed or a wrapped tensor) has operators of its own.
_PLAIN = (Tensor, torch.nn.Parameter)


def gradient_norm(gradients: List) -> Float[Tensor, ""]:
    """Return the 2-norm of all gradients together, 0-d; natively it is summed in fp64, in an order that does
    not depend on threads.
    """
    if gradients and _native(gradients):
        norm: Tensor = torch.ops.gatewright.gradient_norm(gradients)
        return norm
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def clip_scale(norm: float, largest: float) -> float:
    """Return what gradients are multiplied by so that their norm is at most `largest`; 0 is no clipping."""
    return min(1.0, largest / (norm + 1e-6)) if largest > 0 else 1.0


@torch.no_grad()
def adamw_step(lists: Lists, gradients: List, rates: Rates, scale: float = 1.0) -> None:
    """Take one step of AdamW (decoupled decay, corrected bias, eps outside the root) in place.

    Gradients count `scale` times, and hold anything afterwards. State is of the weights'
    dtype, and each weight's own `steps` [] is counted up.
    Raises: ValueError unless norm and scale are finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"gradients would be multiplied by {scale}")
    if lists.weights and _native(
        lists.weights, gradients, lists.first, lists.second, lists.steps, lists.averages
    ):
        torch.ops.gatewright.adamw_(
            lists.weights,
            gradients,
            lists.first,
            lists.second,
            lists.steps,
            lists.averages,
            lists.narrowed,
            lists.slices,
            rates.rate,
            rates.beta1,
            rates.beta2,
            rates.eps,
            rates.decay,
            scale,
            rates.toward,
        )
        return
    _by_torch(lists, gradients, rates, scale)


def _by_torch(lists: Lists, gradients: List, rates: Rates, scale: float) -> None:
    # torch's fused pass walks memory: a gradient has to lie as its weight does.
    gradients = [
        g if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
        for g, w in zip(gradients, lists.weights, strict=True)
    ]
    resting = _resting(lists, gradients)
    if scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    adamw(
        list(lists.weights),
        gradients,
        list(lists.first),
        list(lists.second),
        [],
        list(lists.steps),
        fused=all(one.is_floating_point() and one.device.type in ("cpu", "cuda") for one in gradients),
        amsgrad=False,
        beta1=rates.beta1,
        beta2=rates.beta2,
        lr=rates.rate,
        weight_decay=rates.decay,
        eps=rates.eps,
        maximize=False,
    )
    for tensor, idle, held in resting:
        tensor[idle] = held
    if lists.averages:
        torch._foreach_lerp_(list(lists.averages), list(lists.weights), rates.toward)
    for copy, weight in zip(lists.narrowed, lists.weights, strict=False):
        copy.copy_(weight)


def _resting(lists: Lists, gradients: List) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (tensor, idle experts, what they hold) of everything that must stay as it is."""
    found = []
    own = zip(lists.weights, lists.first, lists.second, gradients, lists.slices, strict=True)
    for weight, first, second, gradient, slices in own:
        if slices:
            by_slice = (slices, -1)
            idle = (gradient.reshape(by_slice) == 0).all(dim=1).nonzero()[:, 0]
            for tensor in (weight, first, second) if len(idle) else ():
                view = tensor.view(by_slice)
                found.append((view, idle, view[idle]))
    return found
