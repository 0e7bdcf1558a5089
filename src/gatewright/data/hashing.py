"""Vectorised 64-bit hashes: the same numbers on every machine, Python and numpy version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a bijective scramble of each 64-bit value (the finaliser of SplitMix64)."""
    mixed = values + _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permutation(length: int, *keys: int) -> NDArray[np.int64]:
    """Return a permutation of range(length) that depends on `keys` alone, not on a generator's version."""
    key = np.array([0], dtype=np.uint64)
    for part in keys:
        key = mix64(key ^ np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return np.argsort(mix64(np.arange(length, dtype=np.uint64) ^ key), kind="stable")


def shingle_hashes(data: NDArray[np.uint8], width: int) -> NDArray[np.uint64]:
    """Return the hash of each run of `width` bytes: [max(0, len - width + 1)]; `width` is a power of two.

    A polynomial hash modulo 2**64, built by doubling: log2(width) passes over the bytes.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"width is a power of two, not {width}")
    if len(data) < width:
        return np.empty(0, dtype=np.uint64)
    hashes = mix64(np.arange(256, dtype=np.uint64))[data]
    base = int(_MULTIPLIER)
    span = 1
    while span < width:
        hashes = hashes[:-span] * np.array([base], dtype=np.uint64) + hashes[span:]
        base = base * base % 2**64
        span *= 2
    return mix64(hashes)


def digest(parts: Iterable[str | bytes]) -> str:
    """Return the sha256 (hex) of the parts, each framed by its length so that no two lists collide."""
    state = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.hexdigest()
