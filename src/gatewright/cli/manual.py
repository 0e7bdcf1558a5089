"""What --help prints: the flags of each settings class with their meaning and default, in tyro's words."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .run import Common, flag


def help_text(bases: Sequence[Any], prog: str, hidden: Sequence[str] = (), intro: str = "") -> str:
    """Return the help of a command: the flags of each settings class, then those of every command."""
    parts = [f"usage: {prog} [options]", *(["", intro] if intro else [])]
    for base in [*(base for base in bases if not isinstance(base, Common)), Common()]:
        blocks = _help_rows(base)
        gone = {flag(field.name) for field in fields(base) if is_hidden(type(base), field.name, hidden)}
        shown = [row for name, rows in blocks if name not in gone for row in rows]
        parts += ["", (type(base).__doc__ or "").strip().partition("\n")[0], *shown]
    return "\n".join(parts)


def is_hidden(owner: type, field: str, hidden: Sequence[str]) -> bool:
    """Say whether a field is among the hidden, as "field" or as "Class.field"."""
    return field in hidden or f"{owner.__name__}.{field}" in hidden


def _help_rows(base: Any) -> list[tuple[str, list[str]]]:
    """Return (flag, its lines) as tyro words them, for each field of one settings object."""
    import tyro

    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        tyro.cli(type(base), default=base, args=["--help"])
    blocks: list[tuple[str, list[str]]] = []
    # The flags follow the rule under the heading "options"; the first is tyro's own -h.
    for row in page.getvalue().partition("--- \n")[2].splitlines():
        text = row.strip()
        if text.startswith("--"):
            # tyro names the field of a Python keyword as it is spelt; the flag has no underscore.
            row = row.replace("--from_ ", "--from  ")
            blocks.append((flag(text.split()[0].strip("-,")), []))
        if blocks and text:
            blocks[-1][1].append(row.rstrip())
    return blocks
