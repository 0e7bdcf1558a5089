"""Catalogs and the book: what is fetched is what is pinned, and lines stand beside their own translation."""

from __future__ import annotations

import gettext
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gatewright.data import catalogs, handbook
from gatewright.data.cache import file_digest
from gatewright.data.catalogs import catalog_lines, fetch_catalogs, read_catalog
from gatewright.data.handbook import aligned, fetch_handbook, paragraphs
from gatewright.errors import RunFailure, UserError

MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "_Father": "_Père",
    "a person\x04Father": "Papa",
    "Error: %s": "Erreur : %s",
    "Style": "Style",
    "Line\nbreak": "Saut\nde ligne",
    "<b>bold</b>": "<b>gras</b>",
    "12": "douze",
    "Mother": "Mère",
}


def compiled(messages: dict[str, str]) -> bytes:
    """Return a catalog in gettext's binary form."""
    rows = [(a.encode(), b.encode()) for a, b in sorted(messages.items())]
    count, start = len(rows), 28
    at = start + 16 * count
    tables: list[bytes] = [b"", b""]
    body = b""
    for side in (0, 1):
        for row in rows:
            tables[side] += struct.pack("<II", len(row[side]), at + len(body))
            body += row[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, start, start + 8 * count, 0, at)
    return head + tables[0] + tables[1] + body


def test_a_catalog_is_read_without_what_is_no_text(tmp_path: Path):
    (tmp_path / "fr.mo").write_bytes(compiled(MESSAGES))
    with (tmp_path / "fr.mo").open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("Mother") == "Mère"
    # Of two translations of one English text the first in the catalog's order counts.
    assert read_catalog(tmp_path / "fr.mo") == {"Father": "Père", "Mother": "Mère"}


def wheel(folder: Path, languages: list[str]) -> Path:
    path = folder / "gramps.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for name in languages:
            own = {**MESSAGES, f"Only {name[:2]}": f"Nur {name[:2]}"}
            packed.writestr(f"g.data/data/share/locale/{name}/LC_MESSAGES/gramps.mo", compiled(own))
        packed.writestr("gramps/code.py", "raise SystemExit")
    return path


def test_fetching_catalogs_is_pips_and_lines_are_those_of_all(tmp_path: Path, monkeypatch: Any):
    calls: list[list[str]] = []

    def pip(words: list[str], *, cwd: Path, **_: Any) -> Any:
        calls.append(words)
        names = [*catalogs.LANGUAGES.values(), "de"]
        monkeypatch.setattr(catalogs, "SHA256", file_digest(wheel(cwd, names)))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    folder = fetch_catalogs(tmp_path, lambda _: None)
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert calls[0][-1] == "gramps==6.0.8"
    assert "--no-deps" in calls[0]
    assert {path.stem for path in folder.glob("*.mo")} == set(catalogs.LANGUAGES.values())
    lines = catalog_lines(folder)
    assert lines["en"] == ["Father", "Mother", *sorted(f"Only {n}" for n in catalogs.LANGUAGES)]
    assert lines["zh"] == ["Père", "Mère", "", "", "", "", "", "", "Nur zh"]


@pytest.mark.parametrize(
    ("told", "error", "line"),
    [
        ("pip: no network", RunFailure, r"pip could not fetch gramps==6\.0\.8: pip: no network"),
        ("python: No module named pip", UserError, "pip, which is not installed"),
    ],
)
def test_what_pip_cannot_do_is_one_line(tmp_path: Path, monkeypatch: Any, told: str, error: Any, line: str):
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1, "", told))
    with pytest.raises(error, match=line):
        fetch_catalogs(tmp_path, lambda _: None)


def test_another_wheel_is_refused(tmp_path: Path):
    with pytest.raises(RunFailure, match=r"gramps\.whl has the checksum .* it is not what is pinned"):
        catalogs.unpack(wheel(tmp_path, ["fr"]), tmp_path, "0" * 64)


PAGE = '<p>no</p><div class="para">\n  One &amp; <em>two</em>.</div><div class="para">Three.</div>'


def test_paragraphs_stand_beside_the_same_ones_of_a_page():
    assert paragraphs(PAGE) == ["One & two.", "Three."]
    # The second is still English; the second page is missing in Swedish.
    pages = {
        "en": {"a.html": PAGE, "b.html": '<div class="para">Four.</div>'},
        "sv": {"a.html": '<div class="para">Ett och två.</div><div class="para">Three.</div>'},
    }
    assert aligned(pages) == {"en": ["One & two.", "Three.", "Four."], "sv": ["Ett och två.", "", ""]}


def test_without_apt_the_book_is_one_line(tmp_path: Path, monkeypatch: Any):
    def is_not_there(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", is_not_there)
    with pytest.raises(UserError, match="apt-get is not installed; debian-handbook=11"):
        fetch_handbook(tmp_path, lambda _: None)
    failed = subprocess.CompletedProcess([], 100, b"", b"W: slow\nE: Unable to locate package")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunFailure, match=r"`apt-get download .*` failed: E: Unable to locate package"):
        fetch_handbook(tmp_path, lambda _: None)
    (tmp_path / "x.deb").write_bytes(b"other")
    with pytest.raises(RunFailure, match=r"x\.deb has the checksum"):
        handbook.unpack(tmp_path / "x.deb", handbook.SHA256)
