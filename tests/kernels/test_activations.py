"""Activations: values worked by hand, and the hand-written derivatives against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from gatewright.errors import UserError
from gatewright.kernels import ACTIVATIONS, activate, check_activation, is_gated
from gatewright.kernels.activations import activate_backward
from tests.oracle import moe as oracle


def test_relu_by_hand():
    assert activate("relu", torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 2.0]


def test_gelu_is_the_exact_one():
    # gelu(1) = 1 * Phi(1) = (1 + erf(1 / sqrt 2)) / 2 = 0.8413447; the tanh approximation gives 0.8411920.
    value = activate("gelu", torch.tensor([1.0], dtype=torch.float64)).item()
    assert value == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=1e-15)
    assert abs(value - 0.8411920) > 1e-4


def test_swiglu_takes_the_gate_first():
    # h = (gate 1, up 3): silu(1) * 3 = 3 / (1 + e^-1) = 2.1931757; swapped it would be 2.8577224.
    value = activate("swiglu", torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert value.tolist() == pytest.approx([3 / (1 + math.exp(-1))], abs=1e-15)


def test_geglu_takes_the_gate_first():
    # h = (gates 1 and 0, ups 3 and 5): gelu(1) * 3 = 2.5240341 and gelu(0) * 5 = 0.
    value = activate("geglu", torch.tensor([1.0, 0.0, 3.0, 5.0], dtype=torch.float64))
    assert value.tolist() == pytest.approx([3 * 0.5 * (1 + math.erf(1 / math.sqrt(2))), 0.0], abs=1e-15)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_equal_the_oracle(name: str):
    h = torch.linspace(-4, 4, 30, dtype=torch.float64).reshape(3, 10)
    expected = torch.stack([oracle.act(name, row) for row in h])
    assert activate(name, h).shape == (3, 5 if is_gated(name) else 10)
    torch.testing.assert_close(activate(name, h), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_equals_autograds(name: str, dtype: torch.dtype):
    h = torch.linspace(-4, 4.1, 30).to(dtype).reshape(3, 10).requires_grad_()
    value = activate(name, h)
    grad = torch.linspace(-1, 2, value.numel()).to(dtype).reshape(value.shape)
    (expected,) = torch.autograd.grad(value, h, grad)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(activate_backward(name, grad, h.detach()), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_equals_finite_differences(name: str):
    h = torch.linspace(-2.9, 3.1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: oracle_row_sum(name, h), (h,))
    value = activate(name, h)
    (by_rule,) = torch.autograd.grad(oracle_row_sum(name, h), h)
    by_hand = activate_backward(name, torch.ones_like(value), h.detach())
    torch.testing.assert_close(by_hand, by_rule, rtol=1e-13, atol=1e-14)


def oracle_row_sum(name: str, h: torch.Tensor) -> torch.Tensor:
    """Return the sum of the oracle's activation over all rows."""
    return torch.stack([oracle.act(name, row).sum() for row in h]).sum()


def test_an_unknown_activation_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"activation 'swiglo' is unknown; did you mean 'swiglu'\?; allowed: relu"
    ):
        check_activation("swiglo")
