"""Counter-based random numbers: element i of a draw is a pure function of (key, i).

No state is read or kept, so recomputed, compiled and resumed code sees the same numbers, and a call's key is
all of its noise. Integer arithmetic only (a 32-bit mixer of multiplications and xor-shifts), so `uniform` is
equal to the bit on every device, eager and compiled; `normal` and `gumbel` are so up to the last digits of
the device's own erfinv and log.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gatewright.parts.routing import RoutingCall

# Multipliers of SplitMix64 (Steele, Lea and Flood 2014) and of Wellons' two-round 32-bit mixer, as signed.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_MIX32 = (0x21F0AAAD, 0xD35A2D97 - 2**32)

# Random bits of one element: all that the dtype holds exactly below 1 (float64 takes float32's numbers).
_BITS = {torch.float32: 24, torch.float64: 24, torch.bfloat16: 8, torch.float16: 11}

# Elements worked on at a time outside compiled code: what stays in a core's cache.
_CHUNK = 2**17


def _shifted(x: Tensor, places: int, width: int) -> Tensor:
    """Return x >> places with zeros from above: torch's own shift copies the sign."""
    y = x >> places
    y &= (1 << (width - places)) - 1
    return y


def _mix64(key: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    key = (key ^ _shifted(key, 30, 64)) * _MIX[0]
    key = (key ^ _shifted(key, 27, 64)) * _MIX[1]
    return key ^ _shifted(key, 31, 64)


def fold(key: Int64[Tensor, ""], *numbers: int) -> Int64[Tensor, ""]:
    """Return a key of its own, 0-d int64, for each sequence of numbers: its draws have nothing to do with
    those of `key` or of other numbers. fold(key, a, b) is fold(fold(key, a), b).
    """
    for number in numbers:
        step = (number * 2 + 1) * _STEP % 2**64
        key = _mix64(_mix64(key) + (step - 2**64 if step >= 2**63 else step))
    return key


def _mix32(x: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """Turn counters x [n] int32 into random ones of a stream, in place."""
    x *= step
    x += start
    x ^= _shifted(x, 16, 32)
    x *= _MIX32[0]
    x ^= _shifted(x, 15, 32)
    x *= _MIX32[1]
    x ^= _shifted(x, 15, 32)
    return x


def _draw(
    key: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return numbers on `dtype`'s grid in [0, 1); with `transform`, what it makes, in place, of the middles
    of the grid's cells, so that it meets neither 0 nor 1.
    """
    if dtype not in _BITS:
        raise TypeError(f"dtype {dtype}; allowed: {', '.join(str(known) for known in _BITS)}")
    device = torch.device(device)
    words = _mix64(key.to(device) ^ _STEP)
    # Both halves as signed 32-bit numbers. Each key has its own odd step, so no two streams run in parallel.
    start, step = ((words << 32) >> 32).to(torch.int32), ((words >> 32) | 1).to(torch.int32)
    wide = dtype if transform is None else torch.promote_types(dtype, torch.float32)
    bits = _BITS[wide] if transform is None else _BITS[wide] - 1
    cell = 2.0**-bits

    def numbers(begin: int, end: int) -> Float[Tensor, "N"]:
        x = _mix32(torch.arange(begin, end, dtype=torch.int32, device=device), start, step)
        x >>= 32 - bits
        u = x.to(wide)
        u *= cell
        u += 0.5
        return u if transform is None else transform(u.add_(cell / 2))

    size = math.prod(shape)
    if torch.compiler.is_compiling() or device.type != "cpu" or size <= _CHUNK:
        return numbers(0, size).to(dtype).reshape(shape)
    out = torch.empty(size, dtype=dtype)
    for begin in range(0, size, _CHUNK):
        place = out[begin : begin + _CHUNK]
        place.copy_(numbers(begin, begin + place.shape[0]))
    return out.reshape(shape)


def uniform(
    key: Int64[Tensor, ""],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Return numbers uniform in [0, 1), never 1: multiples of 2 ** -24 (bf16: 2 ** -8, fp16: 2 ** -11).

    Element i, in row-major order, depends on (key, i) alone, whatever the shape; at most 2 ** 31 elements.
    float64 holds float32's numbers.
    """
    return _draw(key, shape, device, dtype)


def uniform_rows(
    key: Int64[Tensor, ""], rows: Int64[Tensor, "N"], columns: int
) -> Float[Tensor, "N columns"]:
    """Return [N, columns] fp32: row n is `uniform(fold(key, rows[n]), (columns,))`."""
    words = _mix64(_mix64(_mix64(key) + (rows * 2 + 1) * _STEP) ^ _STEP).unsqueeze(-1)
    start, step = ((words << 32) >> 32).to(torch.int32), ((words >> 32) | 1).to(torch.int32)
    bits = _BITS[torch.float32]
    counters = torch.arange(columns, dtype=torch.int32, device=rows.device).repeat(rows.shape[0], 1)
    return (_mix32(counters, start, step) >> (32 - bits)).to(torch.float32).mul_(2.0**-bits).add_(0.5)


def normal(
    key: Int64[Tensor, ""],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Return normal numbers of mean 0 and variance 1: the inverse distribution function at a uniform number.

    Element i depends on (key, i) alone. None is more than 5.3 from 0, where one in 8 million would lie.
    """
    # 2 u - 1 is exact, and never -1 or 1, where erfinv is infinite.
    return _draw(key, shape, device, dtype, lambda u: u.mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2)))


def gumbel(
    key: Int64[Tensor, ""],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Return g = -ln(-ln u), u uniform in (0, 1): the highest of logits + g is a draw from their softmax.

    Element i depends on (key, i) alone. All are between -2.9 and 16.7.
    """
    return _draw(key, shape, device, dtype, lambda u: u.log_().neg_().log_().neg_())


def call_key(call: RoutingCall, device: torch.device) -> Int64[Tensor, ""]:
    """Return the call's key, or one drawn from torch's default generator, which recomputation restores."""
    if call.key is not None:
        return call.key.to(device)
    return torch.randint(2**62, (), dtype=torch.int64, device=device)
