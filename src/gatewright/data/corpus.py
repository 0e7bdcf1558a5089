"""A corpus: real text read once, split by document, tokenised and cached; the door of the data room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewright.data.build import build_text, build_tokens, key_of, sources_for
from gatewright.data.cache import cache_root, cached_folder
from gatewright.data.store import TextStore
from gatewright.data.stream import TokenStream
from gatewright.data.tokenizer import Tokenizer, parse_tokenizer, tokenizer_from_json
from gatewright.errors import UserError, did_you_mean

VALID_BYTES = 512_000


@dataclass(frozen=True)
class ValidSet:
    """The held-out text of one domain.

    `tokens` [n] starts with the end-of-text id, and each document is followed by one. Bits per byte of the
    set is the sum over i >= 1 of -log2 p(tokens[i] | tokens before it in its window), divided by `num_bytes`:
    the true number of UTF-8 bytes of the text, so that tokenizers compare. (The ends of text are predicted
    too and cost bits, but are no bytes.) `starts` [num_documents + 1] holds the place of each document's
    first token, then len(tokens).
    """

    domain: str
    tokens: NDArray[np.int64]
    num_bytes: int
    starts: NDArray[np.int64] = field(repr=False)
    read_text: Callable[[int], str] = field(repr=False)

    @property
    def num_documents(self) -> int:
        """Number of held-out documents."""
        return len(self.starts) - 1

    def document(self, number: int) -> NDArray[np.int64]:
        """Return the ids of one document, its end-of-text id left out."""
        return self.tokens[self.starts[number] : self.starts[number + 1] - 1]

    def text(self, number: int) -> str:
        """Return the text of one document as it was read."""
        return self.read_text(number)


class Corpus:
    """Text in named domains, split into training and validation, as tokens on disk. See `open_corpus`."""

    def __init__(self, folder: Path, about: dict[str, Any], texts: Callable[[], TextStore]) -> None:
        self.folder = folder
        self.name: str = about["name"]
        self.domains: tuple[str, ...] = tuple(about["domains"])
        self.tokenizer: Tokenizer = tokenizer_from_json(
            (folder / "tokenizer.json").read_text(encoding="utf-8"), "tokenizer.json"
        )
        self.train_domain_bytes: dict[str, int] = dict(about["train_domain_bytes"])
        self.valid_domain_bytes: dict[str, int] = dict(about["valid_domain_bytes"])
        self.fingerprint: str = about["fingerprint"]
        self.skipped: tuple[str, ...] = tuple(about["skipped"])
        self.notes: tuple[str, ...] = tuple(about["notes"])
        self.counts: dict[str, int] = dict(about["counts"])
        self.exact_duplicates: dict[str, int] = dict(about["domain_exact_duplicates"])
        self._texts = texts
        self._train_ends: NDArray[np.int64] = np.load(folder / "train-ends.npy", mmap_mode="r")
        self._train: NDArray[np.generic] = np.load(folder / "train.npy", mmap_mode="r")

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, domains={self.domains}, tokenizer={self.tokenizer.name!r}, "
            f"train_bytes={self.train_bytes}, valid_bytes={self.valid_bytes})"
        )

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of training text."""
        return sum(self.train_domain_bytes.values())

    @property
    def valid_bytes(self) -> int:
        """UTF-8 bytes of validation text."""
        return sum(self.valid_domain_bytes.values())

    @property
    def train_tokens(self) -> int:
        """Tokens of training text, ends of text included."""
        return len(self._train)

    def text_store(self) -> TextStore:
        """Return the text itself, document by document."""
        return self._texts()

    def train_documents(self) -> NDArray[np.int64]:
        """Return the numbers of the training documents in the stream's order: [documents]."""
        return np.asarray(np.load(self.folder / "train-documents.npy"), dtype=np.int64)

    def train_ends(self) -> NDArray[np.int64]:
        """Return where each training document ends in the tokens, after its end-of-text id: [documents]."""
        return np.asarray(self._train_ends, dtype=np.int64)

    def train_ids(self) -> NDArray[np.int64]:
        """Return all training tokens, document behind document as `train_ends` says: [train_tokens]."""
        return np.asarray(self._train, dtype=np.int64)

    def stream(self, batch_size: int, context: int, *, seed: int = 0, fraction: float = 1.0) -> TokenStream:
        """Return the training stream over the first `fraction` (0 < fraction <= 1) of the training documents.

        The documents' order does not depend on `fraction` or `seed`, so the text of 1 % is part of that of
        10 %, and every prefix holds about the same share of each domain. `seed` orders the windows.
        """
        if not 0 < fraction <= 1:
            raise UserError(
                f"data fraction {fraction} was given; it is more than 0 and at most 1; 0.1 is the first tenth"
            )
        end = int(self._train_ends[np.searchsorted(self._train_ends, fraction * self._train_ends[-1])])
        return TokenStream(self._train[:end], batch_size, context, seed)

    def valid(self, domain: str) -> ValidSet:
        """Return the validation text of one domain."""
        if domain not in self.domains:
            raise UserError(
                f"domain {domain!r} was given; this corpus has {', '.join(self.domains)}"
                f"{did_you_mean(domain, self.domains) or '; choose one of them'}"
            )
        number = self.domains.index(domain)
        documents = np.load(self.folder / f"valid-{number}-documents.npy")

        def read_text(place: int) -> str:
            return self._texts().bytes_of(int(documents[place])).decode("utf-8")

        return ValidSet(
            domain,
            np.load(self.folder / f"valid-{number}.npy").astype(np.int64),
            self.valid_domain_bytes[domain],
            np.load(self.folder / f"valid-{number}-starts.npy"),
            read_text,
        )


def open_corpus(
    paths: Sequence[str | Path] = (),
    *,
    tokenizer: str = "bytes",
    cache: Path | None = None,
    valid_bytes: int = VALID_BYTES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Corpus:
    """Return the corpus of `paths` (none: the default corpus), built on the first call and cached after it.

    Args:
        paths: files and folders; each is a domain named after its last part.
        tokenizer: "bytes", "bpe:N" (trained here on the training split) or the path of a tokenizer.json.
        cache: folder for the built corpus; default $GATEWRIGHT_CACHE, else ~/.cache/gatewright.
        valid_bytes: bytes of text to hold out, shared evenly by the domains; at most a tenth of each domain.
        seed: draws the documents that are held out, and the order of the others.
        progress: called with a line at a time while building.
    Raises:
        UserError: for a path that is missing, empty or no text, and for too little text.
        RunFailure: when the cache cannot be written (full disk).
    """
    report = progress or (lambda line: None)
    if valid_bytes < 1:
        raise UserError(
            f"valid_bytes {valid_bytes} was given; it is at least 1; {VALID_BYTES} is the default"
        )
    parse_tokenizer(tokenizer)
    root = cache_root(cache)
    name, sources, missing = sources_for(paths)
    for line in missing:
        report(line)
    text_key = key_of(sources)
    opened: list[TextStore] = []

    def build_store(at: Path) -> dict[str, Any]:
        return build_text(at, sources, report)

    def texts() -> TextStore:
        if not opened:
            place, _ = cached_folder(
                root, "text", text_key, lambda at: build_text(at, sources, report), report
            )
            opened.append(TextStore.open(place))
        return opened[0]

    def build(at: Path) -> dict[str, Any]:
        about = build_tokens(at, texts(), tokenizer, valid_bytes, seed, report)
        return {**about, "name": name}

    key = key_of(sources, tokenizer, valid_bytes, seed)
    place, about = cached_folder(root, "tokens", key, build, report)
    return Corpus(place, {**about, "skipped": [*missing, *about["skipped"]]}, texts)
