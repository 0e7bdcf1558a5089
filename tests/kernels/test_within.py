"""Attention in windows and chunks, with sinks, scales and values of another size, against loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from gatewright.errors import UserError
from gatewright.kernels import attend, attend_within


def seen(position: int, window: int | None, chunked: bool) -> range:
    """The keys that a position sees, from the words of the definition."""
    if window is None:
        return range(position + 1)
    if chunked:
        return range(position - position % window, position + 1)
    return range(max(0, position + 1 - window), position + 1)


def slow(
    q: Tensor, k: Tensor, v: Tensor, past: int, scale: float | None, window: int | None, chunked: bool, sinks
) -> Tensor:
    """One batch row, head and query at a time, in Python numbers."""
    shared = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = seen(past + i, window, chunked)
                powers = [math.exp(scale * sum((q[b, h, i] * k[b, h // shared, j]).tolist())) for j in keys]
                total = sum(powers) + (0 if sinks is None else math.exp(sinks[h]))
                for j, power in zip(keys, powers, strict=True):
                    out[b, h, i] += power / total * v[b, h // shared, j]
    return out


def case(draw: random.Random) -> tuple[list[Tensor], dict]:
    heads, kv = draw.choice([(2, 2), (4, 2), (3, 1)])
    past, length = draw.choice([(0, 5), (3, 1), (4, 3), (7, 2), (0, 1), (2, 17)])
    size, value = draw.choice([(4, 4), (6, 4), (4, 6)])
    made = torch.Generator().manual_seed(draw.randrange(10**6))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    tensors = [normal(2, heads, length, size), normal(2, kv, past + length, size)]
    tensors.append(normal(2, kv, past + length, value))
    options = {
        "past": past,
        "scale": draw.choice([None, 0.3]),
        "window": draw.choice([None, 1, 2, 3, 20]),
        "chunked": draw.random() < 0.4,
        "sinks": normal(heads) if draw.random() < 0.5 else None,
    }
    return tensors, options


def test_it_is_the_slow_loop():
    draw = random.Random(1)
    for _ in range(80):
        (q, k, v), options = case(draw)
        found = attend_within(q, k, v, **options)
        told = {name: value for name, value in options.items() if name != "sinks"}
        torch.testing.assert_close(
            found, slow(q, k, v, **told, sinks=options["sinks"]), rtol=1e-9, atol=1e-11
        )


def test_a_sink_by_hand():
    # One key of score 0 beside a sink of ln 3: the key gets a quarter.
    q, v = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 8.0)
    found = attend_within(q, q, v, sinks=torch.tensor([math.log(3.0)]))
    assert found.flatten().tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("length", [1, 6, 40])
def test_where_nothing_is_hidden_it_is_attend_bit_for_bit(length: int):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    expected = attend(q, k, k)
    for options in ({}, {"window": length}, {"window": length, "chunked": True}):
        assert torch.equal(attend_within(q, k, k, **options), expected)
    # One token behind many: a window is a shorter past.
    last = attend_within(q[:, :, -1:], k, k, length - 1, window=min(3, length))
    assert torch.equal(last, attend(q[:, :, -1:], k[:, :, -3:], k[:, :, -3:], min(3, length) - 1))


def test_gradients_reach_everything():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 20, 6, dtype=torch.float64), torch.randn(1, 1, 20, 6, dtype=torch.float64)
    v, sinks = torch.randn(1, 1, 20, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    leaves = [one.requires_grad_() for one in (q, k, v, sinks)]

    def windowed(*given: Tensor) -> Tensor:
        return attend_within(*given[:3], window=4, sinks=given[3], scale=0.5)

    assert torch.autograd.gradcheck(windowed, leaves, fast_mode=True)

    def padded(*given: Tensor) -> Tensor:
        return attend_within(*given, scale=0.5)

    assert torch.autograd.gradcheck(padded, leaves[:3], fast_mode=True)


def test_what_cannot_be_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match="window 0"):
        attend_within(q, q, q, window=0)
    with pytest.raises(UserError, match="3 positions behind 1 over 3 keys"):
        attend_within(q, q, q, 1, sinks=torch.zeros(2))
