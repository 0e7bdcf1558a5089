"""The text of a corpus on disk: documents are added one by one, and read back by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TEXT, TABLE, NAMES = "text.bin", "documents.npy", "names.json"


@dataclass(frozen=True)
class Source:
    """A domain to read: `identity` changes with its content, `read` hands its documents to the writer."""

    name: str
    identity: tuple[str, ...]
    read: Callable[[TextWriter], None]


class TextWriter:
    """Appends documents to `text.bin`; what a broken file added is taken back with `rollback`."""

    def __init__(self, folder: Path, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self.domains: list[str] = []
        self._file = open(folder / TEXT, "wb")  # noqa: SIM115 - the writer is the context manager
        self._folder = folder
        self._ends: list[int] = [0]
        self._domain: list[int] = []
        self._names: list[str] = []
        self._digests: list[bytes] = []

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, line: str) -> None:
        """Keep one line for the user (a skipped file, a bad record) and show it."""
        self.notes.append(line)
        self.progress(line)

    def skip(self, line: str) -> None:
        """Keep one line that says which domain is missing and why, and show it."""
        self.skipped.append(line)
        self.progress(line)

    def read(self, source: Source) -> None:
        """Read one source as the next domain; one that turns out to hold nothing is no domain."""
        documents, before = self.size, self.num_bytes
        self.domains.append(source.name)
        source.read(self)
        if self.size == documents:
            self.domains.pop()
            return
        added = (self.num_bytes - before) / 1e6
        self.progress(f"read {source.name}: {self.size - documents} documents, {added:.1f} MB")

    @property
    def size(self) -> int:
        """Number of documents so far, also the mark that `rollback` takes."""
        return len(self._domain)

    @property
    def num_bytes(self) -> int:
        """Bytes of text so far."""
        return self._ends[-1]

    def add(self, name: str, text: str) -> None:
        """Add one document of the present domain; one of nothing but white space is left out."""
        if not text.strip():
            return
        raw = text.encode("utf-8", "replace")
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))
        self._domain.append(len(self.domains) - 1)
        self._names.append(name)
        self._digests.append(hashlib.blake2b(raw.strip(), digest_size=16).digest())

    def rollback(self, mark: int) -> None:
        """Forget every document after the first `mark`."""
        del self._ends[mark + 1 :], self._domain[mark:], self._names[mark:], self._digests[mark:]
        self._file.seek(self._ends[-1])
        self._file.truncate()

    def finish(self) -> tuple[TextStore, list[int]]:
        """Return the store of distinct documents and, per domain, how many exact duplicates were dropped."""
        self._file.close()
        first: dict[bytes, int] = {}
        for number, key in enumerate(self._digests):
            first.setdefault(key, number)
        kept = np.array(sorted(first.values()), dtype=np.int64)
        ends = np.array(self._ends, dtype=np.int64)
        domain = np.array(self._domain, dtype=np.int64)
        columns = [ends[:-1][kept], ends[1:][kept], domain[kept], np.arange(len(kept), dtype=np.int64)]
        names = [self._names[number] for number in kept.tolist()]
        all_of, kept_of = (np.bincount(part, minlength=len(self.domains)) for part in (domain, domain[kept]))
        store = TextStore(self._folder, tuple(self.domains), np.stack(columns, axis=1), names)
        return store, (all_of - kept_of).tolist()


@dataclass
class TextStore:
    """Documents as rows of `table` int64 [documents, 4]: first byte, end byte, domain, cluster.

    A cluster of near-duplicates is named by the number of its first document.
    """

    folder: Path
    domains: tuple[str, ...]
    table: NDArray[np.int64]
    names: list[str]
    _raw: NDArray[np.uint8] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: Path) -> TextStore:
        """Return the store that `save` wrote in `folder`."""
        about = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        return cls(folder, tuple(about["domains"]), np.load(folder / TABLE), about["names"])

    def save(self) -> None:
        """Write the table and the names beside the text."""
        np.save(self.folder / TABLE, self.table)
        about = {"domains": self.domains, "names": self.names}
        (self.folder / NAMES).write_text(json.dumps(about), encoding="utf-8")

    @property
    def raw(self) -> NDArray[np.uint8]:
        """All text as bytes, mapped from disk."""
        if self._raw is None:
            path = self.folder / TEXT
            empty = path.stat().st_size == 0
            self._raw = np.empty(0, np.uint8) if empty else np.memmap(path, dtype=np.uint8, mode="r")
        return self._raw

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each document."""
        return self.table[:, 1] - self.table[:, 0]

    def bytes_of(self, number: int) -> bytes:
        """Return the UTF-8 bytes of one document."""
        start, end = self.table[number, :2]
        return self.raw[start:end].tobytes()

    def texts(self, numbers: NDArray[np.int64]) -> Iterator[str]:
        """Yield the text of each numbered document."""
        for number in numbers.tolist():
            yield self.bytes_of(number).decode("utf-8")
