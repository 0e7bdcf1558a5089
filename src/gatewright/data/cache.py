"""Folders that are built once: written aside, named at the end, and checked by checksum at each opening."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gatewright.errors import RunFailure
from gatewright.places import cache_root as cache_root

MANIFEST = "manifest.json"
Progress = Callable[[str], None]


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_pin(archive: Path, sha256: str) -> None:
    """Raise RunFailure where an archive is not the one that is pinned."""
    found = file_digest(archive)
    if found != sha256:
        raise RunFailure(f"{archive.name} has the checksum {found}, not {sha256}: it is not what is pinned")


def _seal(about: dict[str, Any]) -> str:
    plain = {key: value for key, value in about.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a built folder's manifest after checking every file; raise ValueError naming what is wrong."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(about, dict) or about.get("manifest_sha256") != _seal(about):
        raise ValueError(f"{MANIFEST} does not match its own checksum")
    for name, entry in about["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
            if file_digest(path) != entry["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    return about


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest: `about`, and size and checksum of every file in the folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": file_digest(folder / n)} for n in names}
    about = {**about, "files": files}
    about = {**about, "manifest_sha256": _seal(about)}
    (folder / MANIFEST).write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")


def cached_folder(
    root: Path, kind: str, key: str, build: Callable[[Path], dict[str, Any]], progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """Return the folder for `key` and its manifest, built by `build(folder)` when missing or damaged.

    `build` fills an empty folder and returns what the manifest is to say. The folder gets its name only when
    complete, so another process sees all of it or nothing. Raises RunFailure when it cannot be written.
    """
    place = root / kind / key[:32]
    if place.exists():
        try:
            return place, read_manifest(place)
        except ValueError as error:
            progress(f"warning: the cache {place} is damaged: {error}; building it again")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        aside = place.parent / f".building-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        aside.mkdir()
    except OSError as error:
        raise _unwritable(place.parent, error) from None
    try:
        write_manifest(aside, build(aside))
        _put(aside, place)
    except OSError as error:
        raise _unwritable(place.parent, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return place, read_manifest(place)


def _unwritable(folder: Path, error: OSError) -> RunFailure:
    return RunFailure(
        f"cannot write the corpus cache in {folder} ({error.strerror or error}); nothing half-built is left; "
        "free some space or set GATEWRIGHT_CACHE to another folder"
    )


def _put(aside: Path, place: Path) -> None:
    """Give the finished folder its name; where another process was faster with a sound one, keep that."""
    for _ in range(3):
        try:
            os.replace(aside, place)
            return
        except OSError:
            if not place.exists():
                raise
        try:
            read_manifest(place)
            return
        except ValueError:
            # A folder cannot be replaced in one step: the damaged one steps aside first.
            damaged = aside.with_name(aside.name + "-damaged")
            with contextlib.suppress(FileNotFoundError):
                os.replace(place, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
    os.replace(aside, place)


def _sweep(folder: Path) -> None:
    """Remove what a killed build of this machine left behind."""
    prefix = f".building-{socket.gethostname()}-"
    for path in folder.glob(f"{prefix}*"):
        owner = path.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
