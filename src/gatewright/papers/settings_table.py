"""Settings as the plain tables of a TOML file, and back. TOML has no word for None, so a setting that is left
out has its default; a None where the default is a number (a capacity factor of none) is written "none".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

NONE = "none"


def table_of(settings: Any) -> dict[str, Any]:
    """Return the settings' fields as plain values, less those that are None by default and still are."""
    own = {f.name: (getattr(settings, f.name), f.default) for f in dataclasses.fields(settings)}
    told = {name: NONE if value is None and _number(usual) else value for name, (value, usual) in own.items()}
    return {name: value for name, value in told.items() if value is not None}


def settings_of(kind: type, table: Mapping[str, Any]) -> Any:
    """Return `kind` filled from a table; keys that are no field of it are passed over, lists are tuples."""
    usual = {f.name: f.default for f in dataclasses.fields(kind)}
    given = {name: value for name, value in table.items() if name in usual}
    return kind(**{name: _read(value, usual[name]) for name, value in given.items()})


def _read(value: Any, usual: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return None if value == NONE and _number(usual) else value


def _number(usual: Any) -> bool:
    return isinstance(usual, (int, float)) and not isinstance(usual, bool)
