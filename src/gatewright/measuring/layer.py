"""`bench_layer`: the speed grid of one expert layer, row by row, written after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gatewright.measuring.grid import DTYPES, Cell, Shape
from gatewright.measuring.held import digest_of, held_rows, place_of, same_cell, settings_of
from gatewright.measuring.memory import check_memory_can_be_measured, peak_memory
from gatewright.measuring.pictures import draw_pictures
from gatewright.measuring.profile import profile_layer, profile_text
from gatewright.measuring.record import Row, row_record
from gatewright.measuring.result import SCHEMA, BenchResult, memory_text
from gatewright.measuring.rivals import IMPLEMENTATIONS, too_large, transformers_version
from gatewright.measuring.roofline import Machine, measure_machine, roofline_seconds
from gatewright.measuring.rounds import time_rounds
from gatewright.measuring.run import BenchRun
from gatewright.measuring.sides import DENSE, FEW, LINEAR, OURS, TRANSFORMERS, build_sides
from gatewright.measuring.summary import summary
from gatewright.training.checkpoint import write_atomic
from gatewright.training.runlog import Progress
from gatewright.training.workplace import command_line, now, own_folder

WARM_UPS = 2
# A side of transformers that takes this many times as long as its fastest one cannot be its best.
SLOW = 10


def bench_layer(run: BenchRun, say: Callable[[str], None] | None = None) -> BenchResult:
    """Time every row, write `layer.json` and pictures into the run's folder, and return the result.

    Threads and allocator are the process's own: recorded here, set by `gatewright bench`. A file that is
    there is replaced; with `resume` its rows of the same settings stay.
    Args: `say` takes a line of progress per row; None writes to stderr.
    Raises: UserError if the folder is in use, or memory cannot be measured here.
    """
    say = say or Progress("bench").say
    if run.memory:
        check_memory_can_be_measured()
    cells, settings = run.cells(), settings_of(run, WARM_UPS)
    digest = digest_of(settings)
    with own_folder(Path(run.out)) as out:
        path = out / "layer.json"
        held = held_rows(path, digest) if run.resume else {}
        if settings["transformers"] is None:
            say("transformers is not installed, its sides are left out; pip install 'gatewright[hf]'")
        machine = measure_machine(run.dtypes, run.rounds)
        done: list[Row] = []

        def write() -> dict[str, Any]:
            # Rows of an earlier result that were not asked for, or not yet, stay behind the new ones.
            record = _record(run, settings, machine, [*done, *held.values()])
            write_atomic(path, json.dumps(record, indent=1) + "\n")
            return record

        for number, cell in enumerate(cells, 1):
            row = held.pop(place_of(cell), None)
            kept = row is not None and same_cell(row, cell)
            if row is None or not kept:
                row = {**measure_cell(cell, run, machine), "settings": digest, "created": now()}
            done.append(row)
            say(f"{number}/{len(cells)} {' '.join(place_of(cell))}: {_told(row)}{' (kept)' * kept}")
            record = write()
        for cell, row in zip(cells, done, strict=True):
            if run.memory and cell.kind == "forward-backward" and not row["memory"]:
                row["memory"] = measure_memory(cell, run)
                say(f"memory {' '.join(place_of(cell))}: {memory_text(row['memory'])}")
                record = write()
            if run.profile and not row.get("profile"):
                row["profile"] = profile_layer(cell, run.backend)
                say(f"profile {' '.join(place_of(cell))}: {profile_text(row['profile'])}")
                record = write()
        pictures = draw_pictures(record["rows"], out)
    return BenchResult(record, (str(path), *map(str, pictures)))


def measure_cell(cell: Cell, run: BenchRun, machine: Machine) -> Row:
    """Return one row: raw seconds of every side, ratios, and what was left out and why."""
    left_out = _left_out(cell)
    names = [OURS, *(side for side in TRANSFORMERS if side not in left_out), *DENSE]
    if cell.few is not None:
        names.append(FEW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sides = build_sides(cell, run.backend, names)
        x, grad = torch.randn(2, cell.shape.tokens, cell.shape.width).to(DTYPES[cell.dtype])
    x = x.clone().requires_grad_()
    turns = {name: side.turn(x, grad, cell.kind, run.keep_gradients) for name, side in sides.items()}
    slow = too_slow(time_rounds(turns, WARM_UPS))
    seconds = time_rounds({name: turn for name, turn in turns.items() if name not in slow}, run.rounds)

    def roofline(shape: Shape) -> float:
        return roofline_seconds(shape, cell.dtype, cell.kind, machine)

    return row_record(cell, seconds, {**left_out, **slow}, roofline)


def _left_out(cell: Cell) -> dict[str, str]:
    """Return the sides of transformers that are not even tried, with the reason."""
    missing = None if transformers_version() else "transformers is not installed"
    reasons = {
        side: missing or too_large(name, cell.shape, cell.dtype)
        for side, name in zip(TRANSFORMERS, IMPLEMENTATIONS, strict=True)
    }
    return {side: reason for side, reason in reasons.items() if reason}


def too_slow(warm_ups: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Return the sides of transformers that are left out for their time, with the reason; each side is
    judged by its best call.
    """
    best = {name: min(warm_ups[name]) for name in TRANSFORMERS if name in warm_ups}
    fastest = min(best.values(), default=0.0)
    return {
        name: f"one call takes {seconds:.2g} s, {seconds / fastest:.0f} times as long as its fastest side"
        for name, seconds in best.items()
        if seconds > SLOW * fastest
    }


def measure_memory(cell: Cell, run: BenchRun) -> dict[str, int | None]:
    """Return the peak memory of our layer, the plain dense one, and transformers' ones."""
    left_out = _left_out(cell)
    names = [OURS, LINEAR, *(side for side in TRANSFORMERS if side not in left_out)]
    return {name: peak_memory(cell, name, run.backend, torch.get_num_threads()) for name in names}


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
        "settings": {name: value for name, value in settings.items() if name != "environment"},
        "environment": settings["environment"],
        "machine": machine.to_dict(),
        "rows": rows,
        **summary(rows),
    }
