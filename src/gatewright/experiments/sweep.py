"""Learning-rate sweeps: the same list for both sides, every run whole, the best of each side taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatewright.data import Corpus
from gatewright.errors import Diverged, UserError
from gatewright.experiments.race_run import RaceRun, Side, race_sides
from gatewright.experiments.to_end import Show, run_to_end
from gatewright.training.checkpoint import write_atomic
from gatewright.training.interrupt import StopRequest, stop_on_signals
from gatewright.training.loop import prepare
from gatewright.training.runlog import Progress
from gatewright.training.trainer import Trainer
from gatewright.training.workplace import environment, now

Record = dict[str, Any]


def best_rate(entries: Sequence[Record], kind: str) -> float:
    """Return the learning rate of the lowest final bits per byte of `kind`.

    Raises: UserError if it is at the end of its list: the list is then too short to know.
    """
    own = sorted((e for e in entries if e["kind"] == kind), key=lambda e: e["learning_rate"])
    finite = [e for e in own if e["valid_bpb"] is not None]
    if not finite:
        raise UserError(f"no {kind} run of the sweep ended; allowed: at least one; give lower rates")
    best = min(finite, key=lambda e: e["valid_bpb"])
    if best in (own[0], own[-1]):
        raise UserError(
            f"the best {kind} rate {best['learning_rate']} is at the end of its list; allowed: a list that "
            "goes on beyond the best; "
            "add rates"
        )
    return float(best["learning_rate"])


def sweep(
    race: RaceRun, rates: Sequence[float], path: Path, kinds: Sequence[str] = ("dense", "sparse")
) -> Record:
    """Train every side of `race` (first seed) at every rate, and return and write the entries to `path`.

    Each run is the side's own annealed run, alone; finished entries in `path` are kept, and a stopped run
    goes on from its checkpoint.
    """
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"entries": []}
    if record["entries"] and record["race"] != _race_settings(race):
        raise UserError(f"{path} holds a sweep of other settings; move it away, or give another --out")
    record |= {"schema": "gatewright.sweep.v1", "race": _race_settings(race), "rates": list(rates)}
    record |= {"environment": environment(race.device), "created": now()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress("sweep") as progress, stop_on_signals() as stop:
        corpus = prepare(race, progress.say)
        _check_text(record, corpus, path)
        sides = [side for side in race_sides(race, race.first_seed) if side.kind in kinds]
        every = [(rate, side) for rate in rates for side in sides]
        for number, (rate, side) in enumerate(every):
            if (side.name, rate) not in {(e["name"], e["learning_rate"]) for e in record["entries"]}:

                def show(share: float, state: str, number: int = number) -> None:
                    progress.update((number + share) / len(every), state)

                entry = _run_entry(side, rate, corpus, path.parent, show, stop)
                record["entries"].append(entry)
                write_atomic(path, json.dumps(record, indent=1) + "\n")
                progress.say(f"{side.name} at {rate:g}: {entry['valid_bpb']} bits per byte")
    return record


def _check_text(record: Record, corpus: Corpus, path: Path) -> None:
    held = record.get("fingerprint")
    if record["entries"] and held != corpus.fingerprint:
        raise UserError(f"{path} holds a sweep on other text; move it away, or give another --out")
    record["fingerprint"] = corpus.fingerprint


def _race_settings(race: RaceRun) -> Record:
    free = {
        "out",
        "resume",
        "threads",
        "sparse_rate",
        "dense_rate",
        "seeds",
        "checkpoint_every",
        "keep_checkpoints",
    }
    own = {k: v for k, v in dataclasses.asdict(race).items() if k not in free}
    plain: Record = json.loads(json.dumps(own))
    return plain


def _run_entry(side: Side, rate: float, corpus: Corpus, out: Path, show: Show, stop: StopRequest) -> Record:
    run = dataclasses.replace(side.run, learning_rate=rate, evaluations=1, ema=0.0)
    folder = out / "sweep-checkpoints" / f"{side.name}-{rate:g}"
    trainer = Trainer(run, corpus, side.name)
    entry: Record = {
        "name": side.name,
        "kind": side.kind,
        "learning_rate": rate,
        "seed": run.seed,
        "tokens": run.tokens,
    }
    try:
        run_to_end(trainer, folder, f"{side.name}, rate {rate:g}", show, stop)
    except Diverged as error:
        return {**entry, "valid_bpb": None, "failed": str(error)}
    return {**entry, "valid_bpb": trainer.evaluate().bits_per_byte, "seconds": trainer.seconds}
