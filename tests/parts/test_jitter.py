"""Jitter's draws: two numbers of a word, uniform and independent, whichever way they are worked out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gatewright.kernels import native
from gatewright.parts import draws
from gatewright.parts.draws import centred, gumbel, normal, uniform
from gatewright.parts.jitter import jittered
from tests.parts.test_draws import CPU, furthest, key, word_of

MANY = 2**18
needs_native = pytest.mark.skipif(not native.is_ready(), reason=native.status().reason)


def words(u: Tensor) -> Tensor:
    return (u.double() * 2**15).long()


def test_both_halves_of_a_word_are_numbers_low_before_high():
    found = words(centred(key(7), (300,), CPU)).tolist()
    expected = []
    for i in range(150):
        word = word_of(7, i)
        expected += [half - 2**16 if half >= 2**15 else half for half in (word % 2**16, word >> 16)]
    assert found == expected
    # Recorded runs depend on them.
    assert found[:4] == [-2198, 32320, -29980, 31461]


def test_element_i_depends_on_key_and_i_alone():
    whole = centred(key(5), (MANY,), CPU)
    for size in (0, 1, 7, 2**17 + 1):
        assert torch.equal(centred(key(5), (size,), CPU), whole[:size])
    assert torch.equal(centred(key(5), (3, 5), CPU).flatten(), whole[:15])
    assert torch.equal(centred(key(5), (64,), CPU, torch.float64), whole[:64].double())
    assert not torch.equal(centred(key(6), (64,), CPU), whole[:64])


@pytest.mark.parametrize("number", [0, 1, -1, 2**62])
def test_moments_and_distribution(number: int):
    u = centred(key(number), (MANY,), CPU).double()
    assert u.min() >= -1
    assert u.max() < 1
    assert abs(u.mean()) < 4 * (1 / 3 / MANY) ** 0.5
    # The variance of u^2 is 1/5 - 1/9.
    assert abs(u.square().mean() - 1 / 3) < 4 * (4 / 45 / MANY) ** 0.5
    assert furthest((u + 1).sort().values / 2) < 1.95


def test_neighbours_and_bits_have_nothing_in_common():
    drawn = torch.stack([centred(key(n), (2**13,), CPU) for n in range(96)]).double()
    for lag in (1, 2, 3, 4, 64, 256):
        along = (drawn[:, lag:] * drawn[:, :-lag]).sum(dim=1) * 3 / math.sqrt(drawn.shape[1] - lag)
        assert along.abs().max() < 4.5, lag
    table = drawn @ drawn.T * 3 / math.sqrt(drawn.shape[1])
    table.fill_diagonal_(0)
    assert table.abs().max() < 5
    halves = words(drawn[0]).view(-1, 2)
    bits = torch.cat([halves[:, i] >> torch.arange(16).unsqueeze(1) & 1 for i in (0, 1)]).double() * 2 - 1
    agreed = bits @ bits.T / math.sqrt(bits.shape[1])
    assert (agreed - torch.diag(agreed.diagonal())).abs().max() < 4.5


def ways(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Any]) -> list[Any]:
    """Return what a function gives natively, in chunks and in one piece."""
    found = [draw()]
    monkeypatch.setattr(native, "is_ready", lambda: False)
    found.append(draw())
    monkeypatch.setattr(draws, "_LEAST_CHUNKED", 2**40)
    return [*found, draw()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draw", [uniform, normal, gumbel])
def test_every_way_draws_the_same_bits(monkeypatch: pytest.MonkeyPatch, draw, dtype: torch.dtype):
    # More than a chunk, and no whole number of them.
    natively, chunked, whole = ways(monkeypatch, lambda: draw(key(3), (2100, 67), CPU, dtype))
    assert torch.equal(natively, chunked)
    assert torch.equal(natively, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_way_jitters_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    x = torch.randn(4201, 67, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = jittered(leaf, key(3), 0.01)
        return y.detach(), torch.autograd.grad(y, leaf, x.flip(0))[0]

    u = centred(key(3), tuple(x.shape), CPU, dtype)
    found = ways(monkeypatch, run)
    for y, gradient in found:
        torch.testing.assert_close(y, x * (1 + 0.01 * u), rtol=3e-7, atol=0)
        torch.testing.assert_close(gradient, x.flip(0) * (1 + 0.01 * u), rtol=3e-7, atol=0)
        assert torch.equal(y, found[0][0])
        assert torch.equal(gradient, found[0][1])


@needs_native
def test_threads_change_no_bit():
    x = torch.randn(4201, 67)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((uniform(key(3), (4201, 67), CPU), jittered(x, key(3), 0.01)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for pair in found for one, other in zip(pair, found[0], strict=True))


def test_a_transposed_token_is_jittered_in_its_own_order():
    x = torch.randn(67, 4201).T
    assert torch.equal(jittered(x, key(3), 0.5), jittered(x.contiguous(), key(3), 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_numbers():
    gpu = torch.device("cuda")
    assert torch.equal(centred(key(7), (MANY,), gpu).cpu(), centred(key(7), (MANY,), CPU))
