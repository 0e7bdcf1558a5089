"""What this machine can do at most, measured, and the time that a row would take at that rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gatewright.kernels import few_rows_linear, native
from gatewright.measuring.grid import DTYPES, Dtype, Pass, Shape, expert_flops, router_flops, weight_bytes
from gatewright.measuring.rounds import Clock, Middle, middle

SIZES = (512, 1024, 2048)
# A matmul that takes longer than this is large enough: the next size is left out.
LONG_CALL = 0.05
COPIED_BYTES = 128 << 20  # several times the caches of a desktop's processor
READ_BYTES = 256 << 20
_ROW = 2048


@dataclass(frozen=True)
class Machine:
    """FLOP/s of square matmuls per dtype and bytes/s of copying (read and written), each with its range."""

    flops: dict[str, Middle]
    bandwidth: Middle

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rates = {f"matmul_{dtype}_flops": rate for dtype, rate in self.flops.items()}
        return {name: rate._asdict() for name, rate in {**rates, "copy_bytes": self.bandwidth}.items()}


def measure_machine(dtypes: Sequence[str], rounds: int, clock: Clock = time.perf_counter) -> Machine:
    """Return the machine's rates with the threads that this process has; fp32 always, for the router.

    A dtype's rate is that of the size whose median is highest.
    """
    flops = {dtype: _matmul_rate(DTYPES[dtype], rounds, clock) for dtype in dict.fromkeys(["fp32", *dtypes])}
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copies = [_seconds(lambda: target.copy_(source), clock) for _ in range(rounds + 2)][2:]
    return Machine(flops, middle([2 * COPIED_BYTES / taken for taken in copies]))


class Reader:
    """Reads a buffer far larger than the caches once per call, with the threads that this process has; by
    whichever of two ways is faster here: torch's sum, or, where the native kernels run, dot products.
    """

    def __init__(self, size: int = READ_BYTES, clock: Clock = time.perf_counter) -> None:
        self.rows = torch.ones(size // 4 // _ROW, _ROW)
        self.bytes = self.rows.numel() * 4
        ways = [self._sum, self._dots] if native.is_ready() else [self._sum]
        taken = {way: min(_seconds(way, clock) for _ in range(4)) for way in ways}
        self.call = min(taken, key=lambda way: taken[way])

    def _sum(self) -> None:
        self.rows.sum()

    def _dots(self) -> None:
        with torch.no_grad():
            few_rows_linear(self.rows[:1], self.rows)


def _matmul_rate(dtype: torch.dtype, rounds: int, clock: Clock) -> Middle:
    rates: list[Middle] = []
    for size in SIZES:
        a, b = torch.randn(2, size, size).to(dtype)
        out = torch.empty_like(a)
        taken = [
            _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), clock) for _ in range(rounds + 2)
        ]
        rates.append(middle([2 * size**3 / seconds for seconds in taken[2:]]))
        if 2 * size**3 / rates[-1].median > LONG_CALL:
            break
    return max(rates)


def _seconds(call: Any, clock: Clock) -> float:
    started = clock()
    call()
    return clock() - started


def roofline_seconds(shape: Shape, dtype: Dtype, kind: Pass, machine: Machine) -> float:
    """Return the seconds of a row if nothing cost anything but its matmuls and its weights.

    Experts' FLOPs at the dtype's matmul rate, the router's at fp32's, and the weights at copying speed: read
    once forward; with the backward pass read twice, and their gradients written once.
    """
    moved = weight_bytes(shape, dtype) * (3 if kind == "forward-backward" else 1)
    return (
        expert_flops(shape, kind) / machine.flops[dtype].median
        + router_flops(shape, kind) / machine.flops["fp32"].median
        + moved / machine.bandwidth.median
    )
