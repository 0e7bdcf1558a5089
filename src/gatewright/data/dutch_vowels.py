"""Twelve Dutch vowels of men and women: three formants and their levels, read from a phonetics package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gatewright.data.images import INSTALL
from gatewright.errors import UserError

COLUMNS = ("F1", "F2", "F3", "L1", "L2", "L3")
"""Formants in Hz and their levels in dB."""


@dataclass(frozen=True)
class DutchVowels:
    """n spoken vowels: `measured` [n, 6] as COLUMNS, `vowel` [n] from 0 to 11, `speaker` [n] from 1."""

    measured: NDArray[np.float64]
    vowel: NDArray[np.int64]
    speaker: NDArray[np.int64]

    def of_speakers(self, speakers: Iterable[int]) -> DutchVowels:
        """Return what these speakers said, in the order of the table."""
        own = np.isin(self.speaker, list(speakers))
        return DutchVowels(self.measured[own], self.vowel[own], self.speaker[own])


def pols_van_nierop() -> DutchVowels:
    """Return all 900 vowels of 75 speakers, 12 each; vowels are numbered by their names' order.

    Pols, Tromp and Plomp (1973), men, and Van Nierop, Pols and Plomp (1973), women, as Praat makes the
    table.
    Raises: UserError where praat-parselmouth is not installed.
    """
    try:
        from parselmouth import praat
    except ImportError:
        raise UserError(
            "the Dutch vowels are read from praat-parselmouth, which is not installed; allowed: "
            f"praat-parselmouth; {INSTALL}"
        ) from None
    made = praat.call("Create formant table (Pols & Van Nierop 1973)")
    names, *rows = [line.split("\t") for line in praat.call(made, "List", False).strip().split("\n")]
    told = [dict(zip(names, row, strict=True)) for row in rows]
    vowels = sorted({row["Vowel"] for row in told})
    return DutchVowels(
        measured=np.array([[float(row[name]) for name in COLUMNS] for row in told]),
        vowel=np.array([vowels.index(row["Vowel"]) for row in told]),
        speaker=np.array([int(row["Speaker"]) for row in told]),
    )
