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
from gatewright.measuring.grid import DTYPES, Cell, Shape
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
    few = Shape(64, *cell.shape[1:])
    _grown(cell._replace(shape=few), name, backend, calls=1)  # libraries allocate on first use
    return _grown(cell, name, backend, CALLS)


def _grown(cell: Cell, name: str, backend: str | None, calls: int) -> list[int]:
    (side,) = build_sides(cell, backend, [name]).values()
    x, grad = torch.randn(2, cell.shape.tokens, cell.shape.width).to(DTYPES[cell.dtype])
    call, clear = side.turn(x.clone().requires_grad_(), grad, "forward-backward", keep_gradients=False)
    grown = []
    for _ in range(calls):
        gc.collect()
        _RESET.write_text("5")
        before = _kilobytes("VmRSS")
        call()
        grown.append(1024 * max(_kilobytes("VmHWM") - before, 0))
        clear()
    return grown


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
