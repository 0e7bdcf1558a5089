"""Peak memory of one side's forward and backward pass, measured from outside: pages that a process of its
own came to hold.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from gatewright.errors import UserError
from gatewright.kernels import native
from gatewright.measuring.grid import DTYPES, Cell, Shape
from gatewright.measuring.rounds import Turn
from gatewright.measuring.sides import build_sides
from gatewright.training.allocator import return_big_blocks

CALLS = 3
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def check_memory_can_be_measured() -> None:
    """Raise UserError where the system cannot set a process's peak back (Linux can)."""
    if not _RESET.exists():
        raise UserError(
            "--memory on this system; allowed: Linux, whose /proc/self/clear_refs sets a process's peak "
            "back; leave --memory out"
        )


def peak_memory(cell: Cell, name: str, backend: str | None, threads: int) -> int | None:
    """Return the bytes that one forward and backward pass of a side adds at its peak, the median of three
    calls in a fresh process; None if the process died of it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            found = pool.submit(peaks_here, cell, name, backend, threads).result()
        except BrokenProcessPool:
            return None
    return round(statistics.median(found))


def peaks_here(cell: Cell, name: str, backend: str | None, threads: int) -> list[int]:
    """Return the growth of three calls in this process, which should do nothing else."""
    torch.set_num_threads(threads)
    # Blocks that are freed leave the process at once, so that its pages are those of live tensors.
    return_big_blocks()
    if native.is_ready():
        torch.ops.gatewright.pool_limit(0)
    for shape, calls in ((Shape(64, *cell.shape[1:]), 1), (cell.shape, CALLS)):
        # The small call comes first: libraries allocate on first use.
        (side,) = build_sides(cell._replace(shape=shape), backend, [name]).values()
        x, grad = torch.randn(2, shape.tokens, shape.width).to(DTYPES[cell.dtype])
        x = x.clone().requires_grad_()
        found = growth(side.turn(x, grad, "forward-backward", keep_gradients=False), calls)
    return found


def growth(turn: Turn, calls: int) -> list[int]:
    """Return the bytes that this process comes to hold during each call, at its peak, beyond those before."""
    grown = []
    for _ in range(calls):
        before = resident_bytes(reset=True)
        turn.call()
        grown.append(max(peak_bytes() - before, 0))
        turn.clear()
    return grown


def resident_bytes(reset: bool = False) -> int:
    """Return the bytes that this process holds; with `reset` its peak is counted from here on."""
    if reset:
        gc.collect()
        _RESET.write_text("5")
    return _bytes("VmRSS")


def peak_bytes() -> int:
    """Return the most bytes that this process has held since its peak was set back."""
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
