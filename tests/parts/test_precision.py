"""What is computed in which dtype: the router's own, autocast, and repeatable bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gatewright.kernels import runnable_backends
from gatewright.parts import MoELayer, balance_loss, z_loss

each_backend = pytest.mark.parametrize("backend", runnable_backends())


def best_score(router_dtype: torch.dtype) -> float:
    """Return the highest score of eleven experts whose logits are ten times 128 and once 128.5."""
    layer = MoELayer(1, 11, 1, 2, weights="raw", router_dtype=router_dtype)
    with torch.no_grad():
        layer.router.weight.fill_(128.0)
        layer.router.weight[7] = 128.5
    record = layer(torch.ones(1, 1), capture=True)[1]["router"]
    assert record.scores is not None
    assert record.scores.dtype == router_dtype
    return record.scores.max().item()


def test_a_bf16_router_cannot_tell_128_from_128_5():
    # ST-MoE, footnote 7: truly 1 / (1 + 10 e^-1/2) = 0.142; in bf16 128.5 rounds to 128: 1 / 11 = 0.091.
    assert best_score(torch.float32) == pytest.approx(1 / (1 + 10 * math.exp(-0.5)), abs=1e-6)
    assert best_score(torch.float64) == pytest.approx(1 / (1 + 10 * math.exp(-0.5)), abs=1e-12)
    assert best_score(torch.bfloat16) == pytest.approx(1 / 11, abs=1e-3)


def draw(num_tokens: int = 40, **options: object) -> tuple[MoELayer, Tensor]:
    """Return a layer of fixed weights and its input."""
    torch.manual_seed(0)
    layer = MoELayer(16, 8, 2, 12, num_shared_experts=1, **options)  # type: ignore[arg-type]
    return layer, torch.randn(num_tokens, 16)


@each_backend
def test_autocast_leaves_the_router_in_fp32_and_the_experts_not(backend: str):
    layer, x = draw(backend=backend)
    y, stats = layer(x, capture=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_auto, stats_auto = layer(x, capture=True)
    plain, auto = stats["router"], stats_auto["router"]
    for name in ("logits", "scores", "experts", "combine_weights", "score_sums", "logsumexp_square_sum"):
        assert torch.equal(getattr(auto, name), getattr(plain, name)), name
        assert getattr(auto, name).dtype == getattr(plain, name).dtype, name
    assert (y.dtype, y_auto.dtype) == (torch.float32, torch.bfloat16)
    error = (y_auto.float() - y).abs().max() / y.abs().max()
    assert 1e-4 < error < 3e-2, "bf16 is seen, and is no worse than bf16"
    (y_auto.float().square().mean() + balance_loss(stats_auto)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@each_backend
def test_autocast_leaves_fp64_alone(backend: str):
    layer, x = draw(backend=backend)
    layer, x = layer.double(), x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    assert torch.equal(y, layer(x)[0])


@each_backend
def test_gradients_under_autocast_are_those_of_fp32_within_bf16(backend: str):
    grads = []
    for enabled in (False, True):
        layer, x = draw(backend=backend)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, stats = layer(x)
        loss = y.float().square().mean() + balance_loss(stats)
        grads.append(torch.autograd.grad(loss, (x, *layer.parameters())))
    for exact, rounded in zip(*grads, strict=True):
        assert (exact - rounded).abs().max() <= 5e-2 * exact.abs().max()


@each_backend
def test_a_bf16_model_keeps_an_fp32_router(backend: str):
    layer, x = draw(backend=backend)
    layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    y, stats = layer(x, capture=True)
    record = stats["router"]
    assert record.logits is not None
    assert (y.dtype, record.logits.dtype) == (torch.bfloat16, torch.float32)
    # The same numbers, computed by hand in fp32 from the bf16 weights.
    assert torch.equal(record.logits, x.float() @ layer.router.weight.float().T)
    rough = (x @ layer.router.weight.T).float()
    assert not torch.equal(record.logits, rough)


@each_backend
@pytest.mark.parametrize("factor", [None, 0.7])
def test_two_runs_have_the_same_bits(backend: str, factor: float | None):
    assert_same_bits(*(run(backend, factor, recompute=False) for _ in range(2)))


@each_backend
@pytest.mark.parametrize("factor", [None, 0.7])
def test_recompute_has_the_same_bits(backend: str, factor: float | None):
    # The losses' values and every gradient, the router's through balance and z-loss included.
    assert_same_bits(run(backend, factor, recompute=False), run(backend, factor, recompute=True))


def run(backend: str, factor: float | None, recompute: bool) -> list[Tensor]:
    """Return y, both losses and all gradients of one step."""
    layer, x = draw(backend=backend, capacity_factor=factor)
    x.requires_grad_()
    y, stats = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    balance, z = balance_loss(stats), z_loss(stats)
    loss = y.square().mean() + 0.01 * balance + 0.001 * z
    return [y, balance, z, *torch.autograd.grad(loss, (x, *layer.parameters()))]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    """Fail unless all tensors are equal bit for bit."""
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
