"""Near-duplicates are found, never parted by the split, and unlike texts are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.data import overlap
from gatewright.data.duplicates import NUM_MINIMA, SHINGLE, clusters, normalise, signature, signatures
from gatewright.data.overlap import WIDTH, shared_shingles
from gatewright.data.split import SMALLEST_DOMAIN, hold_out, training_order
from gatewright.data.store import Source, TextStore, TextWriter
from gatewright.errors import UserError
from tests.data.samples import edited, prose


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def jaccard(one: str, other: str) -> float:
    """The definition, with Python's sets of strings."""

    def shingles(text: str) -> set[str]:
        plain = " ".join(text.lower().split())
        return {plain[i : i + SHINGLE] for i in range(len(plain) - SHINGLE + 1)}

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def store_of(folder: Path, domains: dict[str, list[str]]) -> TextStore:
    """Return a store with its clusters worked out."""
    with TextWriter(folder, lambda line: None) as writer:
        for name, texts in domains.items():
            writer.read(Source(name, (), lambda to, texts=texts: [to.add("", text) for text in texts]))
        store, _ = writer.finish()
    store.table[:, 3] = clusters(signatures(store.raw, store.table[:, :2]))
    return store


@pytest.mark.parametrize("every", [10, 20, 40, 100, 300])
def test_the_estimate_is_near_the_definition(every):
    for seed in range(3):
        one = prose(12_000, seed)
        other = edited(one, every, seed)
        estimate = (signature(as_bytes(one)) == signature(as_bytes(other))).mean()
        # Four standard errors of 128 yes-or-no trials.
        assert abs(estimate - jaccard(one, other)) < 4 * np.sqrt(0.25 / NUM_MINIMA)


def test_pairs_at_seven_tenths_are_joined_and_unlike_texts_are_not(tmp_path):
    originals = [prose(6_000, seed) for seed in range(30)]
    copies = [edited(text, 60, seed) for seed, text in enumerate(originals)]
    assert min(jaccard(a, b) for a, b in zip(originals, copies, strict=True)) > 0.68
    store = store_of(tmp_path, {"all": originals + copies})
    assert store.table[:, 3].tolist() == [*range(30), *range(30)]


def test_a_chain_of_copies_is_one_cluster(tmp_path):
    chain = [prose(8_000)]
    for step in range(6):
        chain.append(edited(chain[-1], 40, step))
    assert jaccard(chain[0], chain[-1]) < 0.3
    assert set(store_of(tmp_path, {"all": [*chain, prose(8_000, 5)]}).table[:, 3]) == {0, 7}


def test_case_and_spacing_do_not_matter():
    text = prose(3_000)
    shouted = "\n\t " + text.upper().replace(" ", "  \n") + "\n"
    assert np.array_equal(signature(as_bytes(text)), signature(as_bytes(shouted)))
    assert normalise(as_bytes("  A \n\tb  c")).tobytes() == b"a b c"


def test_the_estimate_is_unbiased_for_short_texts():
    errors = []
    for seed in range(200):
        one = prose(150, seed)[:150]
        shared = 75 + seed % 60
        other = one[:shared] + prose(150, seed + 9_999)[: 150 - shared]
        estimate = (signature(as_bytes(one)) == signature(as_bytes(other))).mean()
        errors.append(estimate - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 0.06


@pytest.mark.parametrize("text", ["x", "a few words", "just about thirty-two characters"])
def test_short_texts_have_signatures_too(text):
    same = signature(as_bytes(text))
    assert np.array_equal(same, signature(as_bytes(text + " ")))
    assert (same == signature(as_bytes(text + "!"))).mean() < 0.7


def test_many_copies_in_one_bucket_stay_quick_and_together(tmp_path):
    base = prose(3_000)
    store = store_of(tmp_path, {"all": [f"{base} copy {number}" for number in range(600)]})
    assert set(store.table[:, 3]) == {0}


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    with TextWriter(tmp_path, lambda line: None) as writer:
        for name, texts in {"a": ["one", "two", "one\n"], "b": [" two", "three"]}.items():
            writer.read(Source(name, (), lambda to, texts=texts: [to.add("", text) for text in texts]))
        store, dropped = writer.finish()
    assert dropped == [1, 1]
    assert list(store.texts(np.arange(3))) == ["one", "two", "three"]
    assert store.table[:, 2].tolist() == [0, 0, 1]


def test_a_rolled_back_file_leaves_nothing(tmp_path):
    with TextWriter(tmp_path, lambda line: None) as writer:
        writer.domains.append("a")
        writer.add("", "kept")
        mark = writer.size
        writer.add("", "broken off")
        writer.rollback(mark)
        writer.add("", "after")
        store, _ = writer.finish()
    assert list(store.texts(np.arange(2))) == ["kept", "after"]
    assert store.raw.tobytes() == b"keptafter"


def families(seed: int, count: int) -> list[str]:
    """Return texts of which every third has a near copy."""
    texts = [prose(700 + 40 * (number % 7), seed * 1000 + number) for number in range(count)]
    return texts + [edited(text, 80, number) for number, text in enumerate(texts[::3])]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TextStore:
    first, second = families(1, 60), families(2, 40)
    # Near copies across domains: what one holds out, the other must not train on.
    second += [edited(text, 80, 7) for text in first[:20]]
    return store_of(tmp_path_factory.mktemp("store"), {"one": first, "two": second})


@settings(max_examples=60, deadline=None)
@given(valid_bytes=st.integers(1, 12_000), seed=st.integers(-5, 2**40))
def test_the_split_parts_no_cluster_and_shares_out(store, valid_bytes, seed):
    held = hold_out(store, valid_bytes, seed)
    assert np.array_equal(held, hold_out(store, valid_bytes, seed))
    cluster = store.table[:, 3]
    assert not set(cluster[held]) & set(cluster[~held])
    for domain in (0, 1):
        inside = store.table[:, 2] == domain
        total, taken = store.sizes[inside].sum(), store.sizes[inside & held].sum()
        wanted = min(valid_bytes / 2, total * 0.1)
        assert taken >= wanted - 1
        assert taken < total * 0.4
    assert not np.array_equal(hold_out(store, 6_000, 1), hold_out(store, 6_000, 2))


def test_every_prefix_of_training_holds_each_domains_share(store):
    # One domain of full size and one of a quarter, so that the shares are far from equal.
    chosen = np.flatnonzero((store.table[:, 2] == 0) | (np.arange(len(store.table)) % 4 == 0))
    training = training_order(store, chosen, 0)
    assert sorted(training) == chosen.tolist()
    sizes, domain = store.sizes[training], store.table[training, 2]
    share = sizes[domain == 0].sum() / sizes.sum()
    for part in (0.1, 0.25, 0.5):
        end = np.searchsorted(np.cumsum(sizes), part * sizes.sum())
        here = sizes[:end]
        assert abs(here[domain[:end] == 0].sum() / here.sum() - share) < 0.1
    assert not np.array_equal(training, training_order(store, chosen, 1))


def test_one_family_cannot_be_split(tmp_path):
    base = prose(5_000)
    store = store_of(tmp_path, {"same": [f"{base} number {number}" for number in range(9)]})
    with pytest.raises(UserError, match="'same' is 9 documents that are near-duplicates"):
        hold_out(store, 1_000, 0)


def test_too_little_text_is_refused(tmp_path):
    store = store_of(tmp_path, {"tiny": ["some text", "some more of it"]})
    with pytest.raises(UserError, match=f"domain 'tiny' holds 24 bytes .* at least {SMALLEST_DOMAIN}"):
        hold_out(store, 1_000, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_overlap_counts_what_sets_of_strings_count(tmp_path_factory, data):
    scraps = [prose(90, seed) for seed in range(4)]
    document = st.lists(st.sampled_from(scraps), min_size=1, max_size=4).map("".join)
    texts = data.draw(st.lists(document, min_size=2, max_size=6))
    raw = as_bytes("".join(texts))
    ends = np.cumsum([len(text) for text in texts])
    spans = np.stack([ends - [len(text) for text in texts], ends], axis=1)
    held, training = spans[::2][::-1], spans[1::2]
    places, found = shared_shingles(raw, held, training)
    known = {text[i : i + WIDTH] for text in texts[1::2] for i in range(len(text) - WIDTH + 1)}
    expected = [text[i : i + WIDTH] in known for text in texts[::2] for i in range(len(text) - WIDTH + 1)]
    assert found.tolist() == expected
    assert len(places) == len(expected)


def test_overlap_is_exact_even_when_hashes_collide(monkeypatch):
    real = overlap.shingle_hashes
    monkeypatch.setattr(overlap, "shingle_hashes", lambda data, width: real(data, width) % np.uint64(2))
    raw = as_bytes(prose(100, 1)[:100] + prose(100, 2)[:100])
    spans = np.array([[0, 100], [100, 200]])
    _, found = overlap.shared_shingles(raw, spans[:1], spans[1:])
    assert len(found) == 37
    assert not found.any()
