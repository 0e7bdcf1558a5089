"""The trace of an inspection: JSON lines, one per token; and what an inspection reads of text files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TextIO

import numpy as np

from gatewright.errors import RunFailure, UserError
from gatewright.inspection import Window

SCHEMA = "gatewright.trace.v1"


class TraceFile:
    """Writes a header, then a line per token: {"domain", "i", "id", "text", "experts", "weights"}, the last
    two [L][K] in the order of the header's "routers"; -1 is an empty place. The file appears at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(f".{path.name}.part")
        self._file: TextIO | None = None

    def write(self, window: Window) -> None:
        """Add a line for each token of a window. Raises: RunFailure where the disk is full."""
        try:
            if self._file is None:
                self._file = self._beside.open("w", encoding="utf-8", errors="backslashreplace")
                self._file.write(_line(header(window)))
            self._file.writelines(_line(one) for one in token_lines(window))
        except OSError as error:
            self.abandon()
            raise RunFailure(f"cannot write {self.path}: {error.strerror or error}; free space") from error

    def finish(self) -> None:
        """Put the file in its place."""
        if self._file is not None:
            self._file.close()
            os.replace(self._beside, self.path)
            self._file = None

    def abandon(self) -> None:
        """Remove what was written; an earlier trace stays."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._beside.unlink(missing_ok=True)


def header(window: Window) -> dict[str, object]:
    """Return the first line of a trace: its schema, and the routers in order with their sizes."""
    sizes = [routed.num_experts for routed in window.routed.values()]
    return {"schema": SCHEMA, "routers": list(window.routed), "num_experts": sizes}


def token_lines(window: Window) -> list[dict[str, object]]:
    """Return what a trace says of each token of a window."""
    experts = [routed.experts.tolist() for routed in window.routed.values()]
    weights = [np.round(routed.weights.double().numpy(), 4).tolist() for routed in window.routed.values()]
    return [
        {
            "domain": window.domain,
            "i": window.start + place,
            "id": int(window.ids[place]),
            "text": window.pieces[place],
            "experts": [layer[place] for layer in experts],
            "weights": [layer[place] for layer in weights],
        }
        for place in range(len(window.ids))
    ]


def _line(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def read_text(path: Path) -> str:
    """Return a text file. Raises: UserError where it cannot be read, or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not UTF-8 text; allowed: text files; convert it") from None
    except OSError as error:
        raise UserError(
            f"--text {path} cannot be read ({error.strerror or error}); allowed: text files; check the path"
        ) from None
