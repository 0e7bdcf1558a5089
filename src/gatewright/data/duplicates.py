"""Near-duplicate documents: MinHash signatures, locality-sensitive hashing, clusters.

Two documents are near-duplicates when the Jaccard similarity of their sets of 32-byte shingles (letters
lower-cased, white space as one space) is estimated at 0.5 or more. The estimate counts the equal ones of 128
minima, so its standard error is 0.04; pairs are looked up in 32 bands of 4 minima, which meet for a pair of
similarity 0.6 with probability 0.99 and of 0.7 with 0.9998. Together: a pair at 0.6 or more is found with
probability 0.98 or more, one at 0.35 or less practically never.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gatewright.data.hashing import mix64, shingle_hashes

SHINGLE = 32
THRESHOLD = 0.5
NUM_MINIMA, ROWS = 128, 4
BANDS = NUM_MINIMA // ROWS
_BIN_BITS = 7
_ALL_PAIRS = 256
"""Bucket size up to which every pair is compared; beyond it, each with the first few and its neighbour."""


def _lower_table() -> NDArray[np.uint8]:
    table = np.arange(256, dtype=np.uint8)
    table[ord("A") : ord("Z") + 1] += 32
    table[[9, 10, 11, 12, 13]] = 32
    return table


_LOWER = _lower_table()


def normalise(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bytes with ASCII letters in lower case and white space as single spaces, none at the "
    "ends."""
    plain = _LOWER[raw]
    space = plain == 32
    keep = ~space
    keep[1:] |= ~space[:-1]
    plain = plain[keep]
    first, last = int(plain[:1].sum() == 32), len(plain) - int(plain[-1:].sum() == 32)
    return np.ascontiguousarray(plain[first:last])


def signature(raw: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the MinHash signature of one document's bytes: [NUM_MINIMA].

    One permutation: the hashes of the shingles fall into NUM_MINIMA bins by their top bits, and each bin
    keeps its smallest. An empty bin borrows from the next one that is not (rotation densification), which
    keeps the share of equal entries an unbiased estimate of the Jaccard similarity.
    """
    plain = normalise(raw)
    if len(plain) < SHINGLE:
        plain = np.concatenate([plain, np.zeros(SHINGLE - len(plain), dtype=np.uint8)])
    hashes = np.sort(shingle_hashes(plain, SHINGLE))
    edges = np.arange(NUM_MINIMA, dtype=np.uint64) << np.uint64(64 - _BIN_BITS)
    return hashes[np.searchsorted(hashes, edges) % len(hashes)]


def signatures(
    raw: NDArray[np.uint8], spans: NDArray[np.int64], progress: Callable[[str], None] | None = None
) -> NDArray[np.uint64]:
    """Return the signature of each span (first byte, end byte) of `raw`: [documents, NUM_MINIMA]."""
    result = np.empty((len(spans), NUM_MINIMA), dtype=np.uint64)
    told = time.perf_counter()
    for number, (start, end) in enumerate(spans.tolist()):
        result[number] = signature(np.asarray(raw[start:end]))
        if progress and number % 256 == 0 and time.perf_counter() - told > 5:
            told = time.perf_counter()
            progress(f"compared {number} of {len(spans)} documents")
    return result


class _Sets:
    """Union-find whose representative is the smallest member."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, member: int) -> int:
        root = member
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[member] != root:
            self.parent[member], member = root, self.parent[member]
        return root

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self.parent[high] = low


def clusters(minima: NDArray[np.uint64], threshold: float = THRESHOLD) -> NDArray[np.int64]:
    """Return for each document the number of the first document of its cluster: int64 [documents].

    Near-duplicates of near-duplicates share a cluster (single linkage), so that no pair is ever parted.
    """
    sets = _Sets(len(minima))
    for band in range(BANDS):
        columns = minima[:, band * ROWS : (band + 1) * ROWS]
        keys = np.zeros(len(minima), dtype=np.uint64)
        for column in range(ROWS):
            keys = mix64(keys ^ columns[:, column])
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        edges = np.flatnonzero(np.diff(ordered)) + 1
        first, end = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
        shared = end - first > 1
        for low, high in zip(first[shared].tolist(), end[shared].tolist(), strict=True):
            _join_bucket(order[low:high], minima, threshold, sets)
    return np.array([sets.find(member) for member in range(len(minima))], dtype=np.int64)


def _join_bucket(
    bucket: NDArray[np.int64], minima: NDArray[np.uint64], threshold: float, sets: _Sets
) -> None:
    wide = len(bucket) > _ALL_PAIRS
    for place, member in enumerate(bucket[:-1].tolist()):
        if wide and place >= 8:
            others = bucket[place + 1 : place + 2]
        else:
            others = bucket[place + 1 :]
        root = sets.find(member)
        others = np.array([other for other in others.tolist() if sets.find(other) != root], dtype=np.int64)
        if len(others):
            alike = (minima[others] == minima[member]).mean(axis=1)
            for other in others[alike >= threshold].tolist():
                sets.join(member, other)
