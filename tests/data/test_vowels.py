"""The vowels of 1952: the table is whole, and equal to the copy that a phonetics package carries."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gatewright.data.vowels import VOWELS, peterson_barney

CODES = {"iy": "i", "ih": "I", "aa": "a", "ah": "^"}


def test_every_speaker_said_every_vowel_twice():
    vowels = peterson_barney()
    assert vowels.formants.shape == (608, 2)
    said = np.zeros((76, 4), dtype=int)
    np.add.at(said, (vowels.speaker - 1, vowels.vowel), 1)
    assert (said == 2).all()
    kinds = vowels.kind[:: 4 * 2]
    assert [int((kinds == kind).sum()) for kind in "mwc"] == [33, 28, 15]


def test_the_numbers_are_those_that_were_written_down():
    vowels = peterson_barney()
    digest = hashlib.sha256(vowels.formants.astype("<i4").tobytes()).hexdigest()
    assert digest == "4b3aa12503fc7fb5794dbed6365b1a302ab2c7cd1776f0eb11b226b00e353074"
    # Mean F1 and F2 of the classes, Hz.
    means = [vowels.formants[vowels.vowel == i].mean(0).round().tolist() for i in range(len(VOWELS))]
    assert means == [[301, 2648], [438, 2318], [834, 1199], [722, 1351]]


def test_speakers_are_kept_apart():
    vowels = peterson_barney()
    train, test = vowels.of_speakers(range(1, 51)), vowels.of_speakers(range(51, 76))
    assert (len(train.vowel), len(test.vowel)) == (400, 200)
    assert set(train.speaker) == set(range(1, 51))
    assert set(test.speaker) == set(range(51, 76))
    assert np.array_equal(np.concatenate([train.formants, test.formants]), vowels.formants[:600])


def test_the_table_is_that_of_praat():
    praat = pytest.importorskip("parselmouth.praat", reason="praat-parselmouth is not installed")
    made = praat.call("Create formant table (Peterson & Barney 1952)")
    names, *rows = [line.split("\t") for line in praat.call(made, "List", False).strip().split("\n")]
    told = [dict(zip(names, row, strict=True)) for row in rows]
    theirs = sorted(
        (int(row["Speaker"]), VOWELS.index(CODES[row["Vowel"]]), place, row["Type"], row["F1"], row["F2"])
        for place, row in enumerate(told)
        if row["Vowel"] in CODES
    )
    vowels = peterson_barney()
    ours = zip(vowels.speaker, vowels.vowel, vowels.kind, vowels.formants, strict=True)
    assert [(s, v, k, float(f1), float(f2)) for s, v, _, k, f1, f2 in theirs] == [
        (s, v, k, f1, f2) for s, v, k, (f1, f2) in ours
    ]
