"""The user's own files and folders as domains."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatewright.data.formats import COMPRESSED, JSON_LINES, PARQUET, NotText, plain_suffix, read_records
from gatewright.data.store import Source, TextWriter
from gatewright.data.text import cut, piece_size
from gatewright.errors import UserError

_SUFFIXES = """
    .txt .text .md .markdown .mdx .rst .adoc .org .tex .html .htm .xml .srt .py .pyi .pyx .ipy .c .h .cc
    .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .java .kt .kts .scala .groovy .cs .fs .vb .go .rs .swift .js
    .jsx .mjs .cjs .ts .tsx .vue .svelte .css .scss .less .php .rb .pl .pm .lua .r .jl .dart .ex .exs
    .erl .hrl .hs .ml .mli .clj .cljs .lisp .el .scm .rkt .sql .sh .bash .zsh .fish .ps1 .bat .cmake .mk
    .f .f90 .f95 .f03 .for .pas .ada .adb .ads .v .sv .vhd .vhdl .asm .s .proto .thrift .graphql .tf
    .nix .zig .nim .d .toml .yaml .yml .ini .cfg .conf .po
"""
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
"""Suffixes of the files that a folder gives; a file that is named itself is read whatever it is called."""
TEXT_NAMES = frozenset(("readme", "license", "licence", "copying", "notice", "authors", "makefile"))
_LEFT_OUT = frozenset(("__pycache__", "node_modules", "site-packages", "venv"))
_ALLOWED = "--data takes text, Markdown, source code, JSON lines and parquet files, and folders of them"


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    size: int
    modified: int


def file_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Return a source for each path, named after its last part; raise UserError where one has no text."""
    sources: list[Source] = []
    seen: dict[Path, str | Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        about = _stat(path, given)
        real = path.resolve()
        if real in seen:
            raise UserError(f"--data {str(given)!r} is {str(seen[real])!r} again; each path is given once")
        seen[real] = given
        name = _unique(_domain_name(real), {source.name for source in sources})
        if stat.S_ISDIR(about.st_mode):
            sources.append(_folder_source(name, path, given))
        elif not stat.S_ISREG(about.st_mode):
            raise UserError(f"--data {str(given)!r} is neither a file nor a folder; {_ALLOWED}; give one")
        elif about.st_size == 0:
            raise UserError(f"--data {str(given)!r} is an empty file; {_ALLOWED}; give one with text in it")
        else:
            files = [_File(path, path.name, about.st_size, about.st_mtime_ns)]
            sources.append(_source(name, files, given, "", named=True))
    return sources


def _stat(path: Path, given: str | Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"--data {str(given)!r} {what}; {_ALLOWED}; check the path")


def _domain_name(path: Path) -> str:
    name = path.name
    while Path(name).suffix.lower() in COMPRESSED:
        name = Path(name).stem
    if not path.is_dir():
        name = Path(name).stem
    return re.sub(r"[^\w.+-]+", "_", name).strip("_") or "text"


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _folder_source(name: str, folder: Path, given: str | Path) -> Source:
    others: Counter[str] = Counter()
    files = sorted(_walk(folder, others), key=lambda file: file.name)
    left = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    if not files:
        held = f" (it holds {sum(others.values())} other files: {left})" if others else ""
        raise UserError(
            f"--data {str(given)!r} is a folder without a text file{held}; files are chosen by suffix "
            "(.txt, .md, .py, .jsonl, ...), one named itself is read whatever it is called; check the folder"
        )
    more = f"{sum(others.values())} files not read for their suffix ({left})" if others else ""
    return _source(name, files, given, more, named=False)


def _walk(folder: Path, others: Counter[str]) -> Iterator[_File]:
    """Yield the text files below a folder; links are followed, each real folder is entered once."""
    entered: set[tuple[int, int]] = set()

    def unreadable(_: OSError) -> None:
        others["unreadable folders"] += 1

    for root, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        about = os.stat(root)
        here = (about.st_dev, about.st_ino)
        if here in entered:
            folders.clear()
            continue
        entered.add(here)
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in _LEFT_OUT)
        for name in sorted(names):
            path = Path(root, name)
            if name[0] == "." or not _regular(path):
                continue
            if _is_text_name(path):
                about = path.stat()
                relative = path.relative_to(folder).as_posix()
                yield _File(path, relative, about.st_size, about.st_mtime_ns)
            else:
                others[path.suffix.lower() or "without suffix"] += 1


def _regular(path: Path) -> bool:
    # A pipe or a device would block the reader for ever, so only regular files are ever opened.
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _is_text_name(path: Path) -> bool:
    suffix = plain_suffix(path)
    return (
        suffix in TEXT_SUFFIXES
        or suffix in JSON_LINES
        or suffix == PARQUET
        or (suffix == "" and path.name.split(".")[0].lower() in TEXT_NAMES)
    )


def _source(name: str, files: Sequence[_File], given: str | Path, more: str, *, named: bool) -> Source:
    identity = tuple(f"{file.path.absolute()} {file.size} {file.modified}" for file in files)
    total = sum(file.size * (3 if file.path.suffix.lower() in COMPRESSED else 1) for file in files)

    def read(writer: TextWriter) -> None:
        start = writer.size
        problems: dict[str, list[str]] = {}
        for file in files:
            mark = writer.size
            try:
                _read_file(file, writer, piece_size(total))
            except NotText as problem:
                writer.rollback(mark)
                if named:
                    raise UserError(f"--data {str(given)!r} {problem}; {_ALLOWED}; convert it") from None
                problems.setdefault(str(problem), []).append(file.name)
        for problem_text, names in problems.items():
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            writer.note(f"domain {name}: {len(names)} skipped, each {problem_text}: {shown}")
        if more:
            writer.note(f"domain {name}: {more}")
        if writer.size == start:
            raise UserError(
                f"--data {str(given)!r} holds no text: {len(files)} read, none with more than white space; "
                f"{_ALLOWED}; check it"
            )

    return Source(name, identity, read)


def _read_file(file: _File, writer: TextWriter, longest: int) -> None:
    for number, blocks in enumerate(read_records(file.path, writer.note)):
        for place, piece in enumerate(cut(blocks, longest)):
            writer.add(f"{file.name}#{number}.{place}", piece)
