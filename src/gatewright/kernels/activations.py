"""The experts' activations: forward value and, for the hand-written backward passes, the derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.errors import UserError, did_you_mean

GATED = {"swiglu": "silu", "geglu": "gelu", "clamped_swiglu": "quick_gelu"}
ACTIVATIONS = ("relu", "gelu", "swiglu", "geglu", "linear", "clamped_swiglu")
# gpt-oss: both halves are cut at 7, and the sigmoid is that of 1.702 times the gate.
_CUT, _SLOPE = 7.0, 1.702


def check_activation(name: str) -> str:
    """Return `name` if it is a known activation; raise UserError otherwise."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"activation {name!r} is unknown{did_you_mean(name, ACTIVATIONS)}; allowed: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return name


def is_gated(name: str) -> bool:
    """Return whether the activation multiplies a gate half with an up half (SwiGLU, GEGLU: Shazeer 2020)."""
    return name in GATED


def _pointwise(name: str, h: Tensor) -> Tensor:
    if name == "linear":
        return h
    if name == "relu":
        return F.relu(h)
    return F.silu(h) if name == "silu" else F.gelu(h)


def _pointwise_backward(name: str, grad: Tensor, h: Tensor) -> Tensor:
    if name == "linear":
        return grad
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, h, 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, h)
    return torch.ops.aten.gelu_backward(grad, h)


def activate(name: str, h: Float[Tensor, "*rows _"]) -> Float[Tensor, "*rows _"]:
    """Return the activation of h: [..., 2F] -> [..., F] when gated (gate half first), else [..., F] -> [...,
    F]; "linear" returns h itself.

    Equation: swiglu(h) = silu(gate) * up; geglu(h) = gelu(gate) * up with the exact (erf) GELU;
    clamped_swiglu(h) = g sigmoid(1.702 g) (clamp(up, -7, 7) + 1), g = min(gate, 7) (gpt-oss).
    """
    if not is_gated(name):
        return _pointwise(name, h)
    gate, up = h.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=_CUT), up.clamp(-_CUT, _CUT)
        return (up + 1) * gate * torch.sigmoid(_SLOPE * gate)
    return _pointwise(GATED[name], gate) * up


def activate_backward(
    name: str, grad: Float[Tensor, "*rows _"], h: Float[Tensor, "*rows H"]
) -> Float[Tensor, "*rows H"]:
    """Return the gradient with respect to h, given the gradient of `activate(name, h)`."""
    if not is_gated(name):
        return _pointwise_backward(name, grad, h)
    gate, up = h.chunk(2, dim=-1)
    grad_h = torch.empty_like(h)
    grad_gate, grad_up = grad_h.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        _clamped_backward(grad, gate, up, grad_gate, grad_up)
        return grad_h
    torch.mul(grad, _pointwise(GATED[name], gate), out=grad_up)
    grad_gate.copy_(_pointwise_backward(GATED[name], grad * up, gate))
    return grad_h


def _clamped_backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Write both gradients: with s = sigmoid(1.702 g), d(g s)/dg = s + 1.702 g s (1 - s); beyond a cut, 0."""
    cut_gate, cut_up = gate.clamp(max=_CUT), up.clamp(-_CUT, _CUT)
    share = torch.sigmoid(_SLOPE * cut_gate)
    grad_up.copy_(torch.where(up == cut_up, grad * cut_gate * share, 0))
    slope = share * (1 + _SLOPE * cut_gate * (1 - share))
    grad_gate.copy_(torch.where(gate == cut_gate, grad * (cut_up + 1) * slope, 0))
