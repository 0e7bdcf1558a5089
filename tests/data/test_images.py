"""Digits: what is in them, where a shift puts them, and how MNIST comes and is checked."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gatewright.data import images
from gatewright.data.dutch_vowels import pols_van_nierop
from gatewright.data.images import PLACES, Pictures, digits, mnist
from gatewright.data.npm import npm_files
from gatewright.data.sources import package_folder
from gatewright.errors import RunFailure, UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_place_is_rows_down_and_columns_to_the_right():
    pictures = Pictures(np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2), np.array([3, 7]))
    assert (pictures.width, len(pictures)) == (100, 2)
    # Place 0 is the upper left corner, 80 the lower right one, 9 * 2 + 5 is two down and five to the right.
    moved = pictures.shifted(np.array([0, 1, 1]), np.array([0, 80, 23])).reshape(3, 10, 10)
    for canvas, (top, left), own in zip(
        moved, ((0, 0), (8, 8), (2, 5)), pictures.pixels[[0, 1, 1]], strict=True
    ):
        assert np.array_equal(canvas[top : top + 2, left : left + 2], own)
        assert canvas.sum() == own.sum()


@pytest.mark.skipif(package_folder("sklearn") is None, reason="scikit-learn is not installed")
def test_the_small_digits_are_the_whole_set_once():
    train, test = digits()
    assert (len(train), len(test), train.width) == (1500, 297, 256)
    both = np.concatenate([train.pixels, test.pixels])
    label = np.concatenate([train.label, test.label])
    assert np.bincount(label).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (both.min(), both.max()) == (0, 1)
    assert float((16 * both.astype(np.float64)).sum()) == 561718
    assert len(np.unique(both.reshape(1797, -1), axis=0)) == 1797
    again = digits()[0]
    assert np.array_equal(again.label, train.label)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "package_folder", lambda _: None)
    with pytest.raises(
        UserError, match=r"scikit-learn, which is not installed; allowed: .*requirements/cases.txt"
    ):
        digits()
    monkeypatch.setitem(sys.modules, "parselmouth", None)
    with pytest.raises(UserError, match=r"praat-parselmouth, which is not installed"):
        pols_van_nierop()
    pins = [line.split()[0] for line in (ROOT / "requirements/cases.txt").read_text().splitlines()[1:]]
    extras = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{pin}"' in extras for pin in pins)


def test_the_dutch_vowels_are_whole():
    pytest.importorskip("parselmouth.praat", reason="praat-parselmouth is not installed")
    vowels = pols_van_nierop()
    assert vowels.measured.shape == (900, 6)
    said = np.zeros((75, 12), dtype=int)
    np.add.at(said, (vowels.speaker - 1, vowels.vowel), 1)
    assert (said == 1).all()
    f1, f2, f3 = vowels.measured[:, :3].mean(0)
    assert 300 < f1 < f2 < f3 < 3500
    one = vowels.of_speakers([75])
    assert (set(one.speaker), len(one.vowel)) == ({75}, 12)


def idx(array: np.ndarray) -> bytes:
    """Return an array as an idx file of bytes."""
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def fake_npm(folder: Path, files: dict[str, bytes], code: int = 0) -> None:
    """Put an npm into `folder` that packs these files, or fails."""
    folder.mkdir()
    with tarfile.open(folder / "packed.tar", "w:gz") as packed:
        for name, content in files.items():
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(content)
            packed.addfile(about, io.BytesIO(content))
    script = f'#!/bin/sh\necho "$@" >> {folder}/asked\necho nothing there >&2\n'
    script += f"cp {folder}/packed.tar a.tgz\nexit {code}\n"
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)


PACKED = {"data/a": b"first", "data/b": b"second"}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in PACKED.items()}


def test_files_are_fetched_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_npm(tmp_path / "bin", PACKED)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = npm_files("toy@1.0.0", SUMS, tmp_path / "cache")
    assert {name: path.read_bytes() for name, path in found.items()} == PACKED
    assert npm_files("toy@1.0.0", SUMS, tmp_path / "cache") == found
    assert (tmp_path / "bin" / "asked").read_text() == "pack --silent toy@1.0.0\n"
    # A damaged file is fetched again, and nothing else is left in the folder.
    found["data/a"].write_bytes(b"worst")
    assert npm_files("toy@1.0.0", SUMS, tmp_path / "cache")["data/a"].read_bytes() == b"first"
    assert sorted(p.name for p in found["data/a"].parent.iterdir()) == ["a", "b"]


def test_other_bytes_are_refused_and_failures_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_npm(tmp_path / "bin", {**PACKED, "data/b": b"other"})
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(
        UserError, match=r"data/b of toy@1.0.0 has other bytes than expected; allowed: sha256"
    ):
        npm_files("toy@1.0.0", SUMS, tmp_path / "cache")
    fake_npm(tmp_path / "broken", PACKED, code=1)
    monkeypatch.setenv("PATH", f"{tmp_path / 'broken'}:/usr/bin:/bin")
    with pytest.raises(RunFailure, match=r"failed: nothing there; is the network reachable"):
        npm_files("toy@2.0.0", SUMS, tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not installed, and toy@2.0.0 is not in .*put a, b there"):
        npm_files("toy@2.0.0", SUMS, tmp_path / "cache")


def test_mnist_is_read_as_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pixels = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    content = [idx(pixels), idx(np.array([4, 9])), idx(255 - pixels), idx(np.array([1, 0]))]
    paths = {}
    for place, (name, raw) in enumerate(zip(images._MNIST_FILES, content, strict=True)):
        paths[name] = tmp_path / str(place)
        paths[name].write_bytes(raw)
    monkeypatch.setattr(images, "npm_files", lambda *_: paths)
    train, test = mnist()
    assert train.label.tolist() == [4, 9]
    assert np.array_equal(train.pixels, (pixels / 255).astype(np.float32))
    assert test.label.tolist() == [1, 0]
    assert test.pixels[0, 0, 0] == 1
    assert PLACES == 81
