"""Tokens for a noisy router, and the router with its weights drawn, beside leaves for the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gatewright.parts import RoutingCall

CPU = torch.device("cpu")


@dataclass(frozen=True)
class NoisyCase:
    """x [T, 3] in fp64, E, K of 1 to E (2 or more where a gate would be constant), a mask [T] or none."""

    x: Tensor
    num_experts: int
    num_selected: int
    mask: Tensor | None
    training: bool
    seed: int

    @property
    def call(self) -> RoutingCall:
        return RoutingCall(mask=self.mask, training=self.training, key=torch.tensor(self.seed))

    def real(self, token: int) -> bool:
        return self.mask is None or bool(self.mask[token])


@st.composite
def noisy_cases(draw: st.DrawFn, constant: bool = False) -> NoisyCase:
    """Draw a case; with `constant`, K may be 1 of many."""
    num_tokens, num_experts = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    least = 1 if constant or num_experts == 1 else 2
    seed = draw(st.integers(0, 10_000))
    source = torch.Generator().manual_seed(seed)
    return NoisyCase(
        torch.randn(num_tokens, 3, generator=source, dtype=torch.float64),
        num_experts,
        draw(st.integers(least, num_experts)),
        torch.rand(num_tokens, generator=source) < 0.7 if draw(st.booleans()) else None,
        draw(st.sampled_from((True, True, False))),
        seed,
    )


def draw_weights(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter in fp64, and return the module."""
    source = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return module


def twin(tensor: Tensor) -> Tensor:
    """Return the same numbers as a leaf of its own."""
    return tensor.detach().clone().requires_grad_()


def add(total: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Return both lists' sums, entry by entry."""
    return [one + other for one, other in zip(total, values, strict=True)]
