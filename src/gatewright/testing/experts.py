"""Hold anybody's expert layer against a loop over tokens and choices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gatewright.kernels import check_activation, is_gated
from gatewright.testing.report import TOLERANCE, Mismatch

ExpertsFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def check_experts(
    fn: ExpertsFunction, activation: str = "swiglu", *, dtype: torch.dtype = torch.float64
) -> None:
    """Hold an expert layer against a loop over tokens and choices: its output and all four gradients.

    Equation: y_t = sum_k weights[t, k] w_down[e] act(w_in[e] x_t), e = experts[t, k]; a place of -1 adds 0.
    Args: `fn(x [T, D], experts [T, K] int64, weights [T, K], w_in [E, F or 2F, D], w_down [E, D, F])`
    returns y [T, D]; gated activations take 2F rows, gate first; `dtype` is that of all tensors and sets
    the tolerance, relative to the largest number of each tensor (fp64 1e-12, fp32 1e-5). Cases: empty
    experts, all tokens to one, K = E, E = 1, no tokens, empty places, widths that are not multiples of 4.
    Raises: Mismatch; UserError for an unknown activation.
    """
    check_activation(activation)
    everything = [[1, 0, 2], [0, 2, 1]]
    for name, num_experts, width, hidden, places in (
        ("empty experts", 6, 5, 3, [[1, 4], [4, 2], [1, 2]]),
        ("all tokens to one expert", 3, 8, 4, [[2], [2], [2], [2]]),
        ("K = E", 3, 3, 7, everything),
        ("one expert", 1, 4, 4, [[0], [0]]),
        ("empty places", 4, 5, 5, [[1, -1], [-1, -1], [3, 1]]),
        ("no tokens", 2, 4, 3, []),
        ("wide and aligned", 4, 16, 32, [[0, 1], [3, 2], [1, 0], [1, 3], [2, 0]]),
    ):
        rows = hidden * (2 if is_gated(activation) else 1)
        draw = torch.Generator().manual_seed(1)
        experts = torch.tensor(places, dtype=torch.int64).reshape(
            len(places), len(places[0]) if places else 1
        )
        shapes = (len(places), width), experts.shape, (num_experts, rows, width), (num_experts, width, hidden)
        given = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
        exact = [leaf.detach().double().requires_grad_() for leaf in given]
        y = fn(given[0], experts, *given[1:])
        expected = _slow_experts(activation, experts, *exact)
        label = f"{activation}, {name}"
        _check_near(f"{label}: y", y, expected)
        direction = torch.randn(expected.shape, generator=draw).to(dtype)
        found = torch.autograd.grad(y, given, direction.to(y.dtype), allow_unused=True)
        wanted = torch.autograd.grad(expected, exact, direction.double())
        for what, one, other in zip(("x", "weights", "w_in", "w_down"), found, wanted, strict=True):
            if one is None and other.any():
                raise Mismatch(f"{label}: no gradient for {what}")
            if one is not None:
                _check_near(f"{label}: gradient of {what}", one, other)


def _slow_experts(
    activation: str, experts: Tensor, x: Tensor, weights: Tensor, w_in: Tensor, w_down: Tensor
) -> Tensor:
    """Return y by the definition; every input takes part, so that what nothing reaches has the gradient 0."""
    rows = [x[t] * 0 + 0 * (weights.sum() + w_in.sum() + w_down.sum()) for t in range(x.shape[0])]
    for t, ids in enumerate(experts.tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                hidden = _activated(activation, w_in[e] @ x[t])
                rows[t] = rows[t] + weights[t, k] * (w_down[e] @ hidden)
    return torch.stack(rows) if rows else x * 0 + 0 * (weights.sum() + w_in.sum() + w_down.sum())


def _activated(name: str, h: Tensor) -> Tensor:
    """Return the activation of one hidden vector, from its formula."""
    if name == "linear":
        return h
    if name == "relu":
        return h * (h > 0)
    if name == "gelu":
        return h * (1 + torch.erf(h / math.sqrt(2))) / 2
    gate, up = h[: len(h) // 2], h[len(h) // 2 :]
    if name == "geglu":
        return _activated("gelu", gate) * up
    if name == "clamped_swiglu":
        gate, up = torch.minimum(gate, 0 * gate + 7), torch.maximum(torch.minimum(up, 0 * up + 7), 0 * up - 7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    return gate / (1 + torch.exp(-gate)) * up


def _check_near(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise Mismatch(f"{name} has the shape {tuple(found.shape)}; expected {tuple(expected.shape)}")
    if not found.numel():
        return
    error = (found.double() - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-2)
    if not error <= TOLERANCE[found.dtype] * scale:
        raise Mismatch(
            f"{name} is off by {error / scale:.3g} of its largest number; "
            f"allowed for {found.dtype}: {TOLERANCE[found.dtype]:.0e}"
        )
