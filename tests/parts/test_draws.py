"""Draws: the same numbers for the same key, everywhere, and random in every way that routing could notice."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gatewright.parts import RoutingCall
from gatewright.parts.draws import call_key, fold, gumbel, normal, uniform

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MANY = 2**18
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DRAWS = pytest.mark.parametrize("draw", [uniform, normal, gumbel])


def key(number: int) -> Tensor:
    return torch.tensor(number)


def streams(num: int = 192, length: int = 2**13) -> Tensor:
    """Return uniform numbers less 1/2, [num, length], of neighbouring keys, far keys and folded keys."""
    keys = [key(n) for n in range(num // 3)]
    keys += [key(n * 2**32) for n in range(1, num // 3 + 1)]
    keys += [fold(key(3), n) for n in range(num // 3)]
    return torch.stack([uniform(k, (length,), CPU) for k in keys]).double() - 0.5


def furthest(ordered: Tensor) -> float:
    """Return the Kolmogorov-Smirnov statistic of sorted numbers that should be uniform, times sqrt(n)."""
    n = ordered.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(ordered - steps[:-1], steps[1:] - ordered).max()
    return distance.item() * math.sqrt(n)


def mixed(word: int) -> int:
    """Return SplitMix64's finaliser of a 64-bit word, in Python's own integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def word_of(number: int, i: int) -> int:
    """Return element i of a key's stream, 32 bits."""
    both = mixed(number % 2**64 ^ 0x9E3779B97F4A7C15)
    x = (i * (both >> 32 | 1) + both) % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def test_these_numbers_never_change():
    # Recorded runs depend on them: another mixer would be another noise.
    words = (uniform(key(7), (4,), CPU) * 2**24).long()
    assert words.tolist() == [16662775, 16442762, 1719857, 11246572]
    assert fold(key(7), 0).item() == -8774268681488515761
    assert fold(key(7), 1, -2).item() == -4442677622430920492


@pytest.mark.parametrize("number", [0, 7, -1, 2**63 - 1, -(2**63)])
def test_the_mixer_is_what_python_integers_say(number: int):
    words = (uniform(key(number), (300,), CPU).double() * 2**24).long()
    # The highest 24 bits, of which the first is the sign that is added to.
    assert words.tolist() == [(word_of(number, i) ^ 2**31) >> 8 for i in range(300)]
    for n in (0, 1, -3, 2**40):
        expected = mixed((mixed(number % 2**64) + (2 * n + 1) * 0x9E3779B97F4A7C15) % 2**64)
        assert fold(key(number), n).item() % 2**64 == expected


def test_element_i_depends_on_key_and_i_alone():
    whole = uniform(key(5), (MANY,), CPU)
    for size in (0, 1, 7, 2**17, 2**17 + 1):
        assert torch.equal(uniform(key(5), (size,), CPU), whole[:size])
    assert torch.equal(uniform(key(5), (MANY // 64, 64), CPU).flatten(), whole)
    assert uniform(key(5), (3, 0, 2), CPU).shape == (3, 0, 2)
    assert torch.equal(uniform(key(5), (), CPU), whole[0])


@DRAWS
def test_no_state_is_read_or_moved(draw):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(key(4), (100,), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(key(4), (100,), CPU), first)
    assert not torch.equal(draw(key(5), (100,), CPU), first)


@pytest.mark.parametrize("number", [0, 1, -1, 2**62, -(2**63)])
def test_moments_and_distribution(number: int):
    u = uniform(key(number), (MANY,), CPU).double()
    # Standard errors: sqrt(1/12 / n) = 5.6e-4 of the mean, sqrt(1/180 / n) = 1.5e-4 of the variance.
    assert abs(u.mean() - 1 / 2) < 4 * 5.6e-4
    assert abs(u.var() - 1 / 12) < 4 * 1.5e-4
    assert furthest(u.sort().values) < 1.95  # beyond in one case of 1000
    z = normal(key(number), (MANY,), CPU).double()
    assert abs(z.mean()) < 4 * MANY**-0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / MANY) ** 0.5
    assert abs(z.pow(3).mean()) < 4 * (15 / MANY) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 4 * (96 / MANY) ** 0.5
    assert furthest(torch.special.ndtr(z.sort().values)) < 1.95
    g = gumbel(key(number), (MANY,), CPU).double()
    # Mean: Euler's constant; variance: pi^2 / 6, kurtosis 5.4, so the variance's error is var sqrt(4.4 / n).
    assert abs(g.mean() - 0.5772157) < 4 * (math.pi**2 / 6 / MANY) ** 0.5
    assert abs(g.var() - math.pi**2 / 6) < 4 * math.pi**2 / 6 * (4.4 / MANY) ** 0.5
    assert furthest((-(-g.sort().values).exp()).exp()) < 1.95


def test_every_bit_is_a_fair_coin_and_no_two_agree():
    words = (uniform(key(11), (2**16,), CPU).double() * 2**24).long()
    bits = torch.stack([words >> place & 1 for place in range(24)]).double() * 2 - 1
    table = bits @ bits.T / 2**8  # standard normal off the diagonal
    assert (bits.sum(dim=1) / 2**8).abs().max() < 4.5
    assert (table - torch.diag(table.diagonal())).abs().max() < 4.5


def test_keys_near_and_far_have_nothing_in_common():
    drawn = streams()
    table = drawn @ drawn.T * 12 / math.sqrt(drawn.shape[1])
    table.fill_diagonal_(0)
    assert table.abs().max() < 5  # 18 336 pairs
    assert abs(table.square().mean() * len(drawn) / (len(drawn) - 1) - 1) < 0.05
    # Neither shifted against each other: neighbouring keys are no other windows of one stream.
    for lag in (1, 2, 64):
        shifted = drawn[:, lag:] @ drawn[:, :-lag].T * 12 / math.sqrt(drawn.shape[1] - lag)
        assert shifted.abs().max() < 5.2


def test_neighbouring_counters_have_nothing_in_common():
    drawn = streams()
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 100, 256, 1024, 4096):
        along = (drawn[:, lag:] * drawn[:, :-lag]).sum(dim=1) * 12 / math.sqrt(drawn.shape[1] - lag)
        assert along.abs().max() < 4.5, lag
    # No period: each frequency's power is exponential of mean 1; 192 x 4096 of them stay below ln + 6.
    power = torch.fft.rfft(drawn, dim=1)[:, 1:].abs().square() * 12 / drawn.shape[1]
    assert power.max() < math.log(power.numel()) + 6


def test_coins_of_the_experts_of_one_token_are_independent():
    # The best of 8 draws is each of the 8 equally often: chi-squared with 7 degrees, 24.3 at one in 1000.
    best = uniform(key(2), (2**15, 8), CPU).argmax(dim=1)
    counts = torch.bincount(best, minlength=8).double()
    assert ((counts - 4096).square() / 4096).sum() < 24.3


def test_fold_gives_keys_of_their_own():
    base = key(9)
    keys = [fold(base, n).item() for n in range(-50, 50)] + [base.item()]
    keys += [fold(base, n, m).item() for n in range(10) for m in range(10)]
    keys += [fold(key(n), 0).item() for n in range(100, 200)]
    assert len(set(keys)) == len(keys)
    assert torch.equal(fold(base, 1, 2), fold(fold(base, 1), 2))
    assert not torch.equal(fold(base, 1, 2), fold(base, 2, 1))
    assert torch.equal(fold(base), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_dtype_reaches_1_or_infinity(dtype: torch.dtype):
    u = uniform(key(3), (MANY,), CPU, dtype)
    assert u.dtype == dtype
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.double().mean() - 0.5) < 3e-3
    for draw, least, most in ((normal, -5.5, 5.5), (gumbel, -3, 17)):
        values = draw(key(3), (MANY,), CPU, dtype)
        assert values.dtype == dtype
        assert values.min() > least
        assert values.max() < most
    # The wider dtype holds the same noise, so that fp64 checks of fp32 training see the same choices.
    assert torch.equal(
        u.double(), (uniform(key(3), (MANY,), CPU, torch.float64) * 2**24).floor() / 2**24
    ) or (dtype in (torch.bfloat16, torch.float16))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"dtype torch.int64; allowed: torch.float32"):
        uniform(key(1), (2,), CPU, torch.int64)


def test_the_extreme_words_stay_finite(monkeypatch: pytest.MonkeyPatch):
    from gatewright.parts import draws

    for word in (-(2**31), -1, 0, 2**31 - 1):
        monkeypatch.setattr(draws, "_mix32", lambda x, start, step, word=word: x.fill_(word))
        for dtype in DTYPES:
            assert 0 <= uniform(key(1), (1,), CPU, dtype).item() < 1
            assert math.isfinite(normal(key(1), (1,), CPU, dtype).item())
            assert math.isfinite(gumbel(key(1), (1,), CPU, dtype).item())


def test_a_call_without_a_key_draws_one_that_the_seed_fixes():
    torch.manual_seed(0)
    first, second = (call_key(RoutingCall(), CPU) for _ in range(2))
    assert first.dtype == torch.int64
    assert first.shape == ()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(call_key(RoutingCall(), CPU), first)
    assert torch.equal(call_key(RoutingCall(key=key(5)), CPU), key(5))


# A program of its own: the shape checks of the test run cannot be compiled.
PROGRAM = """
import torch
from gatewright.parts import RoutingCall
from gatewright.parts.draws import call_key, centred, fold, gumbel, normal, uniform
from gatewright.parts.jitter import jittered

def run(key, x):
    own = fold(call_key(RoutingCall(key=key), x.device), 3, -1)
    draws = [draw(own, tuple(x.shape), x.device, x.dtype) for draw in (uniform, normal, gumbel, centred)]
    return [*draws, jittered(x + 1, own, 0.01)]

x, key = torch.zeros(2100, 64), torch.tensor(5)
eager = run(key, x)
compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(key, x)
dynamic = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)(key, x)
for one, two, three in zip(eager, compiled, dynamic):
    assert torch.equal(one, two) and torch.equal(one, three)
"""


def test_compiled_whole_the_numbers_are_the_same():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_numbers():
    gpu = torch.device("cuda")
    assert torch.equal(fold(key(7).to(gpu), 1, -2).cpu(), fold(key(7), 1, -2))
    for dtype in DTYPES:
        assert torch.equal(uniform(key(7), (MANY,), gpu, dtype).cpu(), uniform(key(7), (MANY,), CPU, dtype))
    for draw in (normal, gumbel):
        torch.testing.assert_close(draw(key(7), (MANY,), gpu).cpu(), draw(key(7), (MANY,), CPU))
