"""The profile's numbers, counted a second time by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewright.data import DataProfile, open_corpus, profile_data
from gatewright.data.overlap import WIDTH
from tests.data.samples import edited, folder_of, prose


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("profile")
    files = {f"{n}.txt": prose(1_000, n) for n in range(40)}
    files |= {"same.txt": files["3.txt"], "near.txt": edited(files["5.txt"], 60), "tiny.txt": "small"}
    folder_of(root / "notes", files)
    # Every document of the second domain ends with the same long line.
    line = "a line that stands at the end of each and every document of this domain, word for word\n"
    records = [json.dumps({"text": prose(600, 100 + n) + line}) for n in range(40)]
    (root / "records.jsonl").write_text("\n".join([*records, "broken"]))
    return root


@pytest.fixture(scope="module")
def profile(root: Path) -> DataProfile:
    return profile_data([root / "notes", root / "records.jsonl"], cache=root / "cache")


def test_counts(profile: DataProfile, root: Path):
    notes, records = profile.domains
    assert (notes.name, records.name) == ("notes", "records")
    assert (notes.documents, records.documents, profile.documents) == (42, 40, 82)
    assert (notes.exact_duplicates, records.exact_duplicates, profile.exact_duplicates) == (1, 0, 1)
    assert (notes.near_duplicates, records.near_duplicates, profile.near_duplicates) == (1, 0, 1)
    assert (profile.near_duplicate_clusters, profile.largest_cluster) == (1, 2)
    size = sum(path.stat().st_size for path in (root / "notes").iterdir() if path.name != "same.txt")
    assert notes.bytes == size == notes.train_bytes + notes.valid_bytes
    assert profile.bytes == notes.bytes + records.bytes == profile.train_bytes + profile.valid_bytes
    assert notes.share + records.share == pytest.approx(1)
    assert notes.share == notes.bytes / profile.bytes
    assert any("1 line skipped (line 41)" in note for note in profile.notes)


def test_lengths(profile: DataProfile):
    notes, records = profile.domains
    assert profile.length_edges == (0, 256, 1_024, 4_096, 16_384, 65_536)
    assert notes.lengths[0] == 1
    assert sum(notes.lengths) == 42
    assert records.lengths == (0, 40, 0, 0, 0, 0)
    assert sum(profile.lengths) == 82


def test_overlap_is_what_sets_of_strings_say(profile: DataProfile, root: Path):
    corpus = open_corpus([root / "notes", root / "records.jsonl"], cache=root / "cache")
    store = corpus.text_store()
    known = set()
    for text in store.texts(corpus.train_documents()):
        known |= {text[i : i + WIDTH] for i in range(len(text) - WIDTH + 1)}
    for domain in profile.domains:
        held = corpus.valid(domain.name)
        texts = [held.text(number) for number in range(held.num_documents)]
        hits = [text[i : i + WIDTH] in known for text in texts for i in range(len(text) - WIDTH + 1)]
        assert domain.overlap == pytest.approx(sum(hits) / len(hits))
    assert profile.domains[0].overlap == 0
    assert profile.domains[1].overlap > 0.02


def test_tokens(root: Path, profile: DataProfile):
    assert profile.tokens == profile.bytes
    assert profile.bytes_per_token == 1
    shorter = profile_data([root / "notes"], cache=root / "cache", tokenizer="bpe:600")
    corpus = open_corpus([root / "notes"], cache=root / "cache", tokenizer="bpe:600")
    store = corpus.text_store()
    tokens = sum(
        len(corpus.tokenizer.encode(text)) for text in store.texts(store.table[:, 3] * 0 + range(42))
    )
    assert shorter.tokens == tokens
    assert shorter.bytes_per_token == pytest.approx(shorter.bytes / tokens)
    assert shorter.bytes_per_token > 1.5


def test_it_is_json_and_readable(profile: DataProfile):
    again = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert again["schema"] == "gatewright.data.v1"
    assert again["domains"][1]["name"] == "records"
    text = profile.to_text()
    assert "notes+records: 82 documents" in text
    assert "exact duplicates: 1, dropped" in text
    assert "near-duplicates: 1 in 1 clusters" in text
    assert max(len(line) for line in text.splitlines()) <= 110
