"""gshard/rates: the sparse model and its dense twin of gshard/quality at four learning rates each."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from gatewright.data.hashing import digest
from gatewright.experiments.gshard_quality import _print_of
from gatewright.experiments.gshard_runs import PLAN, SPARSE, TWIN, QualityPlan, quick_form, run_model
from gatewright.experiments.gshard_text import many_to_one, open_sources, split_texts
from gatewright.experiments.lab import Record, kept
from gatewright.experiments.rates import RATES, SEED, Result, swept
from gatewright.training.runlog import Progress

TARGET, OF = "gshard/rates", "gshard/quality"
NAMES = (TWIN, SPARSE)


def run_gshard_rates(work: Path, quick: bool, whole: QualityPlan = PLAN) -> Result:
    """Return the record and its page: dev losses at the end; quick: a twelfth of the steps."""
    plan = quick_form(whole) if quick else whole
    systems = {own.name: own for own in plan.systems}
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Record]] = {name: [] for name in NAMES}
    jobs = [(rate, name) for rate in RATES for name in NAMES]
    with Progress(TARGET) as progress:
        sources = open_sources(plan.text, progress.say)
        corpus = many_to_one(plan.text, split_texts(plan.text, sources.lines))
        text = _print_of((corpus,))
        for place, (rate, name) in enumerate(jobs):

            def show(share: float, place: int = place, name: str = name, rate: float = rate) -> None:
                about = f"{name} at {rate:g} ({place + 1} of {len(jobs)})"
                progress.update((place + share) / len(jobs), about)

            show(0.0)
            own, model = replace(plan, learning_rate=rate), plan.settings(systems[name], corpus)
            keys = {"plan": course_of(own), "model": asdict(model), "text": text, "seed": SEED}
            file = f"{name}-{rate:g}".replace(" ", "")
            folder = work / f"{file}-{digest([json.dumps(keys)])[:8]}"
            into = plan.text.into_english
            train = partial(run_model, own, model, corpus, into, (), SEED, folder, show)
            done = kept(work / f"{file}.json", keys, train)
            nats = done["train"]["curve"][-1]["dev"]
            found[name].append({"learning_rate": rate, "dev_nats": nats if math.isfinite(nats) else None})
    told = {
        "measure": "dev_nats",
        "course": f"{plan.steps} steps of {plan.rows} pairs",
        "plan": course_of(plan),
        "data": {"text": text},
    }
    return swept(TARGET, OF, whole.learning_rate, found, quick, told)


def course_of(plan: QualityPlan) -> Record:
    """Return what the loss of a run follows from, as plain data."""
    left = ("seeds", "seeded", "systems", "levels", "test_lines", "beams", "alpha")
    told: Record = json.loads(json.dumps(asdict(plan)))
    return {key: value for key, value in told.items() if key not in left}
