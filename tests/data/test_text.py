"""Long texts are cut without losing a character, at places that a shifted copy shares."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewright.data.text import LARGEST_PIECE, SMALLEST_PIECE, cut, piece_size
from tests.data.samples import prose

SCRAPS = st.lists(st.text(st.sampled_from("ab \n\té"), max_size=40), max_size=30)


@settings(deadline=None, max_examples=100)
@given(blocks=SCRAPS, longest=st.integers(4, 60))
def test_the_pieces_are_the_text(blocks, longest):
    pieces = list(cut(blocks, longest))
    assert "".join(pieces) == "".join(blocks)
    assert all(len(piece) <= longest for piece in pieces)
    assert all(len(piece) >= longest // 4 for piece in pieces[:-1])


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab \n"), max_size=300), size=st.integers(1, 50))
def test_blocks_do_not_matter(text, size):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(cut(blocks, 40)) == list(cut([text], 40))


def test_a_short_text_is_one_document():
    assert list(cut(["one\n\n", "two"], 100)) == ["one\n\ntwo"]
    assert list(cut([], 100)) == []


def test_cuts_come_before_paragraphs():
    pieces = list(cut([prose(50_000)], 4_000))
    assert len(pieces) > 10
    assert all(piece.endswith("\n\n") and piece[0].isupper() for piece in pieces[:-1])


def test_code_is_cut_at_the_margin():
    body = "".join(f"def f{i}():\n    x = {i}\n\n    return x\n\n\n" for i in range(200))
    assert all(piece.startswith("def ") for piece in cut([body], 1_000))


def test_a_copy_with_a_changed_beginning_is_cut_at_the_same_places():
    text = prose(200_000)
    one, other = set(cut([text], 8_000)), set(cut([prose(5_000, seed=9) + text], 8_000))
    assert len(one & other) > 0.7 * len(one)


@pytest.mark.parametrize("unit", ["\n", "a", " ", "\n\n \n", "é"])
def test_monotonous_text_takes_linear_time(unit):
    text = unit * (4_000_000 // len(unit))
    began = time.process_time()
    assert "".join(cut([text])) == text
    assert time.process_time() - began < 10


def test_small_domains_are_cut_finer():
    assert piece_size(1_000) == SMALLEST_PIECE
    assert piece_size(160_000) == 10_000
    assert piece_size(10**9) == LARGEST_PIECE
