"""run.toml: the resolved settings that stand beside every result, and the check that a resumed run has the
same ones.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from gatewright.errors import UserError
from gatewright.papers.settings_table import table_of
from gatewright.training.checkpoint import write_atomic

# What may change between a run and its continuation: nothing that a number depends on.
_FREE = {"resume", "threads", "out", "checkpoint_every", "keep_checkpoints", "device", "recompute"}


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return "[" + ", ".join(_literal(v) for v in value) + "]"


def settings_tables(run: Any, model: Any) -> dict[str, dict[str, Any]]:
    """Return {"run": {...}, "model": {...}} as plain data; settings that are None by default and still are
    so are left out.
    """
    own = {name: value for name, value in table_of(run).items() if name != "model"}
    return {"run": own, "model": table_of(model)}


def write_settings(path: Path, run: Any, model: Any) -> None:
    """Write run.toml with the tables [run] and [model]."""
    lines = []
    for name, table in settings_tables(run, model).items():
        lines += [f"[{name}]", *(f"{key} = {_literal(value)}" for key, value in table.items()), ""]
    write_atomic(path, "\n".join(lines))


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of a run.toml. Raises: UserError if it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; a run writes it into its --out folder") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from None


def _defaults(settings: Any) -> dict[str, Any]:
    """Return the defaults that a file would hold, as it would hold them."""
    own = {f.name: f.default for f in dataclasses.fields(settings) if f.name != "model"}
    held = {k: v for k, v in own.items() if v is not None and v is not dataclasses.MISSING}
    plain: dict[str, Any] = json.loads(json.dumps(held))
    return plain


def check_same_settings(path: Path, run: Any, model: Any) -> None:
    """Raise UserError naming the first setting in which a resumed run differs from the one that is there.

    A setting that the file lacks had its default: the file may be older than the setting.
    """
    before = read_settings(path)
    now = json.loads(json.dumps(settings_tables(run, model)))
    defaults = {"run": _defaults(run), "model": _defaults(model)}
    for name, table in now.items():
        old = defaults[name] | before.get(name, {})
        for key in sorted(set(table) | set(old)):
            if name == "run" and key in _FREE:
                continue
            if old.get(key) != table.get(key):
                raise UserError(
                    f"{key} is {table.get(key)} but the run in {path.parent} was begun with "
                    f"{old.get(key)}; resume with the same "
                    "settings, or give another --out"
                )
