"""mixtral/passkey: section 3.2, a key found again by position and length, sparse and dense."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gatewright.data import Corpus
from gatewright.experiments.lab import Record
from gatewright.experiments.paired import interval
from gatewright.experiments.passkeys import DIGITS, PasskeyStream, problems
from gatewright.experiments.steps import Stream
from gatewright.experiments.trial_pages import Result, diverged, run_trials, table
from gatewright.experiments.trials import Course, Trained, paper_trial, text_stream
from gatewright.inspection.plots.grids import draw_grids

SPARSE, DENSE = "sparse", "dense twin"
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (32, 64, 96, 128)
COUNT = 64  # texts per cell
GROWS = 0.8  # share of the steps over which the texts with keys grow to the whole context
LEAST = 0.9
_SIZES: dict[str, Any] = {"num_experts": 8, "num_selected": 2, "expert_width": 128, "context": LENGTHS[-1]}
COURSE = Course(
    trials=(
        paper_trial(SPARSE, "mixtral", "8 experts of width 128, 2 active", **_SIZES),
        paper_trial(
            DENSE, "mixtral", "one MLP of width 256", moe_layers="none", ffn_width=256, context=LENGTHS[-1]
        ),
    ),
    baseline=DENSE,
    steps=2500,
    learning_rate=5e-3,
    context=LENGTHS[-1],
)
CLAIM = (
    f"the sparse model gives all {DIGITS} digits of the key in at least {100 * LEAST:.0f} % of held-out "
    "texts, mean over positions and lengths up to its context, in every seed; its distance to the dense twin "
    "of equal active FLOPs is measured"
)


def run_passkey(work: Path, quick: bool) -> Result:
    """Return the record, its page and its picture; quick: one seed, an eighth of the steps."""
    return run_trials(
        COURSE,
        work,
        quick,
        "mixtral/passkey",
        "A pass key found again (Mixtral, section 3.2)",
        CLAIM,
        passkey_verdict,
        look=look,
        source=keyed_stream,
        pictures=_pictures,
    )


def keyed_stream(corpus: Corpus, course: Course) -> Stream:
    """Return the training text with pass keys in every row."""
    steps = round(GROWS * course.steps)
    return PasskeyStream(text_stream(corpus, course), steps, corpus.tokenizer.eot)


@torch.no_grad()
def look(trained: Trained) -> Record:
    """Return {"whole": [positions][lengths], "digits": ...}: shares of keys that the model would write in
    full, and of digits that it finds likeliest behind the true ones.
    """
    model, text = trained.model, np.concatenate(list(trained.texts.values()))
    lengths = [length for length in LENGTHS if length <= trained.course.context]
    found: Record = {"whole": [], "digits": []}
    model.eval()
    for position in POSITIONS:
        whole, digits = [], []
        for length in lengths:
            ids, keys = problems(text, COUNT, length, position, trained.seed, trained.corpus.tokenizer.eot)
            logits = model(torch.from_numpy(ids[:, :-1])).logits
            right = logits[:, -DIGITS:].argmax(dim=-1).numpy() == keys
            # Where every digit is likeliest behind the true ones, greedy writing gives the whole key.
            whole.append(float(right.all(axis=1).mean()))
            digits.append(float(right.mean()))
        found["whole"].append(whole)
        found["digits"].append(digits)
    model.train()
    return {"retrieved": found}


def means(record: Record, name: str, key: str = "whole") -> list[float]:
    """Return an arm's share over all cells, by seed."""
    seeds = record["arms"][name]["seeds"]
    return [statistics.fmean(cell for row in own["retrieved"][key] for cell in row) for own in seeds]


def grid(record: Record, name: str, key: str = "whole") -> list[list[float]]:
    """Return an arm's shares [positions][lengths], means over seeds."""
    tables = [own["retrieved"][key] for own in record["arms"][name]["seeds"]]
    found: list[list[float]] = np.mean(np.asarray(tables), axis=0).tolist()
    return found


def passkey_verdict(record: Record) -> Record:
    """Return whether the sparse model gives the key in nine of ten texts in every seed."""
    if lost := diverged(record):
        return {"held": False, "sentence": f"did not hold: {', '.join(lost)} diverged"}
    sparse, dense = means(record, SPARSE), means(record, DENSE)
    held = min(sparse) >= LEAST
    more = [one - two for one, two in zip(sparse, dense, strict=True)]
    worst = min(cell for row in grid(record, SPARSE) for cell in row)
    return {
        "held": held,
        "sparse": sparse,
        "dense": dense,
        "table": _table(record),
        "sentence": f"{'held' if held else 'did not hold'}: the sparse model gives the whole key in "
        + ", ".join(f"{100 * share:.0f} %" for share in sparse)
        + " of texts, the dense twin in "
        + ", ".join(f"{100 * share:.0f} %" for share in dense)
        + f"; difference of shares {interval(more, 3)}; in the sparse model's worst cell {100 * worst:.0f} %",
    }


def _table(record: Record) -> list[str]:
    """Return the whole keys by position and length, sparse / dense, means over seeds."""
    sparse, dense = grid(record, SPARSE), grid(record, DENSE)
    rows = []
    for position, ours, theirs in zip(POSITIONS, sparse, dense, strict=True):
        cells = [f"{100 * one:.0f} % / {100 * two:.0f} %" for one, two in zip(ours, theirs, strict=True)]
        rows.append([f"{100 * position:.0f} %", *cells])
    digits = [statistics.fmean(means(record, name, "digits")) for name in (SPARSE, DENSE)]
    head = ["position of the key", *(f"{length} ids" for length in LENGTHS[: len(sparse[0])])]
    return [
        "Whole keys, sparse / dense, mean over seeds; single digits are right in "
        f"{100 * digits[0]:.0f} % / {100 * digits[1]:.0f} %, 10 % by chance.",
        "",
        *table(head, rows),
    ]


def _pictures(record: Record, work: Path) -> dict[str, Path]:
    if diverged(record):
        return {}
    path = work / "retrieved.png"
    grids = {name: grid(record, name) for name in (SPARSE, DENSE)}
    names = [str(length) for length in LENGTHS[: len(grids[SPARSE][0])]]
    rows = [f"{100 * position:.0f} %" for position in POSITIONS]
    draw_grids(grids, rows, names, ("position of the key", "length"), (0.0, 1.0), path)
    return {"retrieved": path}
