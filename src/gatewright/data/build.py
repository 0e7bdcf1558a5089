"""Building a corpus in two steps: text with its near-duplicate clusters, then the split and its tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewright.data.cache import file_digest
from gatewright.data.duplicates import clusters, signatures
from gatewright.data.hashing import digest
from gatewright.data.sources import INSTALL, default_sources
from gatewright.data.split import hold_out, training_order
from gatewright.data.store import Source, TextStore, TextWriter
from gatewright.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, parse_tokenizer, train_bpe
from gatewright.errors import UserError

BUILDER_VERSION = "5"
"""Changes whenever the same sources would give other documents, clusters, splits or tokens."""
BPE_TEXT = 32_000_000
"""Bytes of training text that a BPE is trained on: its first part, balanced over the domains."""
ABOUT = "about.json"
_BATCH = 256

Progress = Callable[[str], None]


def sources_for(paths: Sequence[str | Path]) -> tuple[str, list[Source], list[str]]:
    """Return the corpus's name, its sources, and a line for each default source that is missing."""
    if paths:
        from gatewright.data.files import file_sources

        sources = file_sources(paths)
        return "+".join(source.name for source in sources), sources, []
    sources, missing = default_sources()
    if not sources:
        raise UserError(f"no source of the default corpus is installed; run: {INSTALL}; or give --data PATH")
    return "default", sources, missing


def key_of(
    sources: Sequence[Source], tokenizer: str | None = None, valid_bytes: int = 0, seed: int = 0
) -> str:
    """Return the cache key (hex): of the text alone, or with a tokenizer and a split of the tokens."""
    parts = [BUILDER_VERSION]
    for source in sources:
        parts += [source.name, digest(source.identity)]
    if tokenizer is not None:
        kind, value = parse_tokenizer(tokenizer)
        parts += [
            kind,
            file_digest(value) if isinstance(value, Path) else str(value),
            str(valid_bytes),
            str(seed),
        ]
    return digest(parts)


def build_text(folder: Path, sources: Sequence[Source], progress: Progress) -> dict[str, Any]:
    """Read every source into `folder`, drop exact duplicates, find the clusters of near-duplicates."""
    began = time.perf_counter()
    with TextWriter(folder, progress) as writer:
        for source in sources:
            writer.read(source)
        if not writer.size:
            raise UserError(f"none of the sources of the default corpus can be read; run: {INSTALL}")
        store, exact = writer.finish()
    progress(f"looking for near-duplicates in {len(store.table)} documents")
    store.table[:, 3] = clusters(signatures(store.raw, store.table[:, :2], progress))
    store.save()
    _, sizes = np.unique(store.table[:, 3], return_counts=True)
    counts = {
        "documents": len(store.table),
        "exact_duplicates": sum(exact),
        "near_duplicates": int((sizes - 1).sum()),
        "near_duplicate_clusters": int((sizes > 1).sum()),
        "largest_cluster": int(sizes.max()),
    }
    progress(
        f"{counts['exact_duplicates']} exact duplicates dropped; {counts['near_duplicates']} near-duplicates "
        f"in {counts['near_duplicate_clusters']} clusters stay on one side of the split "
        f"({time.perf_counter() - began:.0f} s)"
    )
    about = {
        "counts": counts,
        "domain_exact_duplicates": dict(zip(store.domains, exact, strict=True)),
        "notes": writer.notes,
        "skipped": writer.skipped,
    }
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
    return {"schema": "gatewright.text.v1", "domains": store.domains, **about}


def _bpe_sample(store: TextStore, training: NDArray[np.int64]) -> NDArray[np.int64]:
    # Every prefix of the training order holds its share of each domain.
    return training[: int(np.searchsorted(np.cumsum(store.sizes[training]), BPE_TEXT)) + 1]


def _tokenizer(store: TextStore, training: NDArray[np.int64], given: str, progress: Progress) -> Tokenizer:
    _, value = parse_tokenizer(given)
    if isinstance(value, Path):
        return load_tokenizer(value)
    if isinstance(value, int):
        progress(f"training a byte-level BPE of {value} ids")
        made = train_bpe(store.texts(_bpe_sample(store, training)), value)
        if made.vocab_size < value:
            progress(f"the text is too small for {value} ids: the BPE has {made.vocab_size}")
        return made
    return ByteTokenizer()


class _TokenFile:
    """A one-dimensional .npy that grows: numpy pads the header so that the length can be written last."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by the context manager that this is
        self._dtype, self.length = np.dtype("<u2" if vocab_size <= 65_536 else "<u4"), 0
        self._write_header()

    def __enter__(self) -> _TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write_header(self) -> None:
        self._file.seek(0)
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def write(self, ids: NDArray[np.int64]) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.length += len(ids)

    def finish(self) -> None:
        self._write_header()


def _write_tokens(
    path: Path,
    store: TextStore,
    numbers: NDArray[np.int64],
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    lead: bool,
) -> NDArray[np.int64]:
    """Write the documents' ids, each followed by end of text; return where each one ends (after that id)."""
    ends = np.empty(len(numbers), dtype=np.int64)
    end_of_text = np.array([tokenizer.eot], dtype=np.int64)
    told = time.perf_counter()
    with _TokenFile(path, tokenizer.vocab_size) as out:
        if lead:
            out.write(end_of_text)
        for first in range(0, len(numbers), _BATCH):
            batch = list(store.texts(numbers[first : first + _BATCH]))
            for place, ids in enumerate(tokenizer.encode_documents(batch)):
                out.write(ids)
                out.write(end_of_text)
                ends[first + place] = out.length
            if time.perf_counter() - told > 5:
                told = time.perf_counter()
                progress(f"tokenised {first + len(batch)} of {len(numbers)} documents")
        out.finish()
    return ends


def build_tokens(
    folder: Path, store: TextStore, tokenizer: str, valid_bytes: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """Split the text, make or load the tokenizer, and write the token files into `folder`."""
    held = hold_out(store, valid_bytes, seed)
    training = training_order(store, np.flatnonzero(~held), seed)
    made = _tokenizer(store, training, tokenizer, progress)
    (folder / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    ends = _write_tokens(folder / "train.npy", store, training, made, progress, lead=False)
    np.save(folder / "train-ends.npy", ends)
    np.save(folder / "train-documents.npy", training)
    train_bytes: dict[str, int] = {}
    valid_domain_bytes: dict[str, int] = {}
    for number, domain in enumerate(store.domains):
        inside = store.table[:, 2] == number
        numbers = np.flatnonzero(inside & held)
        ends = _write_tokens(folder / f"valid-{number}.npy", store, numbers, made, progress, lead=True)
        np.save(folder / f"valid-{number}-starts.npy", np.concatenate([[1], ends]))
        np.save(folder / f"valid-{number}-documents.npy", numbers)
        train_bytes[domain] = int(store.sizes[inside & ~held].sum())
        valid_domain_bytes[domain] = int(store.sizes[numbers].sum())
        if valid_domain_bytes[domain] * len(store.domains) < valid_bytes:
            progress(
                f"note: domain {domain} is small: it holds out {valid_domain_bytes[domain]} bytes for "
                f"validation, less than its share of {valid_bytes}"
            )
    files = sorted(path for path in folder.iterdir())
    about = json.loads((store.folder / ABOUT).read_text(encoding="utf-8"))
    return {
        "schema": "gatewright.tokens.v1",
        "domains": store.domains,
        "tokenizer": made.name,
        "train_domain_bytes": train_bytes,
        "valid_domain_bytes": valid_domain_bytes,
        "fingerprint": digest(part for path in files for part in (path.name, file_digest(path))),
        **about,
    }
