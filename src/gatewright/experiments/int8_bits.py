"""race/int8: what the quickstart's sparse models lose when their experts are read in int8."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from gatewright.experiments.lab import kept
from gatewright.experiments.pages import measured_with
from gatewright.experiments.quickstart import QUICKSTART, run_plan
from gatewright.training.evaluate import EvalRun, evaluate_run
from gatewright.training.workplace import environment, now

Record = dict[str, Any]

CLAIM = "the quickstart's sparse models lose at most 0.001 bits per byte with their experts in int8"
LEAST = 0.001


def run_int8(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record and its page, no picture; quick: the quick form of the race, seed 0.

    The models are those of race/quickstart beside `work`, which is run first where it is not finished.
    """
    race = work.parent / f"race-quickstart{'-quick' if quick else ''}"
    raced = run_plan(QUICKSTART, race, quick)["race"]
    work.mkdir(parents=True, exist_ok=True)
    seeds = []
    for run in raced["runs"]:
        folder = race / "race" / f"seed{run['seed']}" / "sparse"
        settings = {"run": (folder / "run.toml").read_text(encoding="utf-8"), "seed": run["seed"]}
        seeds.append(kept(work / f"seed{run['seed']}.json", settings, partial(_compare, folder, run["seed"])))
    record: Record = {"schema": "gatewright.int8.v1", "target": "race/int8", "claim": CLAIM, "quick": quick}
    record |= {"seeds": seeds, "environment": environment("cpu"), "created": now()}
    record["verdict"] = verdict(record)
    return record, int8_page(record), {}


def _compare(folder: Path, seed: int) -> Record:
    """Return the bits per byte of a run, per domain, as trained and with experts in int8."""
    found = [evaluate_run(folder, EvalRun(int8_experts=int8)) for int8 in (False, True)]
    names = ("as_trained", "int8")
    sides = {name: {"all": own.bits_per_byte, **own.domains} for name, own in zip(names, found, strict=True)}
    return {"seed": seed, "num_bytes": found[0].num_bytes, **json.loads(json.dumps(sides))}


def verdict(record: Record) -> Record:
    """Return whether the loss is at most 0.001 bits per byte in every seed, and the largest."""
    losses = [seed["int8"]["all"] - seed["as_trained"]["all"] for seed in record["seeds"]]
    held = max(losses) <= LEAST
    return {
        "held": held,
        "sentence": f"{'held' if held else 'did not hold'}: experts in int8 cost at most {max(losses):.5f} "
        f"bits per byte over {len(losses)} seeds",
    }


def int8_page(record: Record) -> str:
    """Return the page: claim, verdict, every seed and domain."""
    names = list(record["seeds"][0]["as_trained"])
    rows = []
    for seed in record["seeds"]:
        for side in ("as_trained", "int8"):
            cells = " | ".join(f"{seed[side][name]:.5f}" for name in names)
            rows.append(f"| {seed['seed']} | {side.replace('_', ' ')} | {cells} |")
    lines = [
        "# Experts in int8",
        "",
        f"Command: `gatewright reproduce race/int8{' --quick' if record['quick'] else ''}`. Claim: {CLAIM}.",
        "",
        f"**{record['verdict']['sentence']}**",
        "",
        "| seed | experts | " + " | ".join(names) + " |",
        "|--:|---|" + "--:|" * len(names),
        *rows,
        "",
        f"Bits per byte on {record['seeds'][0]['num_bytes']:,} bytes of validation text; the models are "
        "those of `gatewright reproduce race/quickstart`.",
        "",
        measured_with(record),
        "",
    ]
    return "\n".join(lines)
