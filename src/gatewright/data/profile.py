"""A profile of the text that a run would train on: sizes, duplicates, lengths, leaks across the split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatewright.data.corpus import VALID_BYTES, Corpus, open_corpus
from gatewright.data.duplicates import SHINGLE, THRESHOLD
from gatewright.data.overlap import WIDTH, shared_shingles
from gatewright.data.store import TextStore

LENGTH_EDGES = (0, 256, 1_024, 4_096, 16_384, 65_536)
"""Lower edges, in bytes, of the bins of the length histogram."""


@dataclass(frozen=True)
class DomainProfile:
    """One domain; `overlap` is the share of its validation shingles that occur in any training text."""

    name: str
    documents: int
    bytes: int
    share: float
    train_bytes: int
    valid_bytes: int
    tokens: int
    bytes_per_token: float
    exact_duplicates: int
    near_duplicates: int
    lengths: tuple[int, ...]
    overlap: float | None


@dataclass(frozen=True)
class DataProfile:
    """What `gatewright data` reports; `to_dict` is plain JSON, `to_text` a table for people."""

    name: str
    tokenizer: str
    fingerprint: str
    documents: int
    bytes: int
    train_bytes: int
    valid_bytes: int
    tokens: int
    bytes_per_token: float
    exact_duplicates: int
    near_duplicates: int
    near_duplicate_clusters: int
    largest_cluster: int
    near_duplicate_rule: str
    length_edges: tuple[int, ...]
    lengths: tuple[int, ...]
    overlap_width: int
    overlap: float | None
    domains: tuple[DomainProfile, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as plain JSON values."""
        return {"schema": "gatewright.data.v1", **asdict(self)}

    def to_text(self) -> str:
        """Return the profile as lines of at most about 100 characters."""
        return "\n".join([*_heading(self), "", *_table(self), "", *_lengths(self), "", *_remarks(self)])


def profile_data(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: str = "bytes",
    cache: Path | None = None,
    valid_bytes: int = VALID_BYTES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> DataProfile:
    """Return the profile of what `open_corpus` gives for the same arguments; its errors are the same too."""
    corpus = open_corpus(
        paths, tokenizer=tokenizer, cache=cache, valid_bytes=valid_bytes, seed=seed, progress=progress
    )
    if progress:
        progress("comparing validation with training text")
    return profile_corpus(corpus)


def profile_corpus(corpus: Corpus) -> DataProfile:
    """Return the profile of an open corpus."""
    store = corpus.text_store()
    training = corpus.train_documents()
    held = np.setdiff1d(np.arange(len(store.table)), training)
    places, found = shared_shingles(store.raw, store.table[held, :2], store.table[training, :2])
    owner = np.searchsorted(store.table[:, 0], places, side="right") - 1
    domain_of_place = store.table[owner, 2]
    total = int(store.sizes.sum())
    tokens = _tokens(corpus, store)
    repeats = store.table[:, 3] != np.arange(len(store.table))
    domains = []
    for number, name in enumerate(corpus.domains):
        inside = store.table[:, 2] == number
        size = int(store.sizes[inside].sum())
        here = found[domain_of_place == number]
        domains.append(
            DomainProfile(
                name=name,
                documents=int(inside.sum()),
                bytes=size,
                share=size / total,
                train_bytes=corpus.train_domain_bytes[name],
                valid_bytes=corpus.valid_domain_bytes[name],
                tokens=tokens[name],
                bytes_per_token=size / tokens[name],
                exact_duplicates=corpus.exact_duplicates[name],
                near_duplicates=int((inside & repeats).sum()),
                lengths=_histogram(store, inside),
                overlap=float(here.mean()) if len(here) else None,
            )
        )
    every = np.ones(len(store.table), dtype=bool)
    return DataProfile(
        name=corpus.name,
        tokenizer=corpus.tokenizer.name,
        fingerprint=corpus.fingerprint,
        bytes=total,
        train_bytes=corpus.train_bytes,
        valid_bytes=corpus.valid_bytes,
        tokens=sum(tokens.values()),
        bytes_per_token=total / sum(tokens.values()),
        near_duplicate_rule=f"Jaccard >= {THRESHOLD} over {SHINGLE}-byte shingles, estimated",
        length_edges=LENGTH_EDGES,
        lengths=_histogram(store, every),
        overlap_width=WIDTH,
        overlap=float(found.mean()) if len(found) else None,
        domains=tuple(domains),
        skipped=corpus.skipped,
        notes=corpus.notes,
        **corpus.counts,
    )


def _tokens(corpus: Corpus, store: TextStore) -> dict[str, int]:
    """Return the tokens of each domain, training and validation, ends of text left out."""
    counts = np.diff(corpus.train_ends(), prepend=0) - 1
    domain = store.table[corpus.train_documents(), 2]
    result = {}
    for number, name in enumerate(corpus.domains):
        held = corpus.valid(name)
        result[name] = int(counts[domain == number].sum()) + len(held.tokens) - 1 - held.num_documents
    return result


def _histogram(store: TextStore, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, ...]:
    counts, _ = np.histogram(store.sizes[chosen], bins=[*LENGTH_EDGES, np.inf])
    return tuple(counts.tolist())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _heading(profile: DataProfile) -> list[str]:
    return [
        f"{profile.name}: {profile.documents:,} documents, {profile.bytes:,} bytes "
        f"({profile.train_bytes:,} to train on, {profile.valid_bytes:,} held out)",
        f"tokenizer {profile.tokenizer}: {profile.tokens:,} tokens, "
        f"{profile.bytes_per_token:.2f} bytes per token",
    ]


def _table(profile: DataProfile) -> list[str]:
    width = max(6, *(len(domain.name) for domain in profile.domains))
    head = f"{'domain':<{width}}  documents         bytes    share  bytes/token   exact    near   overlap"
    rows = [
        f"{domain.name:<{width}}  {domain.documents:>9,}  {domain.bytes:>12,}  {_percent(domain.share):>7}"
        f"  {domain.bytes_per_token:>11.2f}  {domain.exact_duplicates:>6,}  {domain.near_duplicates:>6,}"
        f"  {_percent(domain.overlap):>8}"
        for domain in profile.domains
    ]
    return [head, *rows]


def _lengths(profile: DataProfile) -> list[str]:
    most = max(profile.lengths)
    lines = ["document length (bytes)"]
    edges = [*profile.length_edges, None]
    for low, high, count in zip(edges[:-1], edges[1:], profile.lengths, strict=True):
        name = f"{low:,} or more" if high is None else f"{low:,} to {high - 1:,}"
        lines.append(f"  {name:<18} {count:>9,}  {'#' * round(40 * count / most)}".rstrip())
    return lines


def _remarks(profile: DataProfile) -> list[str]:
    return [
        f"exact duplicates: {profile.exact_duplicates:,}, dropped",
        f"near-duplicates: {profile.near_duplicates:,} in {profile.near_duplicate_clusters:,} clusters, the "
        f"largest of {profile.largest_cluster:,}; a cluster is held out whole or not at all",
        f"  ({profile.near_duplicate_rule})",
        f"overlap: {_percent(profile.overlap)} of the validation text's "
        f"{profile.overlap_width}-byte shingles occur in training text",
        *profile.skipped,
        *profile.notes,
    ]
