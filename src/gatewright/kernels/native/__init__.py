"""C++ kernels for the CPU, built on first use. `status()` says whether they run here, and why not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
_lock = threading.Lock()
_known: Status | None = None
_left_out = 0


@dataclass(frozen=True)
class Status:
    """Whether the native kernels run, and the reason or what they multiply with, in one line."""

    ready: bool
    reason: str


def is_ready() -> bool:
    """Return whether the native kernels run here; the first call builds and loads them."""
    # Without the lock once it is known: a decoder asks a hundred times per token.
    known = _known
    return not _left_out and (known or status()).ready


# What torch.compiler.assume_constant_result sets; calling that would load the compiler at every import.
is_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> Status:
    """Return whether the native kernels run here, and why; the first call builds and loads them.

    GATEWRIGHT_NATIVE=0 in the environment leaves them out.
    """
    global _known
    with _lock:
        if _left_out:
            return Status(False, "left out for a while, by native.left_out()")
        if _known is None:
            _known = _load()
        return _known


def runs_for(*tensors: Tensor) -> bool:
    """Return whether native operators take these tensors now: fp32 or bf16, on the CPU, in eager mode (what
    is compiled or exported fuses torch's own operators).
    """
    for one in tensors:
        if not one.is_cpu or one.dtype not in DTYPES:
            return False
    return not torch.compiler.is_compiling() and not torch.compiler.is_exporting() and is_ready()


def only_once(what: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself: ours have no formula."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} in C++ is once differentiable; for gradients of gradients compute inside "
            "gatewright.kernels.native.left_out(), with torch's own operators"
        )


@contextmanager
def left_out() -> Iterator[None]:
    """Compute with torch's own operators inside this context, process-wide: for measuring what ours gain."""
    global _left_out
    with _lock:
        _left_out += 1
    try:
        yield
    finally:
        with _lock:
            _left_out -= 1


def _load() -> Status:
    from gatewright.kernels.native.build import BuildFailure, build

    if os.environ.get("GATEWRIGHT_NATIVE", "1") == "0":
        return Status(False, "left out: GATEWRIGHT_NATIVE is 0")
    try:
        torch.ops.load_library(str(build()))
    except BuildFailure as failure:
        return Status(False, str(failure))
    except OSError as error:  # built, but not for this process: another torch, a missing symbol
        return Status(False, f"the built library cannot be loaded: {error}")
    # What autograd and compilers need to know.
    from gatewright.kernels.native import attention, decode, few, operators, optimizer, plan, route, step

    for brought in (operators, route, plan, step, attention, optimizer, few, decode):
        brought.register()
    return Status(True, f"matmuls: {torch.ops.gatewright.engine('')}")
