"""What a row's numbers depend on, and the rows of an earlier result that --resume may keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewright.errors import RunFailure
from gatewright.kernels import choose_backend
from gatewright.measuring.grid import Cell
from gatewright.measuring.record import Row
from gatewright.measuring.rivals import transformers_version
from gatewright.measuring.run import BenchRun
from gatewright.training.workplace import environment

# What the measured code is made of.
CODE = ("kernels", "parts", "measuring")
Place = tuple[str, str, str]


def settings_of(run: BenchRun, warm_ups: int) -> dict[str, Any]:
    """Return what a row's numbers depend on beside its shape, dtype and pass."""
    return {
        "rounds": run.rounds,
        "warm_ups": warm_ups,
        "allocator": run.allocator,
        "gradients": "set to zero in place" if run.keep_gradients else "given up",
        "backend": choose_backend(run.backend)[0],
        "transformers": transformers_version(),
        "code": code_version(Path(__file__).parents[1]),
        "environment": environment("cpu"),
    }


def code_version(package: Path, rooms: Sequence[str] = CODE) -> str:
    """Return a digest of the files that a time depends on, a layer's unless other rooms are named."""
    digest = hashlib.sha256()
    for path in sorted(path for room in rooms for path in (package / room).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of the settings; another commit with the same code measures the same."""
    place = {name: value for name, value in settings["environment"].items() if name != "commit"}
    told = json.dumps({**settings, "environment": place}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def place_of(cell: Cell) -> Place:
    """Return the three words that name a cell inside a result."""
    return cell.shape.name, cell.dtype, cell.kind


def held_rows(path: Path, digest: str, kind: str = "layer") -> dict[Place, Row]:
    """Return the rows of an earlier result that have the same settings and were not refused.

    Raises: RunFailure if the file is no such result.
    """
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            (row["name"], row["dtype"], row["pass"]): row
            for row in rows
            if row["settings"] == digest and row["refused"] is None
        }
    except (ValueError, KeyError, TypeError):
        raise RunFailure(
            f"{path} is no result of `gatewright bench {kind}`; leave --resume out to replace it, or give "
            "another --out"
        ) from None


def same_cell(row: Row, cell: Cell) -> bool:
    """Say whether a held row has everything that this cell asks for."""
    return cell.few is None or row["fewest_experts"] == cell.few.num_experts
