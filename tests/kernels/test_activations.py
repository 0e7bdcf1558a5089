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


def test_clamped_swiglu_by_hand():
    # gpt-oss: g = min(gate, 7), u = clamp(up, -7, 7), out = (u + 1) g sigmoid(1.702 g).
    # (gate 0.5, up 2): 3 * 0.5 * sigmoid(0.851); (9, -8): (-7 + 1) * 7 * sigmoid(11.914), both cut;
    # (-9, 10): the gate has no cut below, (7 + 1) * -9 * sigmoid(-15.318).
    gates, ups = [0.5, 9.0, -9.0], [2.0, -8.0, 10.0]
    value = activate("clamped_swiglu", torch.tensor(gates + ups, dtype=torch.float64))
    expected = [
        3 * 0.5 / (1 + math.exp(-0.851)),
        -6 * 7 / (1 + math.exp(-11.914)),
        8 * -9 / (1 + math.exp(15.318)),
    ]
    assert value.tolist() == pytest.approx(expected, rel=1e-14)
    # e^-0.851 = 0.4269877, so the first is 1.5 / 1.4269877 = 1.0511653.
    assert value[0].item() == pytest.approx(1.0511653, abs=1e-7)


def test_beyond_a_cut_the_gradient_is_zero():
    # Gates 8, 1, 1, -9 and ups 1, 8, -8, 1: the cut half has the gradient 0, the other one not.
    h = torch.tensor([8.0, 1, 1, -9, 1, 8, -8, 1], dtype=torch.float64)
    grad = activate_backward("clamped_swiglu", torch.ones(4, dtype=torch.float64), h)
    assert (grad == 0).tolist() == [True, False, False, False, False, True, True, False]
    # At gate 1, up 8: (7 + 1) (s + 1.702 s (1 - s)), s = sigmoid(1.702).
    s = 1 / (1 + math.exp(-1.702))
    assert grad[1].item() == pytest.approx(8 * (s + 1.702 * s * (1 - s)), rel=1e-14)


def test_linear_is_the_identity():
    h = torch.tensor([-1.5, 0.0, 2.0])
    assert torch.equal(activate("linear", h), h)
    assert torch.equal(activate_backward("linear", h, torch.ones(3)), h)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_equal_the_oracle(name: str):
    h = torch.linspace(-9, 9, 30, dtype=torch.float64).reshape(3, 10)
    expected = torch.stack([oracle.act(name, row) for row in h])
    assert activate(name, h).shape == (3, 5 if is_gated(name) else 10)
    torch.testing.assert_close(activate(name, h), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_derivative_equals_autograds(name: str, dtype: torch.dtype):
    h = torch.linspace(-9, 9.2, 30).to(dtype).reshape(3, 10).requires_grad_()
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
