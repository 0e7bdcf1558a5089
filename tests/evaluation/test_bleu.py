"""BLEU by hand, with its sides told apart."""

from __future__ import annotations

import math

import pytest

from gatewright.errors import UserError
from gatewright.evaluation.bleu import bleu


def test_bleu_by_hand():
    short, long = "a b c d e", "a b c d e f g"
    # All n-grams of 5 words are in the reference of 7: the brevity penalty alone, exp(1 - 7 / 5).
    assert bleu([short], [long]).score == pytest.approx(100 * math.exp(1 - 7 / 5))
    # The other way 5 of 7, 4 of 6, 3 of 5, 2 of 4 n-grams are right, and nothing is too short.
    assert bleu([long], [short]).score == pytest.approx(100 * (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    both = bleu([short, short], [short, short])
    assert both.score == pytest.approx(100)
    assert "tok:13a" in both.signature


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(UserError, match="1 translations for 2 references; allowed: one each"):
        bleu(["a"], ["a", "b"])
