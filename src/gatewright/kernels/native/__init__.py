"""C++ kernels for the CPU, built on first use. `status()` says whether they run here, and why not."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import torch

_lock = threading.Lock()
_known: Status | None = None


@dataclass(frozen=True)
class Status:
    """Whether the native kernels run, and the reason or what they multiply with, in one line."""

    ready: bool
    reason: str


def is_ready() -> bool:
    """Return whether the native kernels run here; the first call builds and loads them."""
    return status().ready


# What torch.compiler.assume_constant_result sets; calling that would load the compiler at every import.
is_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> Status:
    """Return whether the native kernels run here, and why; the first call builds and loads them.

    GATEWRIGHT_NATIVE=0 in the environment leaves them out.
    """
    global _known
    with _lock:
        if _known is None:
            _known = _load()
        return _known


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
    from gatewright.kernels.native import operators, plan, route  # what autograd and compilers need to know

    for brought in (operators, route, plan):
        brought.register()
    return Status(True, f"matmuls: {torch.ops.gatewright.engine('')}")
