"""What the deep mixtures of 2013 are trained on: shifted digits, and vowels as rows of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatewright.data.dutch_vowels import pols_van_nierop
from gatewright.data.images import PLACES, Pictures, digits, mnist

Batch = tuple[Tensor, Tensor]
# Of the training cases, at most so many are looked at again for the training error.
CHECKED = 10_000
_ROWS = 2_000


class Cases(Protocol):
    """Cases to learn from and to be judged by."""

    @property
    def width(self) -> int:
        """D, numbers per case."""

    @property
    def num_classes(self) -> int:
        """C, classes."""

    def __len__(self) -> int:
        """How many there are to learn from."""

    def batch(self, which: NDArray[np.int64], draw: np.random.Generator) -> Batch:
        """Return training cases [k, D] and their classes [k]."""

    def checks(self, part: str) -> Iterator[Batch]:
        """Yield the cases of "train" or "test", the same in each call."""


class Shifted:
    """Pictures on a larger canvas: drawn places in training, one fixed place per picture in both checks."""

    num_classes = 10

    def __init__(self, train: Pictures, test: Pictures) -> None:
        self.train, self.test = train, test

    @property
    def width(self) -> int:
        """Return the pixels of the canvas."""
        return self.train.width

    def __len__(self) -> int:
        return len(self.train)

    def batch(self, which: NDArray[np.int64], draw: np.random.Generator) -> Batch:
        """Return these training pictures, each at a place drawn evenly from the 81."""
        place = draw.integers(0, PLACES, len(which))
        return torch.from_numpy(self.train.shifted(which, place)), torch.from_numpy(self.train.label[which])

    def checks(self, part: str) -> Iterator[Batch]:
        """Yield pictures at the place that each keeps for ever."""
        pictures = self.test if part == "test" else self.train
        count = min(len(pictures), CHECKED)
        place = np.random.default_rng((4, part == "test")).integers(0, PLACES, count)
        for start in range(0, count, _ROWS):
            which = np.arange(start, min(start + _ROWS, count))
            yield (
                torch.from_numpy(pictures.shifted(which, place[which])),
                torch.from_numpy(pictures.label[which]),
            )


class Spoken:
    """Dutch vowels, measures in units of the training cases' spread; each third speaker is held out."""

    def __init__(self) -> None:
        vowels = pols_van_nierop()
        test = vowels.speaker % 3 == 0
        x = vowels.measured
        x = (x - x[~test].mean(0)) / x[~test].std(0)
        self._parts = {
            name: (torch.from_numpy(x[own].astype(np.float32)), torch.from_numpy(vowels.vowel[own]))
            for name, own in (("train", ~test), ("test", test))
        }
        self.width, self.num_classes = x.shape[1], int(vowels.vowel.max()) + 1

    def __len__(self) -> int:
        return len(self._parts["train"][1])

    def batch(self, which: NDArray[np.int64], draw: np.random.Generator) -> Batch:
        """Return these training cases as they are."""
        x, label = self._parts["train"]
        return x[which], label[which]

    def checks(self, part: str) -> Iterator[Batch]:
        """Yield all cases of a part at once."""
        yield self._parts[part]


@cache
def cases_of(name: str) -> Cases:
    """Return "digits" (small), "mnist" or "vowels"."""
    if name == "vowels":
        return Spoken()
    return Shifted(*(mnist() if name == "mnist" else digits()))
