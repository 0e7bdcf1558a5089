"""Keep big blocks of freed memory inside the process: fresh pages cost more than the arithmetic on small
machines.
"""

from __future__ import annotations

import ctypes

# mallopt's parameter numbers, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_big_blocks(largest: int = 1 << 30) -> bool:
    """Tell glibc to serve blocks of up to `largest` bytes from the heap and to keep them when freed.

    Process-wide, so only commands call it, never an import. Returns whether it took effect (False without
    glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, largest)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def return_big_blocks(smallest: int = 1 << 16) -> bool:
    """Tell glibc to give blocks of `smallest` bytes and more back to the system as soon as they are freed.

    Process-wide, and slow: for measuring how much memory is in use. Returns whether it took effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, smallest))
