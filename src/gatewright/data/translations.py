"""Many pairs of languages: which lines are for what, and batches whose sources ask for a language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gatewright.data.hashing import permutation
from gatewright.data.parallel import PairBatch, pair_batch
from gatewright.data.tokenizer import Tokenizer
from gatewright.errors import UserError

Ids = NDArray[np.int64]
Direction = tuple[str, str]
"""From which language into which."""
PARTS = ("train", "dev", "test")


def split_lines(
    texts: Mapping[str, Sequence[str]], seed: int, held_out: float, *, across: bool = False
) -> dict[str, Ids]:
    """Return the numbers of the lines of each of PARTS: a share `held_out` is dev, and as much is test.

    Lines that are equal in any of the languages belong together, so that no text of one part, source or
    target, stands in another of the same language; with `across`, of any language. An empty line is a
    translation that is missing.
    """
    counts = {language: len(lines) for language, lines in texts.items()}
    if len(set(counts.values())) != 1 or not 0 < held_out < 0.5:
        raise UserError(f"lines {counts}, held_out {held_out}; allowed: as many of each, a share below 0.5")
    count = next(iter(counts.values()))
    head = list(range(count))

    def first(i: int) -> int:
        while head[i] != i:
            head[i] = head[head[i]]
            i = head[i]
        return i

    seen: dict[str, int] = {}
    for lines in texts.values():
        seen = seen if across else {}
        for i, line in enumerate(lines):
            if not line:
                continue
            one, other = first(seen.setdefault(line, i)), first(i)
            head[max(one, other)] = min(one, other)
    place = np.empty(count)
    place[permutation(count, seed, 0x73706C69)] = np.arange(count) / count
    share = place[[first(i) for i in range(count)]]
    limits = (share >= 2 * held_out, share < held_out, (share >= held_out) & (share < 2 * held_out))
    return {part: np.flatnonzero(chosen) for part, chosen in zip(PARTS, limits, strict=True)}


@dataclass(frozen=True)
class Ends:
    """Ids beside the tokenizer's: `tags` by language, and the one that ends texts and starts targets;
    `source_end` ends sources that have a vocabulary of their own.
    """

    tags: Mapping[str, int]
    end: int
    source_end: int | None = None


class Translations:
    """Batches of translations in several directions, a pure function of the batch index.

    A source begins with the tag of the language that is wanted; source and target end with `end`. A line that
    has no ids in one of the two languages is no pair. Every epoch has each pair at most once, in batches of
    like length: the few that fill no batch are left out.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[Ids]],
        directions: Sequence[Direction],
        ends: Ends,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        self.directions, self.batch_size, self.seed, self.end = tuple(directions), batch_size, seed, ends.end
        self.pairs: list[tuple[int, Ids, Ids]] = []
        for place, (source, target) in enumerate(self.directions):
            tag = np.array([ends.tags[target]])
            last = np.array([ends.end if ends.source_end is None else ends.source_end])
            for own, wanted in zip(texts[source], texts[target], strict=True):
                if len(own) and len(wanted):
                    pair = (np.concatenate([tag, own, last]), np.append(wanted, ends.end))
                    self.pairs.append((place, *pair))
        if not 1 <= batch_size <= len(self.pairs):
            raise UserError(f"batch_size {batch_size}; allowed: 1 to {len(self.pairs)}, the pairs there are")
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty((0, 0), dtype=np.int64))

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return len(self.pairs) // self.batch_size

    def batch(self, index: int) -> PairBatch:
        """Return batch `index`."""
        epoch, place = divmod(index, self.batches)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return pair_batch([self.pairs[i] for i in self._epoch[1][place]], self.end)

    def in_order(self, direction: int) -> list[PairBatch]:
        """Return one direction's pairs, each once, in the order of their lines."""
        own = [pair for pair in self.pairs if pair[0] == direction]
        size = self.batch_size
        return [pair_batch(own[i : i + size], self.end) for i in range(0, len(own), size)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return which pairs each batch has: shuffled, sorted by length within 16 batches, shuffled."""
        whole = permutation(len(self.pairs), self.seed, epoch)[: self.batches * self.batch_size]
        lengths = np.array([len(source) + len(labels) for _, source, labels in self.pairs])
        pool = 16 * self.batch_size
        runs = [whole[i : i + pool] for i in range(0, len(whole), pool)]
        ordered = np.concatenate([run[np.argsort(lengths[run], kind="stable")] for run in runs])
        rows = ordered.reshape(self.batches, self.batch_size)
        return rows[permutation(self.batches, self.seed, epoch, 1)]


def encode_lines(
    texts: Mapping[str, Sequence[str]], numbers: Ids, tokenizer: Tokenizer, longest: int
) -> dict[str, list[Ids]]:
    """Return the ids of these lines by language, of those that have 1 to `longest` ids in every language."""
    encoded = {
        language: tokenizer.encode_documents([lines[i] for i in numbers]) for language, lines in texts.items()
    }
    rows = [
        row for row in zip(*encoded.values(), strict=True) if all(1 <= len(ids) <= longest for ids in row)
    ]
    return {language: [row[place] for row in rows] for place, language in enumerate(encoded)}


def encode_each(
    texts: Mapping[str, Sequence[str]], tokenizers: Mapping[str, Tokenizer], longest: int
) -> dict[str, list[Ids]]:
    """Return the ids of lines by language, each by its language's tokenizer: none where a line is missing or
    has more than `longest` ids.
    """
    found = {}
    for language, lines in texts.items():
        own = tokenizers[language].encode_documents(list(lines))
        found[language] = [ids if len(ids) <= longest else ids[:0] for ids in own]
    return found


def cut_lines(
    texts: Mapping[str, Sequence[str]], language: str, other: str, share: float, seed: int
) -> dict[str, list[str]]:
    """Return the same lines, but of `language` only a share of those that `other` has too, one at least: a
    language with few resources.
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share}; allowed: above 0, up to 1")
    own = texts[language]
    there = [i for i, line in enumerate(own) if line and texts[other][i]]
    order = permutation(len(there), seed, 0x637574)
    left = {there[i] for i in order[: max(1, round(share * len(there)))]}
    cut = [line if i in left else "" for i, line in enumerate(own)]
    return {name: cut if name == language else list(lines) for name, lines in texts.items()}


def first_pairs(texts: Mapping[str, Sequence[Ids]], direction: Direction, most: int) -> dict[str, list[Ids]]:
    """Return the first lines, `most` at most, that have ids in both languages of a direction."""
    both = zip(*(texts[language] for language in direction), strict=True)
    rows = [row for row in both if all(len(ids) for ids in row)][:most]
    return {language: [row[place] for row in rows] for place, language in enumerate(direction)}


def first_batches(
    texts: Mapping[str, Sequence[Ids]], direction: Direction, ends: Ends, most: int
) -> list[PairBatch]:
    """Return the first pairs of a direction in their order, as one batch, or none where there is no pair."""
    own = first_pairs(texts, direction, most)
    count = len(own[direction[0]])
    return Translations(own, (direction,), ends, batch_size=count).in_order(0) if count else []
