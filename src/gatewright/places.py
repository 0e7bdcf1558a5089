"""Where gatewright keeps what it has built once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(cache: str | Path | None = None) -> Path:
    """Return the folder of built things: `cache`, else $GATEWRIGHT_CACHE, else ~/.cache/gatewright."""
    given = cache or os.environ.get("GATEWRIGHT_CACHE") or Path("~/.cache/gatewright")
    return Path(given).expanduser().absolute()
