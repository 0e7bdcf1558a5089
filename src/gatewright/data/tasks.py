"""Small real tasks, a text and its label, split by document: what a trained model is fine-tuned on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from gatewright.data.hashing import digest
from gatewright.errors import UserError, did_you_mean

PARTS = ("train", "dev", "test")
SIZES = {"train": 1920, "dev": 240, "test": 960}
"""Examples of a part, as even over the labels as the text allows."""
_SHARES = {"dev": 0.15, "test": 0.3}


class Example(NamedTuple):
    """A text, the place of its label in the task's labels, and the document that it is from."""

    text: str
    label: int
    document: str


class Passage(NamedTuple):
    """What a reader yields: a text with its label; `part` is a part that it must stand in ("" is any), and a
    text of several `documents` is used only where all of them are in one part.
    """

    label: str
    documents: tuple[str, ...]
    text: str
    part: str = ""


@dataclass(frozen=True)
class Task:
    """A task's labels and the examples of each of PARTS."""

    name: str
    labels: tuple[str, ...]
    parts: Mapping[str, tuple[Example, ...]]

    @cached_property
    def fingerprint(self) -> str:
        """A checksum over labels and examples."""
        rows = (f"{part}/{one.label}/{one.text}" for part in PARTS for one in self.parts[part])
        return digest([self.name, *self.labels, *rows])


class TaskInfo(NamedTuple):
    """`about` in a line; `read` yields passages, fetching what it reads."""

    about: str
    labels: tuple[str, ...]
    read: Callable[[Path | None, Callable[[str], None]], Iterator[Passage]]


def _rank(text: str) -> float:
    """Return a number from 0 up to 1 that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def part_of(document: str) -> str:
    """Return the part of a document, by its name alone: 15 % dev, 30 % test, the rest train."""
    place = _rank(f"part {document}")
    if place < _SHARES["dev"]:
        return "dev"
    return "test" if place < _SHARES["dev"] + _SHARES["test"] else "train"


def make_task(
    name: str, labels: tuple[str, ...], passages: Iterable[Passage], sizes: Mapping[str, int] = SIZES
) -> Task:
    """Return the task of these passages: each document in one part, each text in one part and once.

    A part takes as many of each label, in an order that looks random. Raises: UserError where a label is
    missing in a part.
    """
    found: dict[tuple[str, int], list[Example]] = {}
    owner: dict[str, str] = {}
    for passage in passages:
        parts = {passage.part or part_of(document) for document in passage.documents}
        text = " ".join(passage.text.split())
        part = parts.pop()
        # The first part that holds a text keeps it: equal texts of other documents are not asked again.
        if parts or owner.setdefault(text, part) != part:
            continue
        number = labels.index(passage.label)
        found.setdefault((part, number), []).append(Example(text, number, " ".join(passage.documents)))
    made: dict[str, tuple[Example, ...]] = {}
    for part in PARTS:
        chosen: list[Example] = []
        for place, label in enumerate(labels):
            own = {example.text: example for example in found.get((part, place), [])}
            if not own:
                raise UserError(f"task {name} has no {part} text of {label!r}; allowed: one or more of each")
            ordered = sorted(own.values(), key=lambda one: _rank(f"{one.document} {one.text}"))
            chosen += ordered[: sizes[part] // len(labels)]
        made[part] = tuple(sorted(chosen, key=lambda one: _rank(f"order {one.text}")))
    return Task(name, labels, made)


def pieces(text: str, most: int, rest: bool = False) -> Iterator[str]:
    """Yield the text in pieces of at most `most` UTF-8 bytes, cut at spaces, longer words left out; the last,
    short, only with `rest`.
    """
    words: list[str] = []
    size = 0
    for word in text.split():
        own = len(word.encode())
        if words and size + 1 + own > most:
            yield " ".join(words)
            words, size = [], 0
        if own <= most:
            size += own + (1 if words else 0)
            words.append(word)
    if rest and words:
        yield " ".join(words)


def open_task(name: str, *, cache: Path | None = None, progress: Callable[[str], None] = print) -> Task:
    """Return one of `tasks()` by name, its text fetched on the first call and cached after it.

    Raises: UserError for an unknown name, and where a package is missing; RunFailure where it cannot fetch.
    """
    known = tasks()
    if name not in known:
        raise UserError(f"task {name!r} is unknown{did_you_mean(name, known)}; allowed: {', '.join(known)}")
    info = known[name]
    return make_task(name, info.labels, info.read(cache, progress))


def tasks() -> dict[str, TaskInfo]:
    """Return every task by name."""
    from gatewright.data.task_texts import TASKS

    return TASKS
