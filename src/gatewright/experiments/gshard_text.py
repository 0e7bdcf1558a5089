"""The texts of gshard/quality: verses, a program's catalogs and a book, split once, in the models' ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gatewright.data import train_bpe
from gatewright.data.catalogs import catalog_lines, fetch_catalogs
from gatewright.data.handbook import fetch_handbook, handbook_lines
from gatewright.data.hashing import permutation
from gatewright.data.parallel import LANGUAGES, TARGET, fetch, verses
from gatewright.data.tokenizer import Tokenizer
from gatewright.data.translations import Direction, Ends, Ids, cut_lines, encode_each, split_lines
from gatewright.errors import RunFailure, UserError

VERSES, CATALOGS, HANDBOOK = "verses", "catalogs", "handbook"
TRAIN = "train"
Texts = dict[str, list[str]]


@dataclass(frozen=True)
class TextPlan:
    """Every one of `languages` into English in many-to-one; `many` and English among each other in
    many-to-many, without the `unseen` pairs. Of `low` a share `low_share` of the training lines is left. A
    pair counts if either side has at most `longest` ids.
    """

    languages: tuple[str, ...] = LANGUAGES
    low: str = "es"
    low_share: float = 0.05
    many: tuple[str, ...] = ("fr", "id", "sv", "tr")
    unseen: tuple[Direction, ...] = (("fr", "sv"), ("sv", "fr"), ("id", "tr"), ("tr", "id"))
    source_pieces: int = 6000
    target_pieces: int = 1500
    many_pieces: int = 3000
    longest: int = 20
    held_out: float = 0.08

    @property
    def into_english(self) -> tuple[Direction, ...]:
        """The directions of many-to-one."""
        return tuple((language, TARGET) for language in self.languages)

    @property
    def seen(self) -> tuple[Direction, ...]:
        """The directions that many-to-many trains on: all but the unseen ones."""
        both = (TARGET, *self.many)
        every = ((one, other) for one in both for other in both if one != other)
        return tuple(direction for direction in every if direction not in self.unseen)


class Sources(NamedTuple):
    """Lines of each source by language, as many of each, "" where one is missing; `missing` says why a source
    is not there.
    """

    lines: dict[str, Texts]
    missing: dict[str, str]


class Corpus(NamedTuple):
    """Ids by part ("train", "dev/verses", "test/handbook", ...) and language. Sources have a tokenizer of
    their own where `target` is one language's.
    """

    source: Tokenizer
    target: Tokenizer
    parts: dict[str, dict[str, list[Ids]]]
    languages: tuple[str, ...]

    @property
    def shared(self) -> bool:
        """Whether both sides have one tokenizer."""
        return self.source is self.target

    def ends(self, num_tags: int) -> Ends:
        """Return a model's own ids: its sentinels are the tags, and the last id is the end."""
        first = self.source.vocab_size
        wanted = self.languages if self.shared else (TARGET,)
        tags = {language: first + place for place, language in enumerate(wanted)}
        last = self.target.vocab_size + num_tags
        return Ends(tags, last, None if self.shared else first + num_tags)


def open_sources(plan: TextPlan, say: Callable[[str], None] = print) -> Sources:
    """Return the three sources' lines; without the book where this machine cannot fetch it."""
    folder = fetch(progress=say)
    wanted = (TARGET, *plan.languages)
    lines = {
        VERSES: {language: verses(folder, language) for language in wanted},
        CATALOGS: catalog_lines(fetch_catalogs(progress=say)),
    }
    missing: dict[str, str] = {}
    try:
        lines[HANDBOOK] = handbook_lines(fetch_handbook(progress=say))
    except (UserError, RunFailure) as error:
        missing[HANDBOOK] = str(error)
        say(f"going on without the held-out domain: {error}")
    return Sources({source: full(own, wanted) for source, own in lines.items()}, missing)


def full(lines: Mapping[str, Sequence[str]], languages: Sequence[str]) -> Texts:
    """Return these languages' lines, "" for every line of one that the source lacks."""
    count = len(lines[TARGET])
    return {language: list(lines.get(language, [""] * count)) for language in languages}


def split_texts(plan: TextPlan, lines: Mapping[str, Texts]) -> dict[str, Texts]:
    """Return the lines of every part: verses and catalogs split as one text, so that nothing that stands in
    one part, of either source and any language, stands in another; the book is all test, without what is
    trained on.
    """
    languages = tuple(lines[VERSES])
    whole = {language: [*lines[VERSES][language], *lines[CATALOGS][language]] for language in languages}
    first = len(lines[VERSES][TARGET])
    parts: dict[str, Texts] = {}
    for part, ordered in split_lines(whole, 0, plan.held_out, across=True).items():
        # The first lines of a part are measured: catalogs stand in the order of their letters.
        numbers = ordered[permutation(len(ordered), 0)]
        sides = {VERSES: numbers[numbers < first], CATALOGS: numbers[numbers >= first]}
        kinds = {part: numbers} if part == TRAIN else {f"{part}/{kind}": own for kind, own in sides.items()}
        for name, own in kinds.items():
            parts[name] = {language: [text[i] for i in own] for language, text in whole.items()}
    trained = {line for own in parts[TRAIN].values() for line in own}
    if HANDBOOK in lines:
        book = {
            language: ["" if line in trained else line for line in own]
            for language, own in lines[HANDBOOK].items()
        }
        parts[f"test/{HANDBOOK}"] = book
    if plan.low in languages:
        parts[TRAIN] = cut_lines(parts[TRAIN], plan.low, TARGET, plan.low_share, 0)
    return parts


def many_to_one(plan: TextPlan, texts: Mapping[str, Texts]) -> Corpus:
    """Return the parts in ids: pieces of the sources, and of English, from the training lines alone."""
    train = texts[TRAIN]
    source = train_bpe([line for lang in plan.languages for line in train[lang]], plan.source_pieces)
    target = train_bpe(train[TARGET], plan.target_pieces)
    own = dict.fromkeys(plan.languages, source) | {TARGET: target}
    parts = {part: encode_each(lines, own, plan.longest) for part, lines in texts.items()}
    return Corpus(source, target, parts, plan.languages)


def many_to_many(plan: TextPlan, texts: Mapping[str, Texts]) -> Corpus:
    """Return the parts of the fewer languages in ids of one tokenizer."""
    languages = (TARGET, *plan.many)
    shared = train_bpe([line for lang in languages for line in texts[TRAIN][lang]], plan.many_pieces)
    own = dict.fromkeys(languages, shared)
    parts = {
        part: encode_each({language: lines[language] for language in languages}, own, plan.longest)
        for part, lines in texts.items()
    }
    return Corpus(shared, shared, parts, languages)
