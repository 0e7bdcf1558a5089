"""`bench_layer`: the speed grid of one expert layer, row by row, written after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import gatewright
from gatewright.errors import RunFailure
from gatewright.kernels import choose_backend
from gatewright.measuring.grid import DTYPES, Cell, Shape
from gatewright.measuring.memory import check_memory_can_be_measured, peak_memory
from gatewright.measuring.pictures import draw_pictures
from gatewright.measuring.record import Row, row_record
from gatewright.measuring.result import SCHEMA, BenchResult
from gatewright.measuring.rivals import IMPLEMENTATIONS, too_large, transformers_version
from gatewright.measuring.roofline import Machine, measure_machine, roofline_seconds
from gatewright.measuring.rounds import Turn, time_rounds
from gatewright.measuring.run import BenchRun
from gatewright.measuring.sides import DENSE, FEW, OURS, TRANSFORMERS, build_sides
from gatewright.measuring.summary import summary
from gatewright.training.checkpoint import write_atomic
from gatewright.training.runlog import Progress
from gatewright.training.workplace import command_line, environment, now, own_folder

WARM_UPS = 2
# A side of transformers that takes this many times as long as its fastest one cannot be its best.
SLOW = 10
# What the measured code is made of: rows of another version are not kept by --resume.
CODE = ("kernels", "parts", "measuring")


def bench_layer(run: BenchRun, say: Callable[[str], None] | None = None) -> BenchResult:
    """Time every row, write `layer.json` and pictures into the run's folder, and return the result.

    Threads and allocator are the process's own and are recorded, not set: `gatewright bench` sets them
    first. Args: `say` takes a line of progress per row; None writes to stderr.
    Raises: UserError if the folder is in use, or memory cannot be measured here.
    """
    say = say or Progress("bench").say
    if run.memory:
        check_memory_can_be_measured()
    cells, settings = run.cells(), _settings(run)
    with own_folder(Path(run.out)) as out:
        path = out / "layer.json"
        held = _held_rows(path) if run.resume else {}
        if settings["transformers"] is None:
            say("transformers is not installed, its sides are left out; pip install 'gatewright[hf]'")
        machine = measure_machine(run.dtypes, run.rounds)
        rows: list[Row] = []
        for number, cell in enumerate(cells, 1):
            key = _key(cell, settings)
            head = f"{number}/{len(cells)} {cell.shape.name} {cell.dtype} {cell.kind}"
            row = held.get(key)
            kept = row is not None
            row = row or {**measure_cell(cell, run, machine), "key": key, "created": now()}
            if run.memory and cell.kind == "forward-backward" and not row["memory"]:
                row["memory"] = _memory(cell, run)
            rows.append(row)
            say(f"{head}: {_told(row)}{' (kept)' if kept else ''}")
            record = _record(run, settings, machine, rows)
            write_atomic(path, json.dumps(record, indent=1) + "\n")
        pictures = draw_pictures(rows, out)
    return BenchResult(record, (str(path), *map(str, pictures)))


def measure_cell(cell: Cell, run: BenchRun, machine: Machine) -> Row:
    """Return one row: raw seconds of every side, ratios, and what was left out and why."""
    left_out = {
        side: reason
        for side, name in zip(TRANSFORMERS, IMPLEMENTATIONS, strict=True)
        if (reason := _missing() or too_large(name, cell.shape, cell.dtype))
    }
    names = [OURS, *(side for side in TRANSFORMERS if side not in left_out), *DENSE]
    if cell.few is not None:
        names.append(FEW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sides = build_sides(cell, run.backend, names)
        x, grad = torch.randn(2, cell.shape.tokens, cell.shape.width).to(DTYPES[cell.dtype])
    x = x.clone().requires_grad_()
    turns = {name: side.turn(x, grad, cell.kind, run.keep_gradients) for name, side in sides.items()}
    slow = _too_slow(turns)
    seconds = time_rounds({name: turn for name, turn in turns.items() if name not in slow}, run.rounds)

    def roofline(shape: Shape) -> float:
        return roofline_seconds(shape, cell.dtype, cell.kind, machine)

    return row_record(cell, seconds, {**left_out, **slow}, roofline)


def _too_slow(turns: Mapping[str, Turn]) -> dict[str, str]:
    """Warm every side up; return the sides of transformers that are left out for their time, with it."""
    last = {}
    for name, turn in turns.items():
        for _ in range(WARM_UPS):
            last[name] = time_rounds({name: turn}, 1)[name][0]
    theirs = {name: taken for name, taken in last.items() if name in TRANSFORMERS}
    fastest = min(theirs.values(), default=0.0)
    return {
        name: f"one call takes {taken:.2g} s, {taken / fastest:.0f} times as long as its fastest side"
        for name, taken in theirs.items()
        if taken > SLOW * fastest
    }


def _missing() -> str | None:
    return None if transformers_version() else "transformers is not installed"


def _memory(cell: Cell, run: BenchRun) -> dict[str, int | None]:
    """Return the peak memory of our layer, the plain dense one, and transformers' ones."""
    names = [OURS, DENSE[0]]
    if not _missing():
        pairs = zip(TRANSFORMERS, IMPLEMENTATIONS, strict=True)
        names += [side for side, name in pairs if not too_large(name, cell.shape, cell.dtype)]
    return {name: peak_memory(cell, name, run.backend, torch.get_num_threads()) for name in names}


def _settings(run: BenchRun) -> dict[str, Any]:
    """Return what a row's numbers depend on, beside its shape."""
    return {
        "rounds": run.rounds,
        "warm_ups": WARM_UPS,
        "allocator": run.allocator,
        "gradients": "set to zero in place" if run.keep_gradients else "given up",
        "backend": choose_backend(run.backend)[0],
        "transformers": transformers_version(),
        "code": code_version(Path(gatewright.__file__).parent),
        "environment": environment("cpu"),
    }


def code_version(package: Path) -> str:
    """Return a digest of the files that a layer's time depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for room in CODE for path in (package / room).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _key(cell: Cell, settings: Mapping[str, Any]) -> str:
    # Another commit with the same code measures the same.
    place = {name: value for name, value in settings["environment"].items() if name != "commit"}
    told = json.dumps([cell, {**settings, "environment": place}], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _held_rows(path: Path) -> dict[str, Row]:
    """Return the rows of an earlier result that were not refused, by key."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["key"]: row for row in rows if row["refused"] is None}
    except (ValueError, KeyError, TypeError):
        raise RunFailure(
            f"{path} is no result of `gatewright bench layer`; leave --resume out to replace it, or give "
            "another --out"
        ) from None


def _told(row: Row) -> str:
    if row["refused"]:
        return f"refused: {row['refused']}"
    ratios = row["ratios"]
    theirs = ratios["transformers"]
    than = f", {theirs['median']:.2f} times transformers' best" if theirs else ""
    return f"{ratios['dense']['median']:.2f} times the best dense side{than}"


def _record(run: BenchRun, settings: Mapping[str, Any], machine: Machine, rows: list[Row]) -> dict[str, Any]:
    """Return the whole result as plain data."""
    return {
        "schema": SCHEMA,
        "command": command_line(),
        "created": now(),
        "settings": {**settings, "dtypes": list(run.dtypes), "passes": list(run.passes), "quick": run.quick},
        "environment": settings["environment"],
        "machine": machine.to_dict(),
        "rows": rows,
        **summary(rows),
    }
