"""Counter-based random numbers: element i of a draw is a pure function of (key, i).

No state is read or kept, so recomputed, compiled and resumed code sees the same numbers, and a call's key is
all of its noise. Integer arithmetic only (a 32-bit mixer of multiplications and xor-shifts), so `uniform` is
equal to the bit on every device, eager and compiled; `normal` and `gumbel` are so up to the last digits of
the device's own erfinv and log.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int16, Int32, Int64
from torch import Tensor

from gatewright.kernels import native
from gatewright.parts.routing import RoutingCall

# Multipliers of SplitMix64 (Steele, Lea and Flood 2014) and of Wellons' two-round 32-bit mixer, as signed.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_MIX32 = (0x21F0AAAD, 0xD35A2D97 - 2**32)

# Random bits of one element: all that the dtype holds exactly below 1 (float64 takes float32's numbers).
_BITS = {torch.float32: 24, torch.float64: 24, torch.bfloat16: 8, torch.float16: 11}

# Words worked on at a time outside compiled code: what stays in a core's cache; fewer are one piece.
CHUNK, _LEAST_CHUNKED = 2**17, 2**12


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
    return _scramble(x, None)


def _scramble(x: Tensor, spare: Tensor | None) -> Tensor:
    """Mix int32 words in place; `spare` is a place of their size to work in."""
    for places, factor in ((16, _MIX32[0]), (15, _MIX32[1]), (15, None)):
        # With zeros from above, as `_shifted`, but in place.
        y = x >> places if spare is None else torch.bitwise_right_shift(x, places, out=spare)
        y &= (1 << (32 - places)) - 1
        x ^= y
        if factor is not None:
            x *= factor
    return x


class Stream:
    """The 32-bit words of one key: word i is a pure function of (key, i)."""

    def __init__(self, key: Tensor, device: torch.device) -> None:
        self.device = torch.device(device)
        words = _mix64(key.to(self.device) ^ _STEP)
        # Both halves as signed 32-bit numbers. Each key has its own odd step: no two streams run in parallel.
        self.start, self.step = ((words << 32) >> 32).to(torch.int32), ((words >> 32) | 1).to(torch.int32)

    def words(self, size: int) -> Int32[Tensor, "N"]:
        """Return the first words, [size] int32."""
        counters = torch.arange(size, dtype=torch.int32, device=self.device)
        return _mix32(counters, self.start, self.step)

    def chunks(self, size: int) -> Iterator[tuple[int, Int32[Tensor, "N"]]]:
        """Yield the first `size` words a cache's worth at a time, (begin, words), in one place that is
        written anew.
        """
        most = max(min(size, CHUNK), 1)
        counters = torch.arange(most, dtype=torch.int32, device=self.device).mul_(self.step)
        x, spare = torch.empty_like(counters), torch.empty_like(counters)
        for begin in range(0, size, most):
            n = min(most, size - begin)
            torch.add(counters[:n], self.start + begin * self.step, out=x[:n])
            yield begin, _scramble(x[:n], spare[:n])


def in_chunks(device: torch.device, size: int) -> bool:
    """Return whether so many words are worked on in chunks: outside compiled code, on the CPU."""
    return size > _LEAST_CHUNKED and device.type == "cpu" and not torch.compiler.is_compiling()


def runs_native(size: int, *tensors: Tensor) -> bool:
    """Return whether C++ works on fp32 tensors that lead to so many numbers: it pays, and it is there."""
    fits = all(one.dtype == torch.float32 and one.is_contiguous() for one in tensors)
    return fits and in_chunks(tensors[0].device, size) and native.is_ready()


def _draw(
    key: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    low: int,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return numbers on `dtype`'s grid in [low, 1), low 0 or -1; with `transform`, what it makes, in place,
    of the middles of the cells of a grid twice as coarse, so that it meets neither end.
    """
    if dtype not in _BITS:
        raise TypeError(f"dtype {dtype}; allowed: {', '.join(str(known) for known in _BITS)}")
    wide = dtype if transform is None else torch.promote_types(dtype, torch.float32)
    bits = _BITS[wide] if transform is None else _BITS[wide] - 1
    cell = (1 - low) * 2.0**-bits
    middle = (1 + low) / 2 + (0 if transform is None else cell / 2)

    def numbers(words: Int32[Tensor, "N"], place: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        words >>= 32 - bits
        place.copy_(words)
        place *= cell
        place += middle
        return place if transform is None else transform(place)

    stream, size = Stream(key, device), math.prod(shape)
    out = torch.empty(size, dtype=dtype, device=stream.device)
    if not in_chunks(stream.device, size):
        words = stream.words(size)
        return numbers(words, words.to(wide)).to(dtype).reshape(shape)
    if runs_native(size, out):
        torch.ops.gatewright.draw_uniform_(out, stream.start, stream.step, 32 - bits, cell, middle)
        return (out if transform is None else transform(out)).reshape(shape)
    spare = out if wide == dtype else torch.empty(min(size, CHUNK), dtype=wide)
    for begin, words in stream.chunks(size):
        place = out[begin : begin + words.shape[0]]
        if wide == dtype:
            numbers(words, place)
        else:
            place.copy_(numbers(words, spare[: words.shape[0]]))
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
    return _draw(key, shape, device, dtype, 0)


def centred(
    key: Int64[Tensor, ""],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Return numbers uniform in [-1, 1), multiples of 2 ** -15: two for each word, so half as dear as others.

    Element i, in row-major order, depends on (key, i) alone: it is the low half of word i / 2 for even i,
    else the high half.
    """
    size = math.prod(shape)
    words = Stream(key, device).words((size + 1) // 2)
    return (halves(words)[:size].to(dtype) * 2.0**-15).reshape(shape)


def halves(words: Int32[Tensor, "N"]) -> Int16[Tensor, "M"]:
    """Return the halves of each word, low before high, [N] -> [2 N]."""
    if words.device.type == "cpu" and sys.byteorder == "little" and not torch.compiler.is_compiling():
        return words.view(torch.int16)
    return torch.stack([(words << 16) >> 16, words >> 16], dim=-1).to(torch.int16).flatten()


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
    # Never -1 or 1, where erfinv is infinite.
    return _draw(key, shape, device, dtype, -1, lambda u: u.erfinv_().mul_(math.sqrt(2)))


def gumbel(
    key: Int64[Tensor, ""],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Return g = -ln(-ln u), u uniform in (0, 1): the highest of logits + g is a draw from their softmax.

    Element i depends on (key, i) alone. All are between -2.9 and 16.7.
    """
    return _draw(key, shape, device, dtype, 0, lambda u: u.log_().neg_().log_().neg_())


def call_key(call: RoutingCall, device: torch.device) -> Int64[Tensor, ""]:
    """Return the call's key, or one drawn from torch's default generator, which recomputation restores."""
    if call.key is not None:
        return call.key.to(device)
    return torch.randint(2**62, (), dtype=torch.int64, device=device)
