"""How much of the validation text stands word for word in the training text."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from gatewright.data.hashing import shingle_hashes

WIDTH = 64
"""Bytes of a shingle, about a line of text: shorter ones are shared by chance, longer ones hide edits."""
_CHUNK = 1 << 22
_FILTER_BITS = 22


def _shingles(
    raw: NDArray[np.uint8], spans: NDArray[np.int64], first: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return places and hashes of the shingles that start in bytes [first, last) and lie inside one span."""
    hashes = shingle_hashes(np.asarray(raw[first : last + WIDTH - 1]), WIDTH)
    places = first + np.arange(len(hashes), dtype=np.int64)
    owner = np.searchsorted(spans[:, 0], places, side="right") - 1
    inside = (owner >= 0) & (places + WIDTH <= spans[owner, 1])
    return places[inside], hashes[inside]


def shared_shingles(
    raw: NDArray[np.uint8], held: NDArray[np.int64], training: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the place of each held-out shingle, [shingles], and whether it occurs in a training document.

    `held` and `training` are the spans (first byte, end byte) of documents in `raw`. Exact: candidates are
    found by a 64-bit hash and then compared byte for byte.
    """
    held, training = held[np.argsort(held[:, 0])], training[np.argsort(training[:, 0])]
    parts = [_shingles(raw, held, first, last) for first, last in _chunks(held)]
    places = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, np.int64)
    if not len(places):
        return places, np.zeros(0, dtype=bool)
    known, back = np.unique(np.concatenate([part[1] for part in parts]), return_inverse=True)
    twin = _twins(raw, training, known)[back]
    found = twin >= 0
    window = np.arange(WIDTH)
    for begin in range(0, len(places), 1 << 18):
        rows = begin + np.flatnonzero(found[begin : begin + (1 << 18)])
        same = raw[places[rows, None] + window] == raw[twin[rows, None] + window]
        found[rows] = same.all(axis=1)
    return places, found


def _chunks(spans: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the ranges of bytes, of a few MB each, that cover every span."""
    if not len(spans):
        return []
    edges = [*range(int(spans[0, 0]), int(spans[-1, 1]), _CHUNK), int(spans[-1, 1])]
    return list(itertools.pairwise(edges))


def _twins(
    raw: NDArray[np.uint8], training: NDArray[np.int64], known: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return for each of the sorted hashes a place in training with that hash, or -1."""
    low = np.uint64((1 << _FILTER_BITS) - 1)
    # Most training shingles are no held-out one: a table on the low bits drops them before the search.
    table = np.zeros(1 << _FILTER_BITS, dtype=bool)
    table[known & low] = True
    twin = np.full(len(known), -1, dtype=np.int64)
    for first, last in _chunks(training):
        places, hashes = _shingles(raw, training, first, last)
        maybe = table[hashes & low]
        places, hashes = places[maybe], hashes[maybe]
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        equal = known[at] == hashes
        twin[at[equal]] = places[equal]
    return twin
