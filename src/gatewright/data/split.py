"""The split into training and validation: by cluster of near-duplicates, fixed by text and seed."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from gatewright.data.store import TextStore
from gatewright.errors import UserError

VALID_SHARE = 0.1
"""Share of a domain that validation takes at the most."""
SMALLEST_DOMAIN = 4_096
"""Bytes of text below which a domain cannot be split."""


def _rank(store: TextStore, number: int, seed: int) -> bytes:
    key = hashlib.blake2b(store.bytes_of(number), digest_size=16, salt=(seed % 2**64).to_bytes(8, "little"))
    return key.digest()


def hold_out(store: TextStore, valid_bytes: int, seed: int) -> NDArray[np.bool_]:
    """Return which documents are held out for validation: bool [documents].

    Each domain gives valid_bytes / number of domains (at most a tenth of its text), in whole clusters drawn
    in an order that depends on the documents' content and the seed, those first that are at most a quarter
    of it. A cluster that would overshoot by more than a quarter is passed over where others are left.
    Raises UserError when a domain is too small or a single cluster.
    """
    wanted = -(-valid_bytes // max(1, len(store.domains)))
    held: set[int] = set()
    for number, name in enumerate(store.domains):
        members = np.flatnonzero(store.table[:, 2] == number)
        total = int(store.sizes[members].sum())
        if total < SMALLEST_DOMAIN:
            raise UserError(
                f"domain {name!r} holds {total} bytes of text that no earlier domain holds; "
                f"it takes at least {SMALLEST_DOMAIN} to train and validate; give more text or leave it out"
            )
        # A cluster may span domains: what an earlier domain drew is held out here as well.
        held |= _draw(store, members, held, min(wanted, max(1, int(total * VALID_SHARE))), seed)
        if not held & set(store.table[members, 3].tolist()):
            raise UserError(
                f"domain {name!r} is {len(members)} documents that are near-duplicates of one another, so "
                "none can be held out for validation; a domain takes two different texts; add other text"
            )
    return np.isin(store.table[:, 3], sorted(held))


def _draw(store: TextStore, members: NDArray[np.int64], held: set[int], target: int, seed: int) -> set[int]:
    labels, inverse = np.unique(store.table[members, 3], return_inverse=True)
    sizes = np.bincount(inverse, weights=store.sizes[members]).astype(np.int64).tolist()
    total = sum(sizes)
    taken = sum(size for label, size in zip(labels.tolist(), sizes, strict=True) if label in held)
    free = [place for place, label in enumerate(labels.tolist()) if label not in held]
    free.sort(key=lambda place: _rank(store, int(labels[place]), seed))
    by_size = sorted(free, key=lambda place: sizes[place])
    chosen: set[int] = set()
    # Order, largest cluster, sum not to pass. First clusters of at most a quarter of what is wanted, so that
    # several texts are held out and not one long one; where only large ones are left, the smallest of them.
    for order, largest, limit in (
        (free, target / 4, target * 1.25),
        (free, target * 1.25, target * 1.25),
        (by_size, total, total // 2),
    ):
        for place in order:
            if taken >= target:
                break
            if sizes[place] <= largest and taken + sizes[place] <= limit and place not in chosen:
                chosen.add(place)
                taken += sizes[place]
    return {int(labels[place]) for place in chosen}


def training_order(store: TextStore, training: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the training documents shuffled such that every prefix holds about its share of each domain.

    Within a domain the order is by hash; each document then stands at the fraction of its domain's text that
    lies before its middle, and the domains are merged by that fraction. So the first 1 % holds every domain.
    """
    places = np.empty(len(training), dtype=np.float64)
    ranks = [_rank(store, int(number), seed + 1) for number in training]
    for domain in np.unique(store.table[training, 2]):
        inside = np.flatnonzero(store.table[training, 2] == domain)
        inside = inside[np.argsort(np.array([ranks[i] for i in inside], dtype="S16"), kind="stable")]
        sizes = store.sizes[training[inside]].astype(np.float64)
        places[inside] = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    return training[np.argsort(places, kind="stable")]
