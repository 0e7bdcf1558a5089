"""Many pairs of languages: no text on two sides, tags of the wanted language, batches by their index."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.data import ByteTokenizer
from gatewright.data.hashing import permutation
from gatewright.data.translations import (
    PARTS,
    Ends,
    Translations,
    cut_lines,
    encode_each,
    encode_lines,
    first_pairs,
    split_lines,
)
from gatewright.errors import UserError

END = 259
ENDS = Ends({"en": 257, "xx": 258}, END)
DIRECTIONS = (("xx", "en"), ("en", "xx"))
TEXTS = {
    "en": ["abcdefghij"[: 1 + i % 9] + str(i) for i in range(100)],
    "xx": ["ZYXWV"[: 1 + i % 4] + str(i) for i in range(100)],
}


def stream(batch_size: int = 4, count: int = 100, **changes: int) -> Translations:
    numbers = np.arange(count)
    ids = encode_lines(TEXTS, numbers, ByteTokenizer(), 20)
    return Translations(ids, DIRECTIONS, ENDS, batch_size=batch_size, **changes)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60), st.integers(0, 5)
)
def test_no_text_of_any_language_stands_in_two_parts(lines: list[tuple[int, int]], seed: int):
    texts = {"a": [str(a) for a, _ in lines], "b": [str(b) for _, b in lines]}
    found = split_lines(texts, seed, 0.2)
    assert sorted(np.concatenate([found[part] for part in PARTS]).tolist()) == list(range(len(lines)))
    for own in texts.values():
        sides = [{own[i] for i in found[part]} for part in PARTS]
        assert sum(map(len, sides)) == len(set().union(*sides))


def test_lines_that_are_equal_in_either_language_stand_together():
    # Equal in a every 20th, in b every 15th: so the lines i, i + 5, i + 10, ... are one.
    texts = {"a": [f"a{i % 20}" for i in range(60)], "b": [f"b{i % 15}" for i in range(60)]}
    for seed in range(5):
        found = split_lines(texts, seed, 0.3)
        assert sum(len({i % 5 for i in found[part].tolist()}) for part in PARTS) == 5
        assert all(len(own) % 12 == 0 for own in found.values())


def test_parts_have_their_shares_and_follow_from_the_seed():
    texts = {"a": [str(i) for i in range(1000)], "b": [f"b{i}" for i in range(1000)]}
    one, same, other = (split_lines(texts, seed, 0.1) for seed in (0, 0, 1))
    assert {part: len(own) for part, own in one.items()} == {"train": 800, "dev": 100, "test": 100}
    assert all(np.array_equal(one[part], same[part]) for part in PARTS)
    assert not np.array_equal(one["test"], other["test"])


def test_a_source_asks_for_its_targets_language():
    batch = stream(batch_size=2, count=1).batch(0)
    # "a0" and "Z0": into English (257) stands first.
    order = np.argsort(batch.language)
    assert batch.source[order].tolist() == [[257, 90, 48, END], [258, 97, 48, END]]
    assert batch.labels[order].tolist() == [[97, 48, END], [90, 48, END]]
    assert batch.target[order].tolist() == [[END, 97, 48], [END, 90, 48]]
    assert batch.target_mask.all()


def test_an_epoch_has_every_pair_at_most_once_and_a_batch_follows_from_its_index():
    one = stream(batch_size=6)
    assert one.batches == 33
    batches = [one.batch(i) for i in range(33)]
    rows = [tuple(row[mask]) for b in batches for row, mask in zip(b.source, b.source_mask, strict=True)]
    assert len(rows) == len(set(rows)) == 198
    again = stream(batch_size=6).batch(7)
    assert all(
        np.array_equal(getattr(again, f.name), getattr(batches[7], f.name)) for f in dataclasses.fields(again)
    )
    assert any(not np.array_equal(one.batch(33).source, b.source) for b in batches)
    # Of like length: less padding than in batches of any pairs.
    mixed = permutation(200, 5)[:198]
    lengths = np.array([len(source) for _, source, _ in one.pairs])[mixed].reshape(33, 6)
    plain = lengths.sum() / (6 * lengths.max(1).sum())
    filled = sum(b.source_mask.sum() for b in batches) / sum(b.source_mask.size for b in batches)
    assert filled > plain + 0.05


def test_lines_of_one_direction_come_in_order():
    found = stream(batch_size=40).in_order(1)
    assert [len(b.source) for b in found] == [40, 40, 20]
    texts = [
        ByteTokenizer().decode(row[mask][:-1])
        for b in found
        for row, mask in zip(b.labels, b.target_mask, strict=True)
    ]
    assert texts == TEXTS["xx"]


def test_a_line_counts_where_it_is_short_enough_in_every_language():
    texts = {"en": ["ab", "abcd", "a", ""], "xx": ["a", "b", "abcde", "a"]}
    found = encode_lines(texts, np.arange(4), ByteTokenizer(), 3)
    assert {language: [ids.tolist() for ids in own] for language, own in found.items()} == {
        "en": [[97, 98]],
        "xx": [[97]],
    }


def test_lines_that_are_equal_in_two_languages_stand_together_where_asked_for():
    # Line i of b is line i + 1 of a, so all of them hang together.
    texts = {"a": [str(i) for i in range(40)], "b": [str(i + 1) for i in range(40)]}
    found = [split_lines(texts, 0, 0.2, across=across) for across in (False, True)]
    assert [sorted(len(own) for own in parts.values()) for parts in found] == [[8, 8, 24], [0, 0, 40]]


def test_lines_that_are_missing_do_not_belong_together():
    texts = {"a": [f"a{i}" for i in range(40)], "b": [""] * 40}
    found = split_lines(texts, 0, 0.25)
    assert {part: len(own) for part, own in found.items()} == {"train": 20, "dev": 10, "test": 10}


def test_a_missing_line_is_no_pair_and_a_source_may_end_with_its_own_id():
    own = encode_each(
        {"en": ["a", "b", "", "abcd"], "xx": ["A", "", "C", "D"]},
        {"en": ByteTokenizer(), "xx": ByteTokenizer()},
        longest=3,
    )
    assert [len(ids) for ids in own["en"]] == [1, 1, 0, 0]  # the last is too long
    one = Translations(own, (("xx", "en"),), Ends({"en": 257}, END, source_end=300), batch_size=1)
    ((_, source, labels),) = one.pairs
    assert source.tolist() == [257, 65, 300]
    assert labels.tolist() == [97, END]
    assert [ids.tolist() for ids in first_pairs(own, ("en", "xx"), 5)["xx"]] == [[65]]
    many = encode_each(
        {"en": ["a"] * 4, "xx": list("ABCD")}, {"en": ByteTokenizer(), "xx": ByteTokenizer()}, 3
    )
    assert [ids.tolist() for ids in first_pairs(many, ("xx", "en"), 2)["xx"]] == [[65], [66]]


def test_a_cut_leaves_a_share_of_one_languages_pairs():
    texts = {"en": [f"e{i}" if i % 2 else "" for i in range(400)], "xx": [f"x{i}" for i in range(400)]}
    texts["yy"] = [f"y{i}" for i in range(400)]
    cut = cut_lines(texts, "xx", "en", 0.05, 0)
    left = [i for i, line in enumerate(cut["xx"]) if line]
    assert len(left) == 10  # 5 % of the 200 that English has too
    assert all(i % 2 and cut["xx"][i] == f"x{i}" for i in left)
    assert max(left) > 200 > min(left)  # not the first ones
    assert cut["en"] == texts["en"]
    assert cut["yy"] == texts["yy"]
    with pytest.raises(UserError, match=r"share 0; allowed: above 0, up to 1"):
        cut_lines(texts, "xx", "en", 0, 0)


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"allowed: as many of each, a share below 0.5"):
        split_lines({"a": ["x"], "b": []}, 0, 0.1)
    with pytest.raises(UserError, match=r"allowed: as many of each, a share below 0.5"):
        split_lines({"a": ["x"]}, 0, 0.5)
    with pytest.raises(UserError, match="batch_size 201; allowed: 1 to 200"):
        stream(batch_size=201)
