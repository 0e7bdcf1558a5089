"""Parallel text: the same verses in several languages, fetched once, and the stream of pairs made of them."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewright.data.cache import cache_root, cached_folder, check_pin
from gatewright.data.hashing import digest, permutation
from gatewright.data.tokenizer import Tokenizer
from gatewright.errors import RunFailure, UserError

PACKAGE = "quran-json@3.1.2"
"""6,236 verses in eleven languages. The package says CC-BY-SA-4.0; translators have rights of their own."""
SHA256 = "d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49"
LANGUAGES = ("ar", "bn", "es", "fr", "id", "ru", "sv", "tr", "ur", "zh")
TARGET = "en"
# The text of all of them stands in the file without a language.
_WANTED = re.compile(r"package/dist/quran(_[a-z]{2}|)\.json")


def folder_key() -> str:
    """Return what names the folder in the cache: what is fetched, and what of it is kept."""
    return digest([PACKAGE, SHA256, _WANTED.pattern])


def fetch(cache: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """Return the folder of the parallel text, fetched by npm on the first call and cached after it.

    Raises: UserError without npm; RunFailure where it cannot fetch, or what came is not what is pinned.
    """

    def build(folder: Path) -> dict[str, Any]:
        progress(f"fetching {PACKAGE} with npm")
        try:
            done = subprocess.run(
                ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=False, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise UserError("npm is not installed; parallel text is an npm package; install npm") from None
        archives = list(folder.glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RunFailure(f"npm could not fetch {PACKAGE}: {reason}")
        unpack(archives[0], folder, SHA256)
        return {"schema": "gatewright.parallel.v1", "package": PACKAGE, "sha256": SHA256}

    return cached_folder(cache_root(cache), "parallel", folder_key(), build, progress)[0]


def unpack(archive: Path, folder: Path, sha256: str) -> None:
    """Put an archive's verses into `folder` and remove it. Raises: RunFailure if it is another one."""
    check_pin(archive, sha256)
    with tarfile.open(archive) as packed:
        for member in packed:
            name = _WANTED.fullmatch(member.name)
            content = packed.extractfile(member) if name else None
            if name and content is not None:
                (folder / f"quran{name[1] or '_ar'}.json").write_bytes(content.read())
    archive.unlink()


def verses(folder: Path, language: str) -> list[str]:
    """Return the verses of one language, in the order that all have; Arabic without its vowel signs."""
    path = folder / f"quran_{language}.json"
    if not path.is_file():
        there = sorted(p.stem[-2:] for p in folder.glob("quran_*.json"))
        raise UserError(
            f"language {language!r} is not there; allowed: {', '.join(there) or 'none, fetch them'}"
        )
    chapters = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        verse["translation" if "translation" in verse else "text"].strip()
        for chapter in chapters
        for verse in chapter["verses"]
    ]
    return [unmarked(line) for line in lines] if language == "ar" else lines


def unmarked(arabic: str) -> str:
    """Return Arabic as it is printed outside of this text: no signs above and below, a plain alef."""
    plain = "".join(c for c in arabic if unicodedata.category(c) != "Mn")
    return plain.translate({0x671: 0x627, 0x640: None}).strip()


@dataclass(frozen=True)
class PairBatch:
    """Padded on the right: `source` [B, P], `target` [B, S] beginning with the start id, `labels` [B, S], and
    masks, False = padding; `language` [B] is a place in the languages.
    """

    source: NDArray[np.int64]
    source_mask: NDArray[np.bool_]
    target: NDArray[np.int64]
    labels: NDArray[np.int64]
    target_mask: NDArray[np.bool_]
    language: NDArray[np.int64]


def exchanged(batch: PairBatch) -> PairBatch:
    """Return a batch whose every target has its neighbour's source: by how much it is dearer to predict says
    how much a model reads its source.
    """
    sources = {name: np.roll(getattr(batch, name), 1, axis=0) for name in ("source", "source_mask")}
    return replace(batch, **sources)


class PairStream:
    """Batches of translations from several languages into one, a pure function of the batch index.

    A source begins with its language's tag, the id `first_tag` + its place, and ends with `end`; a target
    ends with `end`, which also starts it. A pair is left out if either is longer than `longest` ids. Every
    `held_out`-th verse, in all languages alike, is for validation: no target of training stands there too.
    """

    def __init__(
        self,
        texts: dict[str, Sequence[str]],
        targets: Sequence[str],
        tokenizer: Tokenizer,
        *,
        first_tag: int,
        end: int,
        batch_size: int,
        longest: int,
        seed: int = 0,
        held_out: int = 20,
        valid: bool = False,
    ) -> None:
        self.languages, self.batch_size, self.end, self.seed = tuple(texts), batch_size, end, seed
        for language, lines in texts.items():
            if len(lines) != len(targets):
                raise UserError(
                    f"{language} has {len(lines)} lines for {len(targets)} of the target; allowed: one each"
                )
        if min(batch_size, longest) < 1 or held_out < 2:
            raise UserError(
                f"batch_size {batch_size}, longest {longest}, held_out {held_out}; allowed: 1, 1, 2 or more"
            )
        # A text that stands twice among the targets is one: its copies must not be on both sides.
        first: dict[str, int] = {}
        number = [first.setdefault(line, i) for i, line in enumerate(targets)]
        held = permutation(len(targets), seed, 0x68656C64)[: len(targets) // held_out]
        on_side = np.isin(np.array(number), held) == valid
        encoded = tokenizer.encode_documents(list(targets))
        self.pairs: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
        for place, lines in enumerate(texts.values()):
            for i, source in enumerate(tokenizer.encode_documents(list(lines))):
                fits = 0 < len(source) <= longest and 0 < len(encoded[i]) <= longest
                if on_side[i] and fits:
                    tagged = np.concatenate([[first_tag + place], source, [end]]).astype(np.int64)
                    self.pairs.append((place, tagged, np.append(encoded[i], end).astype(np.int64)))
        if not self.pairs:
            raise UserError(f"no pair of at most {longest} ids; allowed: one or more; let them be longer")

    def batch(self, index: int) -> PairBatch:
        """Return batch `index`: pairs in a new order each epoch."""
        places = index * self.batch_size + np.arange(self.batch_size)
        epochs, numbers = places // len(self.pairs), places % len(self.pairs)
        orders = {e: permutation(len(self.pairs), self.seed, e) for e in set(epochs.tolist())}
        own = [self.pairs[orders[int(e)][n]] for e, n in zip(epochs, numbers, strict=True)]
        return pair_batch(own, self.end)


def padded(rows: Sequence[NDArray[np.int64]], fill: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return rows of ids as one array [B, S], `fill` on their right, and a mask, False = padding."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    out = np.full(mask.shape, fill, dtype=np.int64)
    out[mask] = np.concatenate(rows)
    return out, mask


def pair_batch(pairs: Sequence[tuple[int, NDArray[np.int64], NDArray[np.int64]]], end: int) -> PairBatch:
    """Return pairs of (language, source, labels) as a batch; `end` starts every target and fills it up."""
    source, source_mask = padded([pair[1] for pair in pairs], end)
    labels, target_mask = padded([pair[2] for pair in pairs], end)
    target = np.concatenate([np.full((len(pairs), 1), end), labels[:, :-1]], axis=1)
    language = np.array([pair[0] for pair in pairs], dtype=np.int64)
    return PairBatch(source, source_mask, target, labels, target_mask, language)
