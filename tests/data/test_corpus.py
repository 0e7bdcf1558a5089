"""From paths to a corpus: what is trained on, what is held out; the same call gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gatewright.data import Corpus, open_corpus
from gatewright.errors import UserError
from tests.data.samples import edited, folder_of, prose


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    folder_of(root / "small", {f"{n}.txt": prose(900 + 100 * (n % 5), n) for n in range(60)})
    # Every fourth file has a near copy under another name.
    folder_of(root / "small", {f"copy{n}.txt": edited(prose(1_000, n), 50, n) for n in range(0, 60, 4)})
    (root / "book.txt").write_text(prose(120_000, 99), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(texts: Path, cache: Path) -> Corpus:
    return open_corpus([texts / "small", texts / "book.txt"], cache=cache, valid_bytes=8_000)


def training_texts(corpus: Corpus) -> list[str]:
    """Return the training documents as the tokens give them."""
    tokens = np.load(corpus.folder / "train.npy").astype(np.int64)
    ends = corpus.train_ends()
    return [corpus.tokenizer.decode(tokens[a : b - 1]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_domains_and_sizes(corpus: Corpus, texts: Path):
    assert corpus.name == "small+book"
    assert corpus.domains == ("small", "book")
    size = {"small": sum(path.stat().st_size for path in (texts / "small").iterdir())}
    size["book"] = (texts / "book.txt").stat().st_size
    for domain in corpus.domains:
        assert corpus.train_domain_bytes[domain] + corpus.valid_domain_bytes[domain] == size[domain]
        assert 4_000 <= corpus.valid_domain_bytes[domain] <= 8_000
    assert corpus.train_bytes + corpus.valid_bytes == sum(size.values())
    assert corpus.skipped == ()
    assert "small+book" in repr(corpus)


def test_every_document_is_on_exactly_one_side(corpus: Corpus):
    store = corpus.text_store()
    held = [
        corpus.valid(domain).text(n)
        for domain in corpus.domains
        for n in range(corpus.valid(domain).num_documents)
    ]
    every = list(store.texts(np.arange(len(store.table))))
    assert sorted(training_texts(corpus) + held) == sorted(every)
    assert "".join(sorted(store.names)).count("book.txt") > 10, "a single file is cut into documents"


def test_copies_are_on_the_side_of_their_originals(corpus: Corpus):
    store = corpus.text_store()
    training = {store.names[number].split("#")[0] for number in corpus.train_documents()}
    for number in range(0, 60, 4):
        assert (f"{number}.txt" in training) == (f"copy{number}.txt" in training)
    assert corpus.counts["near_duplicates"] == 15


def test_valid_sets(corpus: Corpus):
    for domain in corpus.domains:
        held = corpus.valid(domain)
        eot = corpus.tokenizer.eot
        assert held.tokens.dtype == np.int64
        assert held.tokens[0] == held.tokens[-1] == eot
        assert (held.tokens == eot).sum() == held.num_documents + 1
        assert held.num_bytes == sum(len(held.text(n).encode()) for n in range(held.num_documents))
        assert len(held.tokens) == held.num_bytes + held.num_documents + 1
        for number in range(held.num_documents):
            assert corpus.tokenizer.decode(held.document(number)) == held.text(number)
    with pytest.raises(
        UserError, match=r"domain 'bok' was given; this corpus has small, book; did you mean 'book'"
    ):
        corpus.valid("bok")


def test_the_stream_reads_the_training_documents(corpus: Corpus):
    stream = corpus.stream(4, 100)
    tokens = np.load(corpus.folder / "train.npy")
    assert (
        stream.num_tokens
        == corpus.train_tokens
        == len(tokens)
        == corpus.train_bytes + len(corpus.train_ends())
    )
    row = stream.batch(5)[2]
    assert np.array_equal(row, tokens[stream.windows(5)[2] * 100 :][:101])
    assert set(np.unique(tokens[corpus.train_ends() - 1])) == {corpus.tokenizer.eot}


def test_a_fraction_is_part_of_a_larger_one(corpus: Corpus):
    sizes = {}
    for fraction in (0.01, 0.1, 0.5, 1.0):
        stream = corpus.stream(2, 20, fraction=fraction, seed=3)
        sizes[fraction] = stream.num_tokens
        assert stream.num_tokens in corpus.train_ends(), "a fraction ends with a whole document"
        assert fraction * corpus.train_tokens <= stream.num_tokens
    assert sizes[0.01] < sizes[0.1] < sizes[0.5] < sizes[1.0] == corpus.train_tokens
    assert sizes[0.1] < 0.15 * corpus.train_tokens
    tokens = np.load(corpus.folder / "train.npy")
    tenth = corpus.stream(1, 20, fraction=0.1)
    for index in range(tenth.num_windows):
        start = int(tenth.windows(index)[0]) * 20
        assert np.array_equal(tenth.batch(index)[0], tokens[start : start + 21])


@pytest.mark.parametrize("fraction", [0.0, -1, 1.01, float("nan")])
def test_wrong_fractions(corpus: Corpus, fraction: float):
    with pytest.raises(UserError, match="more than 0 and at most 1"):
        corpus.stream(1, 10, fraction=fraction)


def test_too_little_for_the_context(corpus: Corpus):
    with pytest.raises(UserError, match="less than one window of 10001; give more text"):
        corpus.stream(1, 10_000, fraction=1e-6)


def test_the_second_opening_reads_the_cache(corpus: Corpus, texts: Path, cache: Path):
    lines: list[str] = []
    paths = [texts / "small", texts / "book.txt"]
    again = open_corpus(paths, cache=cache, valid_bytes=8_000, progress=lines.append)
    assert lines == []
    assert again.fingerprint == corpus.fingerprint
    assert again.folder == corpus.folder


def test_another_cache_gives_the_same_bytes(corpus: Corpus, texts: Path, tmp_path: Path):
    lines: list[str] = []
    paths = [str(texts / "small"), str(texts / "book.txt")]
    again = open_corpus(paths, cache=tmp_path, valid_bytes=8_000, progress=lines.append)
    assert again.fingerprint == corpus.fingerprint
    assert again.folder != corpus.folder
    assert any("read book" in line for line in lines)
    assert any("near-duplicates" in line for line in lines)


def test_what_changes_the_corpus(corpus: Corpus, texts: Path, cache: Path):
    paths = [texts / "small", texts / "book.txt"]
    for change in ({"seed": 1}, {"valid_bytes": 16_000}, {"tokenizer": "bpe:300"}):
        arguments = {"valid_bytes": 8_000, **change}
        other = open_corpus(paths, cache=cache, **arguments)
        assert other.fingerprint != corpus.fingerprint, change
        assert other.folder != corpus.folder


def test_a_changed_file_is_read_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text(prose(30_000, 1))
    before = open_corpus([path], cache=tmp_path / "cache")
    path.write_text(prose(30_000, 2))
    after = open_corpus([path], cache=tmp_path / "cache")
    assert after.fingerprint != before.fingerprint
    assert not set(training_texts(before)) & set(training_texts(after))


def test_bpe_is_trained_on_the_training_split_alone(tmp_path: Path):
    # Each file repeats a word of its own, so the words that became ids tell what the trainer saw.
    names = {
        f"{n}.txt": f"word{chr(97 + n % 26)}{chr(97 + n // 26)}zq " * 80 + prose(700, n) for n in range(40)
    }
    folder = folder_of(tmp_path / "docs", names)
    corpus = open_corpus([folder], tokenizer="bpe:900", cache=tmp_path / "cache", valid_bytes=3_000)
    known = set(corpus.tokenizer.pieces(np.arange(corpus.tokenizer.vocab_size)))
    held = [corpus.valid("docs").text(n).split()[0] for n in range(corpus.valid("docs").num_documents)]
    trained = [text.split()[0] for text in training_texts(corpus)]
    assert held
    assert any(f" {word}" in known for word in trained)
    assert not any(f" {word}" in known for word in held)


def test_a_tokenizer_file(tmp_path: Path, texts: Path, cache: Path, corpus: Corpus):
    first = open_corpus([texts / "book.txt"], tokenizer="bpe:400", cache=cache)
    first.tokenizer.save(tmp_path / "tokenizer.json")
    other = open_corpus([texts / "small"], tokenizer=str(tmp_path / "tokenizer.json"), cache=cache)
    assert other.tokenizer.vocab_size == first.tokenizer.vocab_size
    held = other.valid("small")
    assert other.tokenizer.decode(held.document(0)) == held.text(0)
    assert len(held.tokens) < held.num_bytes
    with pytest.raises(UserError, match="neither a file nor a known name"):
        open_corpus([texts / "small"], tokenizer=str(tmp_path / "none.json"), cache=cache)


def test_a_single_small_file_is_split(tmp_path: Path):
    (tmp_path / "a.txt").write_text(prose(9_000))
    lines: list[str] = []
    corpus = open_corpus([tmp_path / "a.txt"], cache=tmp_path / "cache", progress=lines.append)
    assert corpus.valid_bytes >= 500
    assert corpus.train_bytes >= 6_000
    assert any("domain a is small" in line for line in lines)


def test_refusals(tmp_path: Path, cache: Path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="'short' holds 9 bytes of text"):
        open_corpus([tmp_path / "short.txt"], cache=cache)
    with pytest.raises(UserError, match="valid_bytes 0 was given; it is at least 1"):
        open_corpus([tmp_path / "short.txt"], cache=cache, valid_bytes=0)
    folder_of(tmp_path, {"a/x.txt": prose(9_000, 1), "b/x.txt": prose(9_000, 1)})
    with pytest.raises(UserError, match="'b' holds 0 bytes of text that no earlier domain holds"):
        open_corpus([tmp_path / "a", tmp_path / "b"], cache=cache)
    assert not list((cache / "tokens").glob(".building-*"))
