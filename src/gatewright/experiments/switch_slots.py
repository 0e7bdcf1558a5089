"""switch/slots: one batch of text through one trained Switch layer at two capacity factors: places filled and
empty, and tokens that overflow.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gatewright.data import open_corpus
from gatewright.evaluation import take_bytes
from gatewright.experiments.arms import quick_form
from gatewright.experiments.lab import Arm, Plan, Record, kept, stepper_of
from gatewright.experiments.lab_counts import windows
from gatewright.experiments.pages import measured_with
from gatewright.inspection.plots.slots import Places, draw_slots
from gatewright.parts import Capacity
from gatewright.training.runlog import Progress
from gatewright.training.workplace import environment, now

FACTORS = (1.0, 1.5)
_ARM = Arm("Switch", "switch", 16, 1, 256, {"balance": 1e-2}, capacity=Capacity(1.25, 16.0, per_token=True))
PLAN = Plan((_ARM,), "Switch", rows=8, steps=256, seeds=(0,))
CLAIM = "none: a picture of one batch, as the paper's figure 3 draws one"


def run_slots(work: Path, quick: bool) -> tuple[Record, str, dict[str, Path]]:
    """Return the record, its page and its picture; quick: an eighth of the steps."""
    plan = quick_form(PLAN) if quick else PLAN
    work.mkdir(parents=True, exist_ok=True)
    settings = {"steps": plan.steps, "rows": plan.rows, "factors": list(FACTORS)}
    record: Record = {"schema": "gatewright.slots.v1", "target": "switch/slots"}
    record |= {"claim": CLAIM, "quick": quick}
    record |= {"steps": plan.steps, **kept(work / "slots.json", settings, partial(routed, plan))}
    record |= {"environment": environment("cpu"), "created": now(), "verdict": slots_verdict(record)}
    path = work / "batch.png"
    panels = [Places(f"capacity factor {own['factor']:g}", *_columns(own)) for own in record["factors"]]
    draw_slots(panels, path)
    return record, slots_page(record), {"batch": path}


def _columns(own: Record) -> tuple[int, list[int], list[int]]:
    return own["places"], own["counts"], own["kept"]


def routed(plan: Plan) -> Record:
    """Return how the first layer routes a batch of validation text after training, at each factor.

    No jitter; the choices are the same at both factors, since nothing before the layer depends on them.
    """
    with Progress("switch/slots") as progress:
        corpus = open_corpus((), progress=progress.say)
        stepper = stepper_of(plan, plan.arms[0], corpus, plan.seeds[0])
        for step in range(plan.steps):
            progress.update(step / plan.steps, "training")
            stepper.advance()
    share = plan.rows * plan.context + 1
    texts = {
        d: take_bytes(corpus.valid(d).tokens, corpus.tokenizer.byte_lengths, share) for d in corpus.domains
    }
    batch = next(windows(texts, plan.rows, plan.context))
    layer: Any = stepper.model.layers[0].feed_forward
    found = []
    stepper.model.eval()
    for factor in FACTORS:
        layer.capacity = Capacity(factor, per_token=True)
        with torch.no_grad():
            stats = stepper.model(batch).stats["layers.0.router"]
        places = layer.capacity.places(1, batch.numel(), layer.num_experts, False)
        own = {"factor": factor, "places": places, "counts": stats.counts.tolist()}
        found.append(own | {"kept": stats.kept.tolist()})
    return {"tokens": batch.numel(), "factors": found, "data": {"text": corpus.fingerprint}}


def slots_verdict(record: Record) -> Record:
    """Return what the batch came to; nothing was claimed, so that it always holds."""
    told = []
    for own in record["factors"]:
        filled, asked = sum(own["kept"]), sum(own["counts"])
        made = own["places"] * len(own["counts"])
        told.append(
            f"at a capacity factor of {own['factor']:g} ({own['places']} places per expert) {filled:,} of "
            f"{made:,} places are filled, {made - filled:,} stay empty and {asked - filled:,} tokens overflow"
        )
    return {"held": True, "sentence": f"one batch of {record['tokens']:,} tokens: {'; '.join(told)}"}


def slots_page(record: Record) -> str:
    """Return the page: the sentence, the picture, what was run and where."""
    quick = " --quick" if record["quick"] else ""
    picture = f"switch-slots{'-quick' if quick else ''}-batch.png"
    return "\n".join(
        [
            "# Places of one batch (Switch, figure 3)",
            "",
            f"Command: `gatewright reproduce switch/slots{quick}`. Claim: {record['claim']}.",
            "",
            f"**{record['verdict']['sentence']}**",
            "",
            f"![places filled, empty and overflowed by expert]({picture})",
            "",
            f"First layer of a Switch decoder (16 experts, balance loss 0.01) after {record['steps']} steps "
            "on the default corpus; C = ceil(f T / E) places, validation text of all domains, first come "
            "first served.",
            "",
            measured_with(record),
            "",
        ]
    )
