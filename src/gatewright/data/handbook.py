"""Paragraphs of one technical book in many languages: the Debian Administrator's Handbook, fetched once."""

from __future__ import annotations

import html
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewright.data.cache import cache_root, cached_folder, check_pin
from gatewright.data.hashing import digest
from gatewright.errors import RunFailure, UserError

PACKAGE = "debian-handbook=11.20220922"
"""GPL-2.0-or-later or CC-BY-SA-3.0: read at run time, never copied into this repository."""
SHA256 = "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
LANGUAGES = {
    **{"en": "en-US", "ar": "ar-MA", "es": "es-ES", "fr": "fr-FR", "id": "id-ID", "ru": "ru-RU"},
    **{"sv": "sv-SE", "tr": "tr-TR", "zh": "zh-CN"},
}
"""Which folder of the book is each language's."""
LINES = "lines.json"
_PAGE = re.compile(r".*/html/([a-z]{2}-[A-Z]{2})/([^/]+\.html)")
_PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)


def fetch_handbook(cache: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """Return the folder of the book's paragraphs, fetched by apt-get on the first call and cached after it.

    Raises: UserError without apt-get or dpkg-deb; RunFailure where they fail, or what came is not what is
    pinned.
    """

    def build(folder: Path) -> dict[str, Any]:
        progress(f"fetching {PACKAGE} with apt-get")
        _ask(["apt-get", "download", "-qq", PACKAGE], folder)
        archives = list(folder.glob("*.deb"))
        if len(archives) != 1:
            raise RunFailure(f"apt-get gave {len(archives)} files for {PACKAGE}, not one")
        lines = unpack(archives[0], SHA256)
        (folder / LINES).write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")
        archives[0].unlink()
        return {"schema": "gatewright.handbook.v1", "package": PACKAGE, "sha256": SHA256}

    return cached_folder(cache_root(cache), "handbook", digest([PACKAGE, SHA256]), build, progress)[0]


def _ask(command: list[str], folder: Path) -> bytes:
    """Return what a program of the system wrote. Raises: UserError without it, RunFailure where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed; {PACKAGE} is a package of Debian; allowed: a system of Debian's "
            "family, or do without this text"
        ) from None
    if done.returncode:
        reason = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise RunFailure(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout


def unpack(archive: Path, sha256: str) -> dict[str, list[str]]:
    """Return the paragraphs in an archive by language. Raises: RunFailure if it is another one."""
    check_pin(archive, sha256)
    pages: dict[str, dict[str, str]] = {folder: {} for folder in LANGUAGES.values()}
    files = io.BytesIO(_ask(["dpkg-deb", "--fsys-tarfile", archive.name], archive.parent))
    with tarfile.open(fileobj=files) as packed:
        for member in packed:
            name = _PAGE.fullmatch(member.name)
            content = packed.extractfile(member) if name and name[1] in pages else None
            if name and content is not None:
                pages[name[1]][name[2]] = content.read().decode("utf-8")
    return aligned({language: pages[folder] for language, folder in LANGUAGES.items()})


def aligned(pages: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Return paragraphs line by line from pages of HTML by language and name: the n-th of a page is the n-th
    of the same page in every language; "" where it is missing or still English.
    """
    own = {
        language: {
            (name, i): text for name, page in by_name.items() for i, text in enumerate(paragraphs(page))
        }
        for language, by_name in pages.items()
    }
    english = own["en"]
    places = sorted(english)
    return {
        language: [
            "" if language != "en" and found.get(place) == english[place] else found.get(place, "")
            for place in places
        ]
        for language, found in own.items()
    }


def paragraphs(page: str) -> list[str]:
    """Return the text of a page's paragraphs, without marks, blanks as one space."""
    return [" ".join(html.unescape(re.sub(r"<[^>]*>", "", p)).split()) for p in _PARAGRAPH.findall(page)]


def handbook_lines(folder: Path) -> dict[str, list[str]]:
    """Return the paragraphs by language; line i is the same paragraph in all of them, or ""."""
    lines: dict[str, list[str]] = json.loads((folder / LINES).read_text(encoding="utf-8"))
    return lines
